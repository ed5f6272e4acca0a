"""A step that does not fit is cut into smaller rows; its mathematics stay. Where that cannot be, the resume does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, distance, final_weights, ledger, metrics, start, train, write_data
from safetensors.torch import load_file
from spoiled import OfGpu

from vlft import optim
from vlft.allocator import CONTEXT
from vlft.engine.base import Engine
from vlft.errors import ConfigError, DataError, DeviceMemoryError
from vlft.models.forward import PackedVLM
from vlft.models.kernels import room_on_gpu
from vlft.models.kernels.memory import MARGIN
from vlft.optim.remainder import remainder_of

FITS_ALONE = 110
"""Tokens that every sample of the toy set stays below, and rows of four do not."""


def words(model: Path, registry: Path, out: Path, **more: Any) -> list[str]:
    options = {"max_steps": 5, "learning_rate_llm": 1e-4, "mixed_precision": "no", "save_steps": 3} | more
    return command(model, registry, out, "full", **options)


def same_run(a: Path, b: Path, limit: float = 1e-5) -> None:
    assert distance(final_weights(a), final_weights(b)) < limit
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert (x["tokens"], x["samples"]) == (y["tokens"], y["samples"])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_rows_are_cut_until_they_fit(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = write_data(tmp_path)
    train(words(tiny(), registry, tmp_path / "whole"))
    fault("small_memory", tokens=FITS_ALONE, where=where)
    train(words(tiny(), registry, tmp_path / "small"))
    same_run(tmp_path / "whole", tmp_path / "small")
    assert ledger(tmp_path / "small") == []
    said = capsys.readouterr().out
    assert "out of memory in step 1: a row of " in said
    assert "toy/r" in said
    state = json.loads((tmp_path / "small/checkpoints/step-000005/state.json").read_text())
    assert 0 < state["budget"]["tokens"] < 300
    # Learnt once: the later steps are cut small enough from the start.
    assert said.count("out of memory in step 5") == 0


def test_a_single_row_s_gradients_are_narrow_and_those_of_cut_rows_are_not(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the optimizer of a GPU, in bf16; the step that is tried again has several rows."""
    registry, seen = write_data(tmp_path), list[set[torch.dtype]]()
    update = Engine.update

    def watched(self: Engine, meanwhile: Callable[[], None] = lambda: None) -> Any:
        seen.append({p.grad.dtype for p in self._parameters if p.grad is not None})
        return update(self, meanwhile)

    monkeypatch.setattr(optim, "AdamW", OfGpu)
    monkeypatch.setattr(Engine, "update", watched)
    more = {"mixed_precision": "bf16", "max_steps": 3, "save_steps": 3}
    train(words(tiny(), registry, tmp_path / "whole", **more))
    assert seen == [{torch.bfloat16, torch.float32}] * 3
    seen.clear()
    fault("small_memory", tokens=FITS_ALONE, where="backward")
    train(words(tiny(), registry, tmp_path / "small", **more))
    assert seen == [{torch.float32}] * 3
    for x, y in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "small"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=0.02)


@pytest.mark.parametrize("batch", [pytest.param(8, marks=pytest.mark.slow), 2])
def test_a_run_with_masters_in_two_halves_is_that_of_whole_ones(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """With the optimizer of a GPU, in bf16, in one row a step or four, through a checkpoint and a resume.

    To the bit, until a weight comes to lie between two numbers of bf16: a cast takes the even one, a half the larger.
    """
    registry, split = write_data(tmp_path), list[str]()
    monkeypatch.setattr(optim, "AdamW", OfGpu)
    more = {
        "mixed_precision": "bf16", "max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch, "learning_rate_vit": 1e-6,
    }  # fmt: skip
    split_masters = PackedVLM.split_masters

    def watched(self: PackedVLM) -> None:
        split_masters(self)
        split.extend(name for name, p in self.named_parameters() if remainder_of(p) is not None)

    monkeypatch.setattr(PackedVLM, "split_masters", watched)
    whole, halves, resumed = (tmp_path / name for name in ("whole", "halves", "resumed"))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "splits_masters", False)
        train(words(tiny(), registry, whole, **more))
    assert not split
    train(words(tiny(), registry, halves, **more))
    assert len(split) > 30
    train(words(tiny(), registry, resumed, **more | {"max_steps": 2}))
    train(words(tiny(), registry, resumed, **more, resume_from_checkpoint="latest"))
    for step in (2, 4):
        found = {out: final_weights(out, step) for out in (whole, halves, resumed)}
        assert {w.dtype for w in found[halves].values()} == {torch.float32}
        assert all(torch.equal(found[resumed][name], w) for name, w in found[halves].items())
        assert distance(found[whole], found[halves]) < 2e-5
    for x, y in zip(metrics(whole), metrics(halves), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
    proved = [json.loads((out / "checkpoints/step-000004/state.json").read_text())["proved"] for out in (whole, halves)]
    assert proved[0] == proved[1]
    assert proved[0].keys() == {"vit", "projector", "llm", "head"}
    result, saved = load_file(halves / "model/model.safetensors"), final_weights(halves, 4)
    layers = [name for name in saved if ".layers." in name]
    assert layers
    assert all(torch.equal(result[name.replace("language_model.", "")], saved[name]) for name in layers)


ROOM = 1 << 30
"""Bytes in which the layers of the toy model keep all of any row."""


def peaks(model: Path, registry: Path, out: Path, plan: str) -> float:
    """Bytes of the largest row, as they are reckoned, where layers keep what `plan` says."""
    seen = [0.0]
    forward = PackedVLM.forward

    def watched(self: Any, **row: Any) -> Any:
        self.memory.room = lambda: ROOM if plan == "all" else -ROOM
        losses_S = forward(self, **row)
        seen.append(self.memory.reckoned)
        return losses_S

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedVLM, "forward", watched)
        train(words(model, registry, out))
    return max(seen)


