"""The loss and the final weights do not depend on how a batch was cut, nor on the number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import command, distance, final_weights, metrics, start, train, write_data

CUTS = [(4, 1), (2, 2), (1, 4)]
LIMITS = {"float32": 1e-5, "float64": 1e-9}


def options(cut: tuple[int, int], **more: Any) -> dict[str, Any]:
    batch, accumulation = cut
    # 22 samples make the last step of each epoch a short one.
    return {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 8,
        "epochs": 2, "learning_rate_llm": 1e-3, "mixed_precision": "no", **more,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("strategy", "more"), [("full", {}), ("lora_llm_full_vit", {"lora_dropout": 0.0})])
def test_cuts_of_a_batch_end_with_equal_weights(
    tiny: Callable[..., Path], tmp_path: Path, dtype: str, strategy: str, more: dict[str, Any]
) -> None:
    registry = write_data(tmp_path, 22)
    for cut in CUTS:
        words = command(tiny(dtype=dtype), registry, tmp_path / f"{cut}", strategy, **options(cut, **more))
        train(words)
    first = tmp_path / f"{CUTS[0]}"
    for cut in CUTS[1:]:
        other = tmp_path / f"{cut}"
        assert distance(final_weights(first), final_weights(other)) < LIMITS[dtype]
        pairs = zip(metrics(first), metrics(other), strict=True)
        assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in pairs)
        assert [m["supervised_tokens"] for m in metrics(first)] == [m["supervised_tokens"] for m in metrics(other)]


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen2_5_vl", "float64"), pytest.param("qwen3_vl", "float32", marks=pytest.mark.slow)]
)
def test_two_processes_end_with_the_weights_of_one(
    tiny: Callable[..., Path], tmp_path: Path, dtype: str, family: str
) -> None:
    """21 samples in steps of 4: the last step of an epoch has one, so one of the two ranks has none."""
    registry = write_data(tmp_path, 21)
    model = tiny(family, dtype=dtype)
    train(command(model, registry, tmp_path / "one", "full", **options((4, 1))))
    start(command(model, registry, tmp_path / "two", "full", **options((1, 2))), processes=2)
    card = json.loads((tmp_path / "two" / "run_card.json").read_text())
    assert (card["world_size"], card["distributed_type"]) == (2, "MULTI_CPU")
    assert distance(final_weights(tmp_path / "one"), final_weights(tmp_path / "two")) < LIMITS[dtype]
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert {k: a[k] for k in ("tokens", "supervised_tokens", "samples", "images")} == {
            k: b[k] for k in ("tokens", "supervised_tokens", "samples", "images")
        }
