"""The store through which the processes of a run found each other: to tell and to ask without a collective."""

from __future__ import annotations

import os
from typing import Any

import torch


def common_store() -> Any:
    """Once the processes are connected."""
    return torch.distributed.distributed_c10d._get_default_store()


def this_attempts(key: str) -> str:
    """A restart by torchrun finds the store of the attempt before, with all that was written there."""
    return f"vlft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{key}"
