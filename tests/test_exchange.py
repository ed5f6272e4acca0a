"""FSDP2's sums over the ranks: of bf16 gradients, to fp32's digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks_here import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vlft.engine.exchange import adds_up

RANKS = 3
WIDTH = 24


def made() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(WIDTH, WIDTH + 1, bias=False)  # ranks do not divide it: shards are filled up


def inputs(rank: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(rank))


def row(layer: nn.Linear, rank: int) -> Tensor:
    """Of gradients of very different sizes: bf16 would lose the small ones in the sum."""
    loss: Tensor = layer(inputs(rank).to(layer.weight.dtype)).float().square().sum() * 100.0**rank
    return loss


def rank(number: int, folder: str, kind: torch.dtype) -> None:
    layer = fully_shard(made(), mp_policy=MixedPrecisionPolicy(param_dtype=kind))
    adds_up(layer)
    for _ in range(2):  # the second row's are added to the first's
        row(layer, number).backward()
    gradient = layer.weight.grad
    assert isinstance(gradient, DTensor)
    torch.save(gradient.full_tensor(), Path(folder, f"{number}.pt"))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_gradients_are_sent_as_they_are_and_added_in_fp32(tmp_path: Path, kind: torch.dtype) -> None:
    on_ranks(rank, RANKS, str(tmp_path), kind)
    each = []
    for number in range(RANKS):
        layer = made().to(kind)
        row(layer, number).backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == kind
        each.append(layer.weight.grad.float())
    whole = 2 * (each[0] + each[1] + each[2])
    for number in range(RANKS):
        found = torch.load(tmp_path / f"{number}.pt")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7 * float(whole.abs().max()))
