"""Sums of gradients over ranks that have different ones, real processes over gloo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_here import on_ranks
from runs import command, distance, final_weights, ledger, metrics, start, write_data
from torch import Tensor, nn

from vlft.engine import summing

RANKS = 3
LARGE = 40
SIZES = {"a": LARGE, "b": 6, "c": LARGE, "d": LARGE}
"""Elements of parameters. `d` lies in memory by columns, and so does its gradient, which NCCL would refuse."""
Step = dict[int, set[str]]
"""For each rank, whose gradients its last backward pass gives."""
STEPS: list[tuple[Step, set[int]]] = [
    ({0: {"a", "b", "c", "d"}, 1: {"a", "b", "c"}, 2: {"a", "b", "c", "d"}}, set()),
    ({0: {"a", "b", "c"}, 1: {"a", "b", "c", "d"}, 2: {"a", "b", "c"}}, set()),
    ({0: {"a", "c"}, 1: {"b"}, 2: set()}, set()),  # text alone on one, no row at all on another
    ({0: {"a", "b", "c"}, 1: {"c"}, 2: {"a", "b"}}, {1}),  # one runs out of memory in the middle
    ({0: {"a", "b", "c"}, 1: {"a", "b", "c"}, 2: {"a", "b"}}, set()),  # and it is tried again
    ({0: {"b"}, 1: {"b"}, 2: set()}, set()),  # nobody has some of them
    ({0: {"a", "b", "c"}, 1: set(), 2: {"a"}}, set()),
]
"""Gradients, and the ranks that do not fit."""


def gradient(step: int, rank: int, name: str, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * step + 10 * rank + ord(name)))


def rank(number: int, folder: str) -> None:
    summing.LARGE = LARGE
    made = {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items() if name != "d"}
    made["d"] = nn.Parameter(torch.zeros(4, LARGE // 4).t())
    adder = summing.Summing(list(made.values()), torch.device("cpu"))
    real = torch.distributed.all_reduce

    def contiguous(x: Tensor, **how: Any) -> Any:
        assert x.is_contiguous(), "as NCCL, which gloo is not"
        return real(x, **how)

    torch.distributed.all_reduce = contiguous
    found = []
    for step, (has, short) in enumerate(STEPS):
        for p in made.values():
            p.grad = None
        if here := has[number]:
            used = [made[n].flatten() * gradient(step, number, n, SIZES[n]) for n in sorted(here)]
            with adder.begins():
                torch.cat(used).sum().backward()  # c is used after a, so its gradient comes first
        begun = len(adder._running)
        fits = adder.finish(number not in short)
        sums = {name: None if p.grad is None else p.grad.flatten().tolist() for name, p in made.items()}
        found.append({"begun": begun, "fits": fits, "sums": sums})
    Path(folder, f"{number}.json").write_text(json.dumps(found))


def test_every_rank_has_the_sums_whatever_each_has(tmp_path: Path) -> None:
    on_ranks(rank, RANKS, str(tmp_path))
    ranks = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(RANKS)]
    for step, (has, short) in enumerate(STEPS):
        assert [found[step]["fits"] for found in ranks] == [not short] * RANKS
        if short:
            continue
        for name, size in SIZES.items():
            owners = [n for n in range(RANKS) if name in has[n]]
            for found in ranks:
                if owners:
                    expected = torch.stack([gradient(step, n, name, size) for n in owners]).sum(0)
                    assert torch.tensor(found[step]["sums"][name]).allclose(expected, atol=1e-6)
                else:
                    assert found[step]["sums"][name] is None
    # Nothing is ahead in the first step; then both large ones, in the order in which they come; a rank that lacks the
    # first of them begins with none; and what nobody had in the step before is not ahead.
    begun = [[found[step]["begun"] for found in ranks] for step in range(len(STEPS))]
    assert begun == [[0, 0, 0], [2, 2, 2], [2, 0, 0], [2, 1, 0], [2, 2, 0], [0, 0, 0], [0, 0, 0]]


def test_a_gradient_that_comes_again_is_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summing, "LARGE", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    p = nn.Parameter(torch.ones(4))
    adder = summing.Summing([p], torch.device("cpu"))
    adder._ahead = [p]
    with adder.begins():
        p.sum().backward()
        with pytest.raises(RuntimeError, match="came again"):
            p.sum().backward()


def test_a_gradient_on_its_way_to_others_is_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a view, autograd gives the parameter the same memory as what it goes on with."""
    monkeypatch.setattr(summing, "LARGE", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **_: x.mul_(100))
    p, x = nn.Parameter(torch.ones(4)), torch.ones(2, 2, requires_grad=True)
    adder = summing.Summing([p], torch.device("cpu"))
    adder._ahead = [p]
    with adder.begins():
        (2 * (x.sin() + p.view(2, 2))).sum().backward()
    assert p.grad is not None
    assert p.grad.tolist() == [200.0] * 4
    assert x.grad is not None
    assert x.grad.allclose(2 * torch.ones(2, 2).cos())