@pytest.mark.parametrize("rows_are_cut", [False, True])
def test_layers_keep_less_before_rows_are_cut(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str], rows_are_cut: bool
) -> None:
    registry = write_data(tmp_path)
    most = peaks(tiny(), registry, tmp_path / "whole", "all")
    least = peaks(tiny(), registry, tmp_path / "low", "low")
    assert least < 0.7 * most
    capsys.readouterr()
    fault("mistaken_room", room=ROOM, holds=0.8 * least if rows_are_cut else (least + most) / 2)
    train(words(tiny(), registry, tmp_path / "small"))
    same_run(tmp_path / "whole", tmp_path / "small")
    assert ledger(tmp_path / "small") == []
    said = capsys.readouterr().out
    assert "out of memory in step 1: a row of " in said
    assert "; layers keep less of a row, as if 0.99" in said  # of 1 GiB, all but what the row took
    assert ("rows now hold at most" in said) == rows_are_cut
    assert said.index("layers keep less") < said.find("rows now hold", 0) or not rows_are_cut
    # Learnt once: a row is tried a few times at most, and later ones fit from the start.
    assert said.count("out of memory in step") < 12
    assert "out of memory in step 5" not in said
    budget = json.loads((tmp_path / "small/checkpoints/step-000005/state.json").read_text())["budget"]
    assert budget["short"] > 0
    assert bool(budget["tokens"]) == rows_are_cut
    # A resume knows it.
    fault("mistaken_room", room=ROOM, holds=0.8 * least if rows_are_cut else (least + most) / 2)
    train(words(tiny(), registry, tmp_path / "small", max_steps=6, resume_from_checkpoint="latest"))
    assert "out of memory" not in capsys.readouterr().out


