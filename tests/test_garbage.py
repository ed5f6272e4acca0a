"""What was there before a run's first step is not searched for garbage during it, and is again after."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import command, train, write_data

from vlft import train as story


def test_a_run_is_settled_and_leaves_python_as_it_was(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, real = list[int](), story.train_step

    def step(*given: Any) -> dict[str, Any]:
        frozen.append(gc.get_freeze_count())
        return real(*given)

    monkeypatch.setattr(story, "train_step", step)
    before = gc.get_freeze_count()
    train(command(tiny(), write_data(tmp_path), tmp_path / "out", "full", max_steps=2))
    assert min(frozen) > before + 100_000
    assert gc.get_freeze_count() == 0  # Python thaws all or nothing