@pytest.mark.parametrize(("rate", "during"), [(None, True), (20e9, True), (175e9, False)])
def test_sums_begin_during_the_backward_pass_where_they_are_slow(
    monkeypatch: pytest.MonkeyPatch, rate: float | None, during: bool
) -> None:
    """Where the connection is quick, they would cost the backward pass more than they take after it."""
    monkeypatch.setattr(summing, "LARGE", 2)
    monkeypatch.setattr(summing.Summing, "_measured", lambda *_: rate)
    begun: list[int] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **_: begun.append(x.numel()) or Done())
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: None)
    p = nn.Parameter(torch.ones(4))
    adder = summing.Summing([p], torch.device("cpu"))
    for step in range(2):
        p.grad = None
        begun.clear()
        with adder.begins():
            p.sum().backward()
        assert begun == ([4] if during and step else [])
        assert adder.finish(True)
        assert sorted(begun) == [2, 4]  # and who has what


class Done:
    """A sum that is ready."""

    def wait(self) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_is_the_same_with_and_without(tiny: Callable[..., Path], tmp_path: Path, fails: bool) -> None:
    """Two ranks, bit for bit; of mixed samples, so that some ranks have no pictures; also if one runs out of memory."""
    registry = write_data(tmp_path, 7, counts=(0, 5, 0, 1, 0, 0, 2))
    options: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 6}
    options |= dict.fromkeys([f"learning_rate_{part}" for part in ("llm", "vit", "projector")], 1e-3)
    said = {}
    for name, elements in (("after", 1 << 30), ("ahead", 8)):
        fault: dict[str, Any] = (
            {"kind": "small_memory", "tokens": 150, "where": "backward", "rank": 1} if fails else {"kind": "none"}
        )
        words = command(tiny(), registry, tmp_path / name, "full", mixed_precision="no", **options)
        said[name] = start(words, processes=2, fault=fault | {"large": elements}).stdout
        card = json.loads((tmp_path / name / "run_card.json").read_text())
        assert (card["world_size"], card["distributed_type"]) == (2, "MULTI_CPU")
    assert ("out of memory in step" in said["ahead"]) == fails
    assert metrics(tmp_path / "after") == metrics(tmp_path / "ahead")
    assert not fails or ledger(tmp_path / "after") == ledger(tmp_path / "ahead")
    one, other = final_weights(tmp_path / "after"), final_weights(tmp_path / "ahead")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("elements", [1 << 30, 8])
def test_ranks_with_masters_in_two_halves_are_as_those_with_whole_ones(
    tiny: Callable[..., Path], tmp_path: Path, elements: int
) -> None:
    """With the optimizer of a GPU, in bf16; of mixed samples, so that a rank without pictures gives zeros in fp32."""
    registry = write_data(tmp_path, 7, counts=(0, 5, 0, 1, 0, 0, 2))
    options: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 4}
    for name, whole in (("whole", True), ("halves", False)):
        words = command(tiny(), registry, tmp_path / name, "full", mixed_precision="bf16", **options)
        start(words, processes=2, fault={"kind": "of_gpu", "whole": whole, "large": elements, "rank": "all"})
    for x, y in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "halves"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
    one, other = final_weights(tmp_path / "whole"), final_weights(tmp_path / "halves")
    assert {w.dtype for w in other.values()} == {torch.float32}
    assert distance(one, other) < 2e-5
