"""Real engines with two processes on this CPU. What was set up is asserted: a test easily only seems to be one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import pytest
from matrix import Case
from runs import CPU_ADAM, distance, final_weights, metrics, start, train, write_data


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
    [name if name == "ZeRO-3" else pytest.param(name, marks=pytest.mark.slow) for name in matrix.LAYOUTS],
)
def test_ranks_without_pictures_or_samples(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """Text alone on one rank, five pictures on another, nothing on two of three at an epoch's end: no hang."""
    gap = matrix.run_cell(tiny(), tmp_path, "full", layout, Case(3, 1, 1, mixed=True))
    assert gap < matrix.LIMIT
    assert [line["samples"] for line in metrics(tmp_path / f"{layout}-full-{Case(3, 1, 1, mixed=True).title}")] == [
        3, 3, 1, 3, 3, 1,
    ]  # fmt: skip


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
