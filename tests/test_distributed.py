"""Real engines with two processes on this CPU. What was set up is asserted: a test easily only seems to be one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matrix
import pytest
import torch
from matrix import Case
from runs import CPU_ADAM, distance, final_weights, metrics, start, train, write_data
from safetensors.torch import load_file

from vlft.engine import Engine
from vlft.engine.zero import ZeroEngine, sums_in_fp32


def words(model: Path, registry: Path, out: Path, strategy: str, **more: Any) -> list[str]:
    return matrix.words(model, registry, out, strategy, **({"save_steps": 3} | more))


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        (strategy, layout)
        if (strategy, layout) == ("lora_llm_full_vit", "ZeRO-3")
        else pytest.param(strategy, layout, marks=pytest.mark.slow)
        for strategy in ("full", "lora_llm_full_vit", "partial_llm_full_vit", "qlora")
        for layout in ("ZeRO-2", "ZeRO-3")
    ],
)
def test_two_processes_end_with_the_weights_of_one(
    tiny: Callable[..., Path], tmp_path: Path, strategy: str, layout: str
) -> None:
    """All cells, with DDP, FSDP2 and other accumulations: `make matrix`."""
    gap = matrix.run_cell(tiny(), tmp_path, strategy, layout, Case(2, 1, 2))
    assert gap < matrix.LIMIT


@pytest.mark.parametrize(
    "layout",
    [name if name == "DDP" else pytest.param(name, marks=pytest.mark.slow) for name in matrix.LAYOUTS],
)
def test_ranks_without_pictures_or_samples(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """Text alone on one rank, five pictures on another, nothing on two of three at an epoch's end: no hang."""
    gap = matrix.run_cell(tiny(), tmp_path, "full", layout, Case(3, 1, 1, mixed=True))
    assert gap < matrix.LIMIT
    assert [line["samples"] for line in metrics(tmp_path / f"{layout}-full-{Case(3, 1, 1, mixed=True).title}")] == [
        3, 3, 1, 3, 3, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["DDP", pytest.param("ZeRO-2", marks=pytest.mark.slow)])
