"""Real engines with two processes on this CPU. What was set up is asserted: a test easily only seems to be one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import command, distance, final_weights, metrics, start, train, write_data

STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora_llm_full_vit": {"lora_dropout": 0.0},
    "partial_llm_full_vit": {},
}


def words(model: Path, registry: Path, out: Path, strategy: str, **more: Any) -> list[str]:
    # A rate of 1e-3 would show Adam's answer to round-off: k_proj's bias has no gradient but noise, and Adam takes a
    # full step on its sign.
    options = {"max_steps": 6, "learning_rate_llm": 1e-4, "mixed_precision": "no", "save_steps": 3} | more
    return command(model, registry, out, strategy, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_zero_on_two_processes_ends_with_the_weights_of_one(
    tiny: Callable[..., Path], tmp_path: Path, strategy: str, layout: str
) -> None:
    registry = write_data(tmp_path, 21)
    options = STRATEGIES[strategy]
    train(words(tiny(), registry, tmp_path / "one", strategy, **options))
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    out = tmp_path / layout
    start(words(tiny(), registry, out, strategy, deepspeed=layout, **cut, **options), processes=2)
    card = json.loads((out / "run_card.json").read_text())
    assert (card["world_size"], card["distributed_type"]) == (2, "DEEPSPEED")
    assert distance(final_weights(tmp_path / "one"), final_weights(out)) < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


MOVES = {
    "zero3 on two, then one process": ("zero3", 2, None, 1),
    "one process, then zero2 on two": (None, 1, "zero2", 2),
    "zero2 on two, then two copies": ("zero2", 2, None, 2),
}


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


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_quantised_weights_train_under_zero(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    registry = write_data(tmp_path, 21)
    options = {"lora_dropout": 0.0, "max_steps": 4}
    train(words(tiny(), registry, tmp_path / "one", "qlora", **options))
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    start(words(tiny(), registry, tmp_path / layout, "qlora", deepspeed=layout, **cut, **options), processes=2)
    assert distance(final_weights(tmp_path / "one"), final_weights(tmp_path / layout)) < 1e-5
