"""How a run uses its devices and processes: plain (one process, or one copy of the model on each), ZeRO, FSDP.

`start_engine` chooses; the rest of vlft sees one `Engine`: ranks, sums, backward, update, and whole tensors by name
wherever their shards lie. Only this package knows Accelerate and DeepSpeed.
"""

from __future__ import annotations

import os
from pathlib import Path

from vlft.allocator import prepare_allocator
from vlft.engine.base import Engine, Update, choose_precision, seed_row, seed_start
from vlft.engine.garbage import settled
from vlft.engine.readback import readback

__all__ = ["Engine", "Update", "choose_precision", "readback", "seed_row", "seed_start", "settled", "start_engine"]


def start_engine(mixed_precision: str | None, deepspeed: Path | None = None, max_grad_norm: float = 1.0) -> Engine:
    """The engine that the options and the launcher's environment ask for.

    Args:
        mixed_precision: "no", "bf16", "fp16", or None for what the device has.
        deepspeed: DeepSpeed configuration file.
        max_grad_norm: clipping; 0 never clips.
    Raises:
        ConfigError: an engine that cannot run here, with the reason.
    """
    prepare_allocator()  # for a program of its own that calls vlft.train.main
    if deepspeed is None and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from vlft.engine.zero import config_of_launcher

        deepspeed = config_of_launcher()
    if deepspeed is not None:
        from vlft.engine.zero import ZeroEngine

        return ZeroEngine(mixed_precision, deepspeed, max_grad_norm)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        from vlft.engine.fsdp import FsdpEngine

        return FsdpEngine(mixed_precision, max_grad_norm)
    return Engine(mixed_precision, max_grad_norm)
