"""FSDP2's sums over the ranks: of bf16 gradients, to fp32's digits."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vlft.engine.exchange import Exchange

RANKS = 3
WIDTH = 24


def made() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(WIDTH, WIDTH + 1, bias=False)  # ranks do not divide it: shards are filled up


def inputs(rank: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(rank))


def row(layer: nn.Module, rank: int) -> Tensor:
    """Of gradients of very different sizes: bf16 would lose the small ones in the sum."""
    loss: Tensor = layer(inputs(rank)).float().square().sum() * 100.0**rank
    return loss


def rank(number: int, port: int, folder: str, kind: torch.dtype) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=number, world_size=RANKS)
    layer = fully_shard(made(), mp_policy=MixedPrecisionPolicy(param_dtype=kind))
    layer.set_custom_reduce_scatter(Exchange())  # type: ignore[arg-type]
    layer.set_gradient_divide_factor(1.0)
    layer.set_force_sum_reduction_for_comms(True)
    for _ in range(2):  # the second row's are added to the first's
        row(layer, number).backward()
    gradient = layer.weight.grad
    assert gradient is not None
    torch.save(gradient.full_tensor(), Path(folder, f"{number}.pt"))  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_gradients_are_sent_as_they_are_and_added_in_fp32(tmp_path: Path, kind: torch.dtype) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    torch.multiprocessing.spawn(rank, (port, str(tmp_path), kind), RANKS)  # type: ignore[attr-defined,no-untyped-call]
    each = []
    for number in range(RANKS):
        layer = made().to(kind)
        row_of = inputs(number).to(kind)
        (layer(row_of).float().square().sum() * 100.0**number).backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == kind
        each.append(layer.weight.grad.float())
    whole = 2 * (each[0] + each[1] + each[2])
    for number in range(RANKS):
        found = torch.load(tmp_path / f"{number}.pt")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7 * float(whole.abs().max()))
