"""A loss or gradient that is not finite costs its step, on all ranks, and nothing else; too many end the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, distance, final_weights, ledger, metrics, start, train, write_data

from vlft.engine.base import Engine, Update
from vlft.errors import TrainingError


def words(model: Path, registry: Path, out: Path, **more: Any) -> list[str]:
    options = {"max_steps": 5, "learning_rate_llm": 1e-4, "mixed_precision": "no", "save_steps": 1} | more
    return command(model, registry, out, "full", **options)


def weights_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    from vlft.checkpoint import load_tensors

    return dict(load_tensors(out / f"checkpoints/step-{step:06d}", "weights"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_step_is_skipped(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    fault("not_finite", rows=[2], what=what)
    train(words(tiny(), write_data(tmp_path), out, save_total_limit=5))
    lines = metrics(out)
    assert [line["skipped"] for line in lines] == [None, None, "not_finite", None, None]
    assert (lines[2]["loss"] is None) == (what == "loss")
    assert lines[2]["grad_norm"] is None
    two, three, four = (weights_of(out, n) for n in (2, 3, 4))
    assert all(torch.equal(two[n], three[n]) for n in two)
    assert any(not torch.equal(three[n], four[n]) for n in two)
    told = ledger(out)
    # Of a loss it is known whose it is, of a gradient only in which step.
    assert len(told) == (1 if what == "loss" else 4)
    assert {(line["reason"], line["step"]) for line in told} == {("not_finite", 3)}
    assert "skipped step 3" in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run(tiny: Callable[..., Path], tmp_path: Path, fault: Any) -> None:
    out = tmp_path / "out"
    fault("not_finite", rows=[1, 3, 4, 5])
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train(words(tiny(), write_data(tmp_path), out, max_steps=9, max_skipped_steps=3))
    assert len(metrics(out)) == 5


def test_a_resume_counts_on(tiny: Callable[..., Path], tmp_path: Path, fault: Any) -> None:
    out = tmp_path / "out"
    registry = write_data(tmp_path)
    fault("not_finite", rows=[1, 2, 3])
    train(words(tiny(), registry, out, max_steps=3, max_skipped_steps=3, lr_scheduler_type="constant", warmup_steps=0))
    fault("not_finite", rows=[0])
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train(
            words(
                tiny(), registry, out, max_skipped_steps=3, lr_scheduler_type="constant", warmup_steps=0,
                resume_from_checkpoint="latest",
            )
        )  # fmt: skip


@pytest.mark.parametrize("layout", [None, "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_all_ranks_skip_it(tiny: Callable[..., Path], tmp_path: Path, layout: str | None, precision: str) -> None:
    """One rank's loss is infinite; under every engine the step is skipped everywhere and the run goes on."""
    out = tmp_path / "out"
    spoilt = {"kind": "not_finite", "rows": [1], "rank": 1}
    two = {"per_device_train_batch_size": 2, "deepspeed": layout, "max_steps": 4, "mixed_precision": precision}
    start(words(tiny(), write_data(tmp_path), out, **two, save_total_limit=9), processes=2, fault=spoilt)
    card = json.loads((out / "run_card.json").read_text())
    assert (card["world_size"], card["distributed_type"]) == (2, "DEEPSPEED" if layout else "MULTI_CPU")
    assert [line["skipped"] for line in metrics(out)] == [None, "not_finite", None, None]
    one, two_, three = (weights_of(out, n) for n in (1, 2, 3))
    assert all(torch.equal(one[n], two_[n]) for n in one)
    assert distance(two_, three) > 0
    assert all(bool(t.isfinite().all()) for t in final_weights(out).values())
    assert [line["step"] for line in ledger(out)] == [2]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("scale", "is_scaling"), [(65536.0, True), (1.0, False)])
def test_a_loss_scale_that_is_too_high_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, fused: bool, scale: float, is_scaling: bool
) -> None:
    """fp16 finds its scale by overflowing; only at a scale of one does an overflow mean something.

    A fused optimizer's step is called all the same and leaves the weights alone by itself, which Accelerate takes for
    a step that was made.
    """
    engine = Engine("no", 1.0)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [p], "part": "llm"}], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(engine.accelerator, "scaler", scaler)
    engine.prepare(torch.nn.ParameterList([p]), optimizer)
    monkeypatch.setattr(engine.accelerator, "unscale_gradients", lambda: scaler.unscale_(optimizer))

    def step(gradient: float) -> Update:
        scaler.scale(torch.zeros(()))  # as a backward does, which makes the scale
        p.grad = torch.tensor([gradient, 1.0])
        return engine.update()

    update = step(float("inf"))
    assert (update.applied, update.scaling) == (False, is_scaling)
    assert p.detach().tolist() == [1.0, 1.0]
    assert step(1.0).applied
    assert p.detach().tolist() != [1.0, 1.0]
