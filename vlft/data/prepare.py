"""The whole data side of a run behind one object: registry, index, fit, split, plan, loaders, ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlft.family import Family


@dataclass(frozen=True)
class DataOptions:
    """What the data side needs of a run's options; units as in vlft.config."""

    registry: Path
    names: Sequence[str] | None
    folder: Path
    """The checkpoint's folder: tokenizer and chat template."""
    family: Family
    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    max_seq_length: int
    on_too_long: Literal["shrink", "drop", "error"]
    train_split_ratio: float
    max_bad_fraction: float
    allow_remote_images: bool
    cache_dir: Path
    seed: int
    global_batch: int
    train_batch_size: int
    """Samples of one forward on one rank."""
    eval_batch_size: int
    rows_per_rank: int
    """Forwards of one optimizer step on one rank."""
    rank: int
    world_size: int
    num_workers: int
    progress: bool
