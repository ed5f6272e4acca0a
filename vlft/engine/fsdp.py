"""FSDP2 through Accelerate (Zhao et al. 2023; PyTorch's `fully_shard`): weights, gradients and states sharded."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from vlft.engine.base import Engine
from vlft.errors import ConfigError


class FsdpEngine(Engine):
    """Not wired yet: refused, never replaced by something else in silence."""

    def _accelerator(self) -> Accelerator:
        if not torch.cuda.is_available():
            # Accelerate ignores its FSDP plugin there and runs DistributedDataParallel instead.
            raise ConfigError(
                "FSDP2 needs a GPU: Accelerate ignores it on the CPU; use --deepspeed zero3, or no sharding."
            )
        raise ConfigError("FSDP2 is not supported yet; use --deepspeed zero3.")
