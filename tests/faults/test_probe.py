"""The largest rows are run once before training. Nothing of the run may show it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import CPU_ADAM, FSDP_ON_CPU, command, distance, final_weights, ledger, metrics, start, train, write_data

from vlft.data.largest import LOOKED, largest_rows
from vlft.data.plan import Plan, place
from vlft.errors import DeviceMemoryError
from vlft.models.forward import PackedVLM

LINE = re.compile(r"probe: .* tokens, .* patches of step \d+.* ran forward and backward in .* s; peak .* GiB")


def words(model: Path, registry: Path, out: Path, strategy: str = "lora_llm_full_vit", **more: Any) -> list[str]:
    options = {"learning_rate_llm": 1e-3, "mixed_precision": "no", "save_steps": 2, "skip_probe": "false"} | more
    if strategy == "lora_llm_full_vit":
        options = {"lora_dropout": 0.2} | options
    return command(model, registry, out, strategy, **options)


def files(out: Path) -> dict[str, bytes]:
    """What a run leaves of its course: all tensors of its checkpoints, bit for bit."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted((out / "checkpoints").rglob("*.safetensors"))}


def same_course(a: Path, b: Path) -> None:
    assert files(a) == files(b)
    assert files(a)
    assert metrics(a) == metrics(b)
    assert ledger(a) == ledger(b)


