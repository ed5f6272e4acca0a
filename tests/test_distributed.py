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
