"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(family, **options) -> folder of a tiny checkpoint, made once a session."""
    from vlft.testing.tiny import make_checkpoint

    made: dict[tuple[object, ...], Path] = {}

    def get(family: str = "qwen2_5_vl", **options: object) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = make_checkpoint(family, tmp_path_factory.mktemp(family), **options)  # type: ignore[arg-type]
        return made[key]

    return get
