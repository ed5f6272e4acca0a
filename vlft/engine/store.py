"""The store through which the processes of a run found each other: to tell and to ask without a collective."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

SHORTEST, LONGEST = 0.001, 0.1
"""Seconds between two questions."""


def common_store() -> Any:
    """Once the processes are connected."""
    return torch.distributed.distributed_c10d._get_default_store()


def this_attempts(key: str) -> str:
    """A restart by torchrun finds the store of the attempt before, with all that was written there."""
    return f"vlft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{key}"


def wait_until_told(key: str) -> None:
    """Until somebody has set `key`, however long that takes.

    It is asked for again and again: the store's own wait has a limit, and where that ends, PyTorch writes two lines
    into the terminal, on every process that waits; and while it lasts, no other thread of the process can ask anything.
    """
    store, pause = common_store(), SHORTEST
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, LONGEST)
