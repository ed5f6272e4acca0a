"""The one file that knows Accelerate: devices, ranks, mixed precision, wrapping, backward, clipping, collectives.

The rest of vlft sees ranks and sums. Sharded engines (DeepSpeed, FSDP) join here.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from vlft.errors import ConfigError

T = TypeVar("T")


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def choose_precision(wanted: str | None) -> str:
    """`--mixed_precision`, or what the device has: bf16 on a GPU that computes in it, else none.

    Raises:
        ConfigError: fp16 without a GPU, or bf16 on a GPU that lacks it.
    """
    gpu = torch.cuda.is_available()
    if wanted is None:
        return "bf16" if gpu and torch.cuda.is_bf16_supported() else "no"
    if wanted == "fp16" and not gpu:
        raise ConfigError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    if wanted == "bf16" and gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError("--mixed_precision bf16 is not supported by this GPU; use fp16 or no.")
    return wanted


class Engine:
    """Accelerate, wired for packed rows: a loss is divided by the tokens of the whole step over all ranks."""

    def __init__(self, mixed_precision: str | None) -> None:
        if not _has_accelerator():
            # Without it Accelerate starts one process each and believes it is alone, in silence.
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        self.precision = choose_precision(mixed_precision)
        self.accelerator = Accelerator(mixed_precision=self.precision)
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self.kind: str = self.accelerator.distributed_type.value
        """What Accelerate really set up, not always what was meant: NO, MULTI_CPU, MULTI_GPU, DEEPSPEED, FSDP."""
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.world_size:
            raise ConfigError(
                f"the launcher started {asked} processes, but Accelerate counts {self.world_size}; "
                "launch with torchrun, or an accelerate config of type MULTI_GPU or MULTI_CPU."
            )

    def main_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the main process, then on the others (who find its result in the cache)."""
        with self.accelerator.main_process_first():
            return work()

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def from_main(self, value: T) -> T:
        """The main process's `value`, everywhere."""
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in fp64."""
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        total: Tensor = self.accelerator.reduce(torch.tensor(values, dtype=kind, device=self.device), "sum")
        return [float(v) for v in total.tolist()]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, on all ranks, in rank order."""
        return list(gather_object(list(items)))

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """Move and wrap the model; the optimizer steps through Accelerate for fp16's sake."""
        self.model: nn.Module
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._parameters = [p for g in optimizer.param_groups for p in g["params"]]
        return self.model

    def autocast(self) -> Any:
        """Mixed precision outside the wrapped forward."""
        return self.accelerator.autocast()

    def backward(self, losses_S: Tensor, divisor: float) -> None:
        """Add one row's share of the step's gradient."""
        # DDP averages over ranks, and the divisor already counts all of them.
        loss = losses_S.sum() * (self.world_size / divisor)
        self.accelerator.backward(loss)

    def row(self, *, last: bool) -> Any:
        """Context of one row's forward and backward: no gradient exchange before the last row."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def clip(self, max_norm: float) -> float:
        """Global gradient norm before clipping. `max_norm` 0 only measures."""
        norm = self.accelerator.clip_grad_norm_(self._parameters, max_norm or float("inf"))
        return float(norm)

    def update(self) -> bool:
        """One optimizer step; False if fp16 scaling skipped it."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return not self.accelerator.optimizer_step_was_skipped

    def scaler_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return dict(scaler.state_dict()) if scaler is not None else {}

    def restore_scaler(self, state: dict[str, Any]) -> None:
        if state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def close(self) -> None:
        self.accelerator.end_training()


def seed_row(seed: int, step: int, row: int) -> None:
    """Seed dropout from (seed, step, row), so that a resume needs no generator state."""
    mixed = int(np.random.SeedSequence((seed, step, row)).generate_state(1, np.uint64)[0]) % 2**63
    torch.manual_seed(mixed)


def seed_start(seed: int) -> None:
    """Seed what a strategy draws while it builds adapters."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (third-party strategies may draw from the legacy generator)
    torch.manual_seed(seed)
