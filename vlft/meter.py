"""How fast a step was, and how near to what the device can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlft.data.collate import Row
from vlft.errors import ModelError
from vlft.family import Parts
from vlft.models.flops import Shape, Training, Work, describe, step_flops
from vlft.models.peaks import peak_flops


class Meter:
    """Counts the model FLOPs of steps, and turns sums and seconds into the `perf` of a line."""

    def __init__(self, model: nn.Module, parts: Parts, config: Any, device: torch.device, precision: str) -> None:
        """
        Args:
            model: what the strategy prepared, before an engine shards it; which of its parameters train is read here.
            precision: "no", "bf16" or "fp16": the dtype of products.
        """
        self.device = device
        self.counts: tuple[Shape, Training] | None
        try:
            self.counts = describe(model, parts, config)
        except ModelError:  # a plugin may add layers of a kind that no formula knows
            self.counts = None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_flops(name, {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32"))

    def work(self, rows: Sequence[Row]) -> list[int]:
        """The fields of the rows' `Work`: sums that add up over ranks."""
        if self.counts is None:
            return list(astuple(Work()))
        shape, _ = self.counts
        real = [row for row in rows if row.sample_ids]
        lengths = [np.diff(row.cu_seqlens.numpy()) for row in real]
        grids = [row.image_grid_thw.numpy() for row in real]
        total = Work.of(
            shape, np.concatenate([np.zeros(0, np.int64), *lengths]),
            np.concatenate([np.zeros((0, 3), np.int64), *grids]), sum(row.supervised for row in real),
        )  # fmt: skip
        return list(astuple(total))

    def perf(
        self, work: Sequence[float], world_size: int, tokens: int, samples: int, seconds: float, waited: float
    ) -> dict[str, float]:
        """What a line of metrics.jsonl has under `perf`.

        Args:
            work: of all ranks, as `work` gives it.
            seconds, waited: of the step, and for data: of this step, or of the next one, which is fetched ahead.
        """
        whole = seconds + waited
        found = {
            "step_seconds": seconds, "data_wait_seconds": waited, "tokens_per_second": tokens / whole,
            "samples_per_second": samples / whole, "peak_memory_gib": peak_memory_gib(self.device),
        }  # fmt: skip
        if self.counts is not None:
            rate = step_flops(*self.counts, Work(*map(int, work))) / whole / world_size
            found["tflops_per_device"] = rate / 1e12
            if self.peak:
                found["mfu"] = rate / self.peak
        return found


def loss_by_dataset(rows: Sequence[Row], losses: Sequence[Tensor], datasets: int) -> list[float]:
    """This rank's sums of losses by data set, then the numbers of their learnt tokens: (2 * datasets,).

    Args:
        losses: (S,) of each row.
    """
    sums, counts = np.zeros(datasets), np.zeros(datasets)
    for row, losses_S in zip(rows, losses, strict=False):
        if row.sample_ids:
            owner_S = np.array(row.dataset_ids)[row.sample_of_supervised().numpy()]
            sums += np.bincount(owner_S, losses_S.double().cpu().numpy(), datasets)
            counts += np.bincount(owner_S, minlength=datasets)
    return [*sums.tolist(), *counts.tolist()]


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