def test_a_run_with_it_is_bit_equal(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With dropout, so that generators matter, two forwards a step, workers, an evaluation before the first step."""
    registry = write_data(tmp_path)
    more = {
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_workers": 1, "train_split_ratio": 0.7,
        "eval_on_start": True, "use_data_augmentation": True,
    }  # fmt: skip
    train(words(tiny(), registry, tmp_path / "without", **more, skip_probe=True))
    assert "probe:" not in capsys.readouterr().out
    train(words(tiny(), registry, tmp_path / "with", **more))
    said = capsys.readouterr().out
    assert len(LINE.findall(said)) == 1
    assert said.index("probe:") < said.index("step 1")
    same_course(tmp_path / "without", tmp_path / "with")


def test_generators_and_buffers_are_as_before(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    """What a strategy of a third party may draw from, or count in."""
    import random

    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002

    from vlft import probe

    real, seen = probe.try_largest, []

    def watched(job: Any) -> None:
        job.packed.register_buffer("count", torch.zeros(1), persistent=False)
        forward = PackedVLM.forward

        def drawing(self: Any, **row: Any) -> Any:
            self.count += 1
            torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
            return forward(self, **row)

        monkeypatch.setattr(PackedVLM, "forward", drawing)
        before = state()
        real(job)
        monkeypatch.setattr(PackedVLM, "forward", forward)
        seen.append(before == state() and float(job.packed.count) == 0)
        assert all(p.grad is None for p in job.packed.parameters())
        assert not job.optimizer.state

    monkeypatch.setattr(probe, "try_largest", watched)
    train(words(tiny(), write_data(tmp_path), tmp_path / "out", max_steps=1))
    assert seen == [True]


def test_a_resume_stays_exact_and_has_its_own(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = write_data(tmp_path)
    more = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    train(words(tiny(), registry, tmp_path / "whole", **more, skip_probe=True))
    train(words(tiny(), registry, tmp_path / "cut", **more, max_steps=2))
    capsys.readouterr()
    train(words(tiny(), registry, tmp_path / "cut", **more, resume_from_checkpoint="latest"))
    assert len(LINE.findall(capsys.readouterr().out)) == 1
    same_course(tmp_path / "whole", tmp_path / "cut")


def test_a_cpu_has_none_unless_it_is_asked_for(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(words(tiny(), write_data(tmp_path), tmp_path / "out", skip_probe=None, max_steps=1))
    assert "probe:" not in capsys.readouterr().out


def test_what_runs_is_the_largest_row(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Larger than every row that the epoch then has, once by tokens and once by patches."""
    forward, seen = PackedVLM.forward, []

    def watching(self: Any, **row: Any) -> Any:
        pixels = row["pixel_values"]
        seen.append((row["input_ids_T"].shape[1], 0 if pixels is None else len(pixels)))
        return forward(self, **row)

    monkeypatch.setattr(PackedVLM, "forward", watching)
    registry = write_data(tmp_path, 24)
    more = {"max_steps": None, "epochs": 1, "per_device_train_batch_size": 2, "save_steps": 100}
    train(words(tiny(), registry, tmp_path / "out", **more, skip_probe=True))
    rows = seen.copy()
    seen.clear()
    train(words(tiny(), registry, tmp_path / "probed", **more))
    tried = seen[: len(seen) - len(rows)]
    assert 1 <= len(tried) <= 2
    assert max(tokens for tokens, _ in tried) == max(tokens for tokens, _ in rows)
    assert max(patches for _, patches in tried) == max(patches for _, patches in rows)
    assert set(tried) <= set(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Memory that is too small


def test_rows_that_do_not_fit_are_cut_before_the_first_step(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = write_data(tmp_path)
    train(words(tiny(), registry, tmp_path / "whole", "full", skip_probe=True))
    fault("small_memory", tokens=110)
    train(words(tiny(), registry, tmp_path / "small", "full"))
    said = capsys.readouterr().out
    assert "did not fit" in said
    assert said.rindex("out of memory in step 1") < said.rindex("probe: ") < said.rindex("step 1/4")
    assert "out of memory" not in said[said.rindex("step 1/4") :]
    assert distance(final_weights(tmp_path / "whole"), final_weights(tmp_path / "small")) < 1e-5
    state = json.loads((tmp_path / "small/checkpoints/step-000002/state.json").read_text())
    assert 0 < state["budget"]["tokens"] < 300
    assert ledger(tmp_path / "small") == []


def test_a_sample_that_does_not_fit_alone_is_told_once_also_after_a_resume(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any
) -> None:
    """Of whatever step it is: a resume from an earlier one cuts the ledger back to that."""
    registry = write_data(tmp_path)
    fault("small_memory", tokens=85)
    more = {"max_bad_fraction": 0.5, "max_steps": 6, "save_steps": 1, "save_total_limit": 9}
    train(words(tiny(), registry, tmp_path / "without", "full", **more, skip_probe=True))
    train(words(tiny(), registry, tmp_path / "out", "full", **more))
    told = ledger(tmp_path / "out")
    assert {line["id"] for line in told} == {line["id"] for line in ledger(tmp_path / "without")}
    assert {(line["reason"], line["step"]) for line in told} == {("out_of_memory", 1)}
    assert len({line["id"] for line in told}) == len(told)
    weights = final_weights(tmp_path / "out")
    early = tmp_path / "out/checkpoints/step-000001"
    train(words(tiny(), registry, tmp_path / "out", "full", **more, resume_from_checkpoint=early))
    assert ledger(tmp_path / "out") == told
    assert distance(weights, final_weights(tmp_path / "out")) == 0


def test_many_samples_that_do_not_fit_cost_no_endless_start(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlft.probe.TRIES", 2)
    fault("small_memory", tokens=85)
    train(words(tiny(), write_data(tmp_path), tmp_path / "out", "full", max_bad_fraction=0.5, max_steps=6))
    assert "probe: stopped after 2 rows that did not fit" in capsys.readouterr().out
    assert ledger(tmp_path / "out")


def test_states_that_come_later_are_reckoned_with(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Before the first update there are no optimizer states: a row that fits then may not fit in step 2."""
    from vlft.engine import Engine

    held: list[int] = []
    real = Engine._hold

    def hold(self: Engine, size: int) -> Any:
        held.append(size)
        return real(self, size)

    monkeypatch.setattr(Engine, "_hold", hold)
    registry = write_data(tmp_path)
    train(words(tiny(), registry, tmp_path / "out", "full", max_steps=2))
    trained = sum(t.numel() for t in final_weights(tmp_path / "out").values())
    assert held == [8 * trained]
    train(words(tiny(), registry, tmp_path / "out", "full", max_steps=3, resume_from_checkpoint="latest"))
    assert held[1:] == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.slow
def test_two_processes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    for name, skip in (("without", "true"), ("with", "false")):
        done = start(
            words(tiny(), registry, tmp_path / name, per_device_train_batch_size=2, skip_probe=skip), processes=2
        )
        assert len(LINE.findall(done.stdout)) == (name == "with")
    same_course(tmp_path / "without", tmp_path / "with")


@pytest.mark.slow
def test_one_rank_of_two_has_too_little(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    train(words(tiny(), registry, tmp_path / "whole", "full", skip_probe=True))
    small = {"kind": "small_memory", "tokens": 110, "rank": 1}
    two = words(tiny(), registry, tmp_path / "two", "full", per_device_train_batch_size=2)
    done = start(two, processes=2, fault=small)
    assert "out of memory in step 1" in done.stdout
    assert distance(final_weights(tmp_path / "whole"), final_weights(tmp_path / "two")) < 1e-5


LAYOUTS = ["zero2", "zero3", *(["zero3_offload"] if CPU_ADAM else [])]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    registry = write_data(tmp_path)
    more = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "deepspeed": layout}
    for name, skip in (("without", "true"), ("with", "false")):
        done = start(words(tiny(), registry, tmp_path / name, **more, skip_probe=skip), processes=2)
        assert len(LINE.findall(done.stdout)) == (name == "with")
    same_course(tmp_path / "without", tmp_path / "with")


@pytest.mark.slow
def test_fsdp(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    for name, skip in (("without", "true"), ("with", "false")):
        line = words(tiny(), registry, tmp_path / name, "full", per_device_train_batch_size=2, skip_probe=skip)
        start(line, processes=2, **FSDP_ON_CPU)
    same_course(tmp_path / "without", tmp_path / "with")


@pytest.mark.slow
def test_sharded_ranks_end_before_the_first_step_and_the_resume_goes_on(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    registry = write_data(tmp_path)
    two = words(tiny(), registry, tmp_path / "two", "full", per_device_train_batch_size=2, deepspeed="zero2")
    small = {"kind": "small_memory", "tokens": 110, "rank": 1}
    done = start(two, processes=2, fault=small, check=False, limit=120)
    assert f"exitcode  : {DeviceMemoryError.exit_code}" in done.stderr
    assert "did not fit into the memory" in done.stderr
    assert not (tmp_path / "two/metrics.jsonl").exists() or not metrics(tmp_path / "two")
    assert json.loads((tmp_path / "two/budget.json").read_text())["tokens"]


# ---------------------------------------------------------------------------------------------------------------------
# Which rows are the largest


def rows_of(plan: Plan, length: Any, patches: Any, cost: Any, steps: range, **how: Any) -> list[tuple[int, int]]:
    found = []
    for step in steps:
        ids = plan.members(*plan.locate(step))
        for rank in place(length[ids], patches[ids], cost[ids], **how):
            found += [(int(length[ids[row]].sum()), int(patches[ids[row]].sum())) for row in rank if row]
    return found


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_largest_of_many(ranks: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    length = rng.integers(50, 4000, 900)
    patches = rng.integers(0, 6000, 900) * (rng.random(900) < 0.7)
    plan = Plan(np.arange(900), np.zeros(900), [1.0], seed=1, global_batch=4 * ranks * rows)
    cost = length + 0.1 * patches
    how = {"ranks": ranks, "rows_per_rank": rows, "token_budget": 12000}
    steps = range(3, 3 + plan.steps_per_epoch)  # into the second epoch
    found = largest_rows(plan, length, patches, cost, steps, **how)
    every = rows_of(plan, length, patches, cost, steps, **how)
    assert max(row.tokens for row in found) == max(tokens for tokens, _ in every)
    assert max(row.patches for row in found) == max(patches for _, patches in every)
    assert all(row.step in steps for row in found)
    # Samples that are known not to fit are in no row.
    without = found[0].ids
    again = largest_rows(plan, length, patches, cost, steps, **how, without=without)
    assert not {*without} & {i for row in again for i in row.ids}


def test_a_long_epoch_is_looked_at_where_it_is_largest() -> None:
    rng = np.random.default_rng(0)
    n = 40 * LOOKED
    length = rng.integers(50, 400, n)
    length[n // 2] = 5000
    plan = Plan(np.arange(n), np.zeros(n), [1.0], seed=1, global_batch=8)
    found = largest_rows(plan, length, 0 * length, length, range(plan.steps_per_epoch), ranks=1)
    assert n // 2 in found[0].ids
    assert len(found) == 1