def test_hosts_that_talk_to_each_other(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """In a group of their own, as those of GPUs on one machine do."""
    registry, batch = write_data(tmp_path, 12), {"per_device_train_batch_size": 2}
    start(matrix.words(tiny(), registry, tmp_path / "one", "full", per_device_train_batch_size=4))
    line = matrix.words(tiny(), registry, tmp_path / "two", "full", **batch, deepspeed={"ZeRO-2": "zero2"}.get(layout))
    start(line, processes=2, fault={"kind": "hosts"})
    assert distance(final_weights(tmp_path / "one"), final_weights(tmp_path / "two")) < matrix.LIMIT
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_first_step_in_bf16_is_the_same_under_every_layout(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """To the bit: on the same samples in the same rows nothing is rounded otherwise. What a model had worked out was,
    under ZeRO-3 with transformers 5.17, which the fp32 of the other tests does not show."""
    registry, losses = write_data(tmp_path, 12), {}
    for layout in (None, "zero2", "zero3"):
        out = tmp_path / str(layout)
        line = matrix.words(tiny(dtype="bfloat16"), registry, out, "lora_llm_full_vit", mixed_precision="bf16",
                            per_device_train_batch_size=2, max_steps=1, deepspeed=layout)  # fmt: skip
        said = start(line, processes=2).stderr
        losses[layout] = [step["loss"] for step in metrics(out)]
        # DeepSpeed calls what newer PyTorch deprecates: five hundred lines of it, in which vlft's own were lost.
        assert "FutureWarning" not in said
    assert losses["zero2"] == losses["zero3"] == losses[None]


@pytest.mark.parametrize(
    ("stage", "types", "bf16", "fp32"),
    [
        (2, None, True, True), (3, {}, True, True), (3, {"buffer_dtype": "fp32"}, True, True),
        (1, None, True, False),  # would be another optimizer of DeepSpeed's
        (3, None, False, False),  # fp16, or fp32 throughout, where there is nothing to choose
        (3, {"grad_accum_dtype": "bf16"}, True, False), (2, {"grad_accum_dtype": "fp32"}, False, True),
    ],
)  # fmt: skip
def test_who_says_in_what_gradients_add_up(stage: int, types: dict[str, str] | None, bf16: bool, fp32: bool) -> None:
    config = {"zero_optimization": {"stage": stage}} | ({} if types is None else {"data_types": types})
    assert sums_in_fp32(config, bf16=bf16) == fp32


@pytest.mark.parametrize(("stage", "offload", "pending"), [(2, False, 12 * 4), (2, True, 0), (3, False, 0)])
def test_room_for_zero2s_gradients_is_left(stage: int, offload: bool, pending: int) -> None:
    """It is made when the first ones come, which is while layers hold the most."""
    engine = ZeroEngine.__new__(ZeroEngine)
    engine.stage = stage
    engine.zero = SimpleNamespace(
        cpu_offload=offload, partition_size=[10, 5, 2], averaged_gradients={0: None, 1: ["there"]},
        gradient_accumulation_dtype=torch.float32,
    )  # fmt: skip
    assert engine._pending_gradients() == pending


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_gradients_of_many_rows_add_up_in_fp32(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """DeepSpeed's sum of 32 rows was in bf16, and 0.6% off."""
    registry, model = write_data(tmp_path, 32), tiny(dtype="bfloat16")
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32, "max_steps": 1, "max_grad_norm": 0}
    for out, how in (("whole", None), ("cut", layout)):
        start(matrix.words(model, registry, tmp_path / out, "full", mixed_precision="bf16", deepspeed=how, **rows))
    whole, cut = (
        {
            name: value
            for file in (tmp_path / out).glob("checkpoints/step-*/*.safetensors")
            for name, value in load_file(file).items()
            if name.startswith("exp_avg/")
        }
        for out in ("whole", "cut")
    )
    assert len(whole) > 50
    assert distance(whole, cut) < 1e-3


MOVES = {
    "zero3 on two, then one process": ("zero3", 2, None, 1),
    "one process, then zero2 on two": (None, 1, "zero2", 2),
    "zero2 on two, then two copies": ("zero2", 2, None, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_under_another_layout(tiny: Callable[..., Path], tmp_path: Path, move: str) -> None:
    """Checkpoints hold whole tensors by name: what wrote them does not matter to what reads them."""
    registry = write_data(tmp_path, 21)
    common = {"lr_scheduler_type": "constant", "warmup_steps": 0}

    def go(out: str, layout: str | None, processes: int, **more: Any) -> None:
        cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // processes}
        line = words(tiny(), registry, tmp_path / out, "full", deepspeed=layout, **cut, **common, **more)
        if layout is None and processes == 1:
            train(line)
        else:
            start(line, processes=processes)

    first, one, second, two = MOVES[move]
    go("whole", None, 1)
    go("moved", first, one, max_steps=3)
    go("moved", second, two, resume_from_checkpoint="latest")
    assert distance(final_weights(tmp_path / "whole"), final_weights(tmp_path / "moved")) < 1e-5
    pairs = list(zip(metrics(tmp_path / "whole"), metrics(tmp_path / "moved"), strict=True))
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in pairs)
    assert all(a["supervised_tokens"] == b["supervised_tokens"] for a, b in pairs)
    assert len(pairs) == 6


@pytest.mark.slow
@pytest.mark.skipif(
    not CPU_ADAM,
    reason="DeepSpeed compiles its CPU Adam at first use, for minutes",
)
def test_a_resume_with_offload_has_adams_states(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Under offload another optimizer steps than the one that was prepared: its states are what a checkpoint holds."""
    registry = write_data(tmp_path, 21)
    common = {"lr_scheduler_type": "constant", "warmup_steps": 0, "per_device_train_batch_size": 4}
    train(words(tiny(), registry, tmp_path / "whole", "full", **common))
    for more in ({"max_steps": 3}, {"resume_from_checkpoint": "latest"}):
        start(words(tiny(), registry, tmp_path / "cut", "full", deepspeed="zero3_offload", **(common | more)))
    assert distance(final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")) < 1e-5


def test_a_machine_with_other_data_is_told(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its rank would number the samples otherwise, train some twice and others never, and nobody would see it."""
    registry = write_data(tmp_path / "one", 16)
    write_data(tmp_path / "other", 16)
    lines = (tmp_path / "other/toy.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other/toy.jsonl").write_text("".join(lines[:2] + lines[3:]))
    fault = {"kind": "other_data", "rank": 1, "registry": str(tmp_path / "other/registry.json")}
    line = words(tiny(), registry, tmp_path / "out", "lora", max_steps=2)
    done = start(line, processes=2, check=False, fault=fault)
    assert done.returncode
    assert "finds the data to be other than process 0" in done.stdout + done.stderr
    assert not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.slow
def test_what_the_main_process_does_alone_may_take_longer_than_a_collective(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """An index, a script that scores answers, the writing of a large result: NCCL gives up after ten minutes."""
    registry = write_data(tmp_path, 16)
    line = words(tiny(), registry, tmp_path / "out", "lora", max_steps=1, save_steps=1)
    done = start(line, processes=2, fault={"kind": "slow_main", "rank": "all", "seconds": 12, "patience": 6})
    assert len(metrics(tmp_path / "out")) == 1
    # A wait in the store that times out is told by PyTorch in two lines, on every waiting process, again and again.
    assert "waitForInput" not in done.stderr


def test_accelerates_variable_divides_no_gradient(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = write_data(tmp_path, 16)
    train(words(tiny(), registry, tmp_path / "one", "lora", max_steps=2))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    train(words(tiny(), registry, tmp_path / "two", "lora", max_steps=2))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


def test_a_loss_scale_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 (which needs a GPU to run): it grows and falls at the same steps as without the stop, under any engine."""
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)  # who logs an overflow

    def zero() -> ZeroEngine:
        engine = ZeroEngine.__new__(ZeroEngine)
        scaler = loss_scaler.DynamicLossScaler(2.0**16, 5, 1.0, 2, consecutive_hysteresis=False)
        engine.precision, engine.zero = "fp16", SimpleNamespace(loss_scaler=scaler)
        return engine

    def go(engine: ZeroEngine, overflows: str) -> list[float]:
        scales = []
        for what in overflows:
            engine.zero.loss_scaler.update_scale(what == "x")
            scales.append(engine.zero.loss_scaler.cur_scale)
        return scales

    past, future = "...x..x.x....", "..x......x.......x......"
    one, two = zero(), zero()
    go(one, past)
    two.restore_scaler(json.loads(json.dumps(one.scaler_state())))
    assert go(one, future) == go(two, future)

    plain = Engine("no", 1.0)
    plain.accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=5)
    plain.restore_scaler(one.scaler_state())
    assert plain.scaler_state()["scale"] == one.scaler_state()["scale"]
    two.restore_scaler(plain.scaler_state())
    assert two.zero.loss_scaler.cur_scale == one.zero.loss_scaler.cur_scale