def test_layers_keep_less_of_rows_that_the_probe_tries(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would otherwise cut every step's rows, or leave samples out, for what layers could have dropped."""
    registry = write_data(tmp_path)
    most, least = (peaks(tiny(), registry, tmp_path / name, name) for name in ("all", "low"))
    capsys.readouterr()
    fault("mistaken_room", room=ROOM, holds=(least + most) / 2)
    train(words(tiny(), registry, tmp_path / "small", skip_probe="false"))
    said = capsys.readouterr().out
    assert "did not fit" in said
    assert said.index("layers keep less of a row") < said.index("ran forward and backward") < said.index("step 1/")
    assert "rows now hold at most" not in said
    assert ledger(tmp_path / "small") == []
    same_run(tmp_path / "all", tmp_path / "small")


def test_all_ranks_keep_less_when_one_runs_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    most = peaks(tiny(), registry, tmp_path / "whole", "all")
    two = words(tiny(), registry, tmp_path / "two", per_device_train_batch_size=2)
    done = start(two, fault={"kind": "mistaken_room", "room": ROOM, "holds": most / 4, "rank": 1}, processes=2)
    assert json.loads((tmp_path / "two/run_card.json").read_text())["world_size"] == 2
    assert "layers keep less of a row" in done.stdout
    assert json.loads((tmp_path / "two/checkpoints/step-000005/state.json").read_text())["budget"]["short"] > 0
    same_run(tmp_path / "whole", tmp_path / "two")


def test_a_sample_that_does_not_fit_alone_goes_to_the_ledger(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any
) -> None:
    registry = write_data(tmp_path)
    fault("small_memory", tokens=85)
    train(words(tiny(), registry, tmp_path / "out", max_bad_fraction=0.5, epochs=2, max_steps=None))
    lines = ledger(tmp_path / "out")
    assert lines
    assert {line["reason"] for line in lines} == {"out_of_memory"}
    # Each is told once and left out of the second epoch too.
    assert len({line["id"] for line in lines}) == len(lines)
    used = sum(line["samples"] for line in metrics(tmp_path / "out"))
    assert used == 2 * (24 - len(lines))


def test_too_many_such_samples_end_the_run(tiny: Callable[..., Path], tmp_path: Path, fault: Any) -> None:
    fault("small_memory", tokens=30)
    with pytest.raises(DataError, match="out_of_memory"):
        train(words(tiny(), write_data(tmp_path), tmp_path / "out"))


def test_a_resume_after_it_is_bit_equal(tiny: Callable[..., Path], tmp_path: Path, fault: Any) -> None:
    registry = write_data(tmp_path)
    more = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    fault("small_memory", tokens=FITS_ALONE)
    train(words(tiny(), registry, tmp_path / "whole", **more))
    train(words(tiny(), registry, tmp_path / "cut", **more, max_steps=3))
    train(words(tiny(), registry, tmp_path / "cut", **more, resume_from_checkpoint="latest"))
    a, b = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


@pytest.mark.slow
def test_one_rank_of_two_runs_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    train(words(tiny(), registry, tmp_path / "whole"))
    two = words(tiny(), registry, tmp_path / "two", per_device_train_batch_size=2)
    small = {"kind": "small_memory", "tokens": FITS_ALONE, "rank": 1}
    done = start(two, fault=small, processes=2)
    assert json.loads((tmp_path / "two/run_card.json").read_text())["world_size"] == 2
    assert "out of memory in step" in done.stdout
    same_run(tmp_path / "whole", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_sharded_ranks_end_together_and_the_resume_cuts_smaller(
    tiny: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    registry = write_data(tmp_path)
    train(words(tiny(), registry, tmp_path / "whole"))
    two = words(tiny(), registry, tmp_path / "two", per_device_train_batch_size=2, deepspeed=layout, save_steps=1)
    small = {"kind": "small_memory", "tokens": FITS_ALONE, "rank": 1}
    resume = ["--resume_from_checkpoint", "latest"]
    for tries in range(6):  # noqa: B007  (asserted below)
        done = start(two + resume, fault=small, processes=2, check=False, limit=120)
        if done.returncode == 0:
            break
        # The launcher's report: each rank with the exit code of its own.
        assert f"exitcode  : {DeviceMemoryError.exit_code}" in done.stderr
        assert "did not fit into the memory" in done.stderr
        assert "torch.OutOfMemoryError" not in done.stderr
        assert json.loads((tmp_path / "two/budget.json").read_text())["tokens"]
    assert done.returncode == 0, done.stderr[-3000:]
    assert tries >= 1
    same_run(tmp_path / "whole", tmp_path / "two")


@pytest.mark.slow
def test_layers_of_sharded_ranks_keep_less_after_a_resume(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    most = peaks(tiny(), registry, tmp_path / "whole", "all")
    two = words(tiny(), registry, tmp_path / "two", per_device_train_batch_size=2, deepspeed="zero2", save_steps=1)
    two += ["--resume_from_checkpoint", "latest"]
    mistaken = {"kind": "mistaken_room", "room": ROOM, "holds": most / 4, "rank": 1}
    done = start(two, fault=mistaken, processes=2, check=False, limit=120)
    assert f"exitcode  : {DeviceMemoryError.exit_code}" in done.stderr
    assert "budget.json now has layers keep less of a row" in done.stderr
    found = json.loads((tmp_path / "two/budget.json").read_text())
    assert found["short"] > 0
    assert found["tokens"] is None
    for _ in range(8):
        if (done := start(two, fault=mistaken, processes=2, check=False, limit=120)).returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(tmp_path / "whole", tmp_path / "two")


def test_the_size_of_a_gpu_means_nothing_without_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--memory 40GiB is the size of a GPU, but this run is on the cpu; give all"):
        train(words(tiny(), write_data(tmp_path), tmp_path / "out", memory="40GiB"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", [torch.device("cuda", 0), torch.device("cuda")])
@pytest.mark.parametrize("size", [None, 12 * 10**9, 200 * 10**9])
def test_the_room_of_a_size(size: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of that size, whose allocator gives no more; of 80 GB, 20 are others'."""
    limits: list[float] = []
    facts = {"mem_get_info": (5e10, 8e10), "memory_reserved": 1e10, "memory_allocated": 4e9}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def limit(share: float, of: Any) -> None:
        assert torch.device(of).index == 0  # torch asks for one; a process alone on a machine has "cuda" as its device
        limits.append(share)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    room = room_on_gpu(device, lambda: 10**9, size)()
    if size == 12 * 10**9:
        assert room == pytest.approx(12e9 - CONTEXT - MARGIN * 12e9 - 5e9)
        assert limits == [pytest.approx((12e9 - CONTEXT) / 8e10)]
    else:
        assert room == pytest.approx(6e10 - MARGIN * 8e10 - 5e9)
        assert limits == []


def test_a_model_that_does_not_fit_at_all(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    def out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(torch.optim.AdamW, "step", out)
    with pytest.raises(DeviceMemoryError, match=r"does not fit into this device \(CUDA out of memory\)"):
        train(words(tiny(), write_data(tmp_path), tmp_path / "out"))
