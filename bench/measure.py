"""What a bench notes of every optimizer step, whoever makes it, and the JSON line that comes of it."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import workload  # puts this checkout on sys.path

BEGAN = "VLFT_BENCH_BEGAN"
"""Environment: time.time() when the process of a row was started."""
MODES = {"full": "full", "lora_llm_full_vit": "lora_vit", "lora": "lora", "qlora": "lora"}
PROFILED = 3
"""Steps under the profiler, after those that are timed."""


def _names(dtypes: Iterable[Any]) -> str:
    return "+".join(sorted({str(d).removeprefix("torch.") for d in dtypes})) or "none"


class Recorder:
    """Times of steps, the work in them, memory. The device is waited for at both ends of the timed steps alone."""

    def __init__(self, steps: int, warm: int, *, device: str, profile: Path | None = None) -> None:
        """
        Args:
            steps: that are timed; warm: before them. profile: file for the profiler's tables, over PROFILED more steps.
        """
        self.steps, self.warm, self.cuda, self.profile = steps, warm, device == "cuda", profile
        self.total = warm + steps + (PROFILED + 1 if profile else 0)
        self.ends: list[float] = []
        self.lengths: list[int] = []
        self.grids: list[list[int]] = []
        self.supervised = self.rows = self.samples = 0
        self.graphs: list[int] = []
        self.allocated: list[int] = []
        self.facts: dict[str, Any] = {}
        self.begun = self.first_end = 0.0
        self._profiler: Any = None
        self._later: list[tuple[Any, ...]] = []

    @property
    def timing(self) -> bool:
        """Whether the step that runs now is one of those that are timed."""
        return self.warm <= len(self.ends) < self.warm + self.steps

    def begin(self) -> None:
        if not self.ends:
            self.begun = time.perf_counter()

    def work(self, lengths: Sequence[int], grids: Sequence[Sequence[int]], supervised: int) -> None:
        """One row (or padded batch) of the step that runs now: tokens of its samples, (t, h, w) of its pictures."""
        if self.timing:
            self._count(lengths, grids, supervised)

    def _count(self, lengths: Sequence[int], grids: Sequence[Sequence[int]], supervised: int) -> None:
        self.lengths += lengths
        self.grids += [list(grid) for grid in grids]
        self.supervised += supervised
        self.rows += 1
        self.samples += len(lengths)

    def work_on_device(self, *tensors: Any) -> None:
        """The same as `work`, from tensors of a GPU, which are read after the last step: nothing waits here."""
        if self.timing:
            self._later.append(tensors)

    def dtypes(self, model: Any, optimizer: Any) -> None:
        """Between backward and update of the first step: dtypes of weights and gradients; `end` adds the states."""
        if "weights" in self.facts:
            return
        from vlft.optim import master_dtype

        trained = [p for p in model.parameters() if p.requires_grad]
        self.facts["weights"] = _names(map(master_dtype, trained))
        self.facts["frozen"] = _names(p.dtype for p in model.parameters() if not p.requires_grad)
        self.facts["gradients"] = _names(p.grad.dtype for p in trained if p.grad is not None)
        # Under ZeRO-3 an empty tensor is in the place of a weight.
        self.facts["trained_parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        self._optimizer = optimizer

    def end(self) -> None:
        """After each step."""
        done = len(self.ends) + 1
        if self.cuda and done in (1, self.warm, self.warm + self.steps):
            self._wait()
        self.ends.append(time.perf_counter())
        self.graphs.append(_graphs())
        if self.cuda:
            import torch

            self.allocated.append(torch.cuda.memory_allocated())
        if done == 1:
            self.facts["first_step_s"] = time.time() - float(os.environ.get(BEGAN, time.time()))
            self.facts["states"] = self._states()
        if self.profile:
            self._profile(done)

    def _wait(self) -> None:
        import torch

        torch.cuda.synchronize()

    def _states(self) -> str:
        """Of the optimizer, without its step counters."""
        states = getattr(self, "_optimizer", None)
        values = [v for s in states.state.values() for v in s.values()] if states is not None else []
        return _names(v.dtype for v in values if hasattr(v, "numel") and v.numel() > 1)

    def _profile(self, done: int) -> None:
        from profiling import Profile

        if done == self.warm + self.steps + 1:
            self._profiler = Profile(cuda=self.cuda)
        elif self._profiler is not None and done == self.total:
            self.facts |= self._profiler.finish(self.profile)
            self._profiler = None
        if self._profiler is not None:
            self._profiler.border()

    def line(self, config: Any, counts: Any, mode: str, rank: int) -> dict[str, Any]:
        """The result.

        Args:
            config: of the Hugging Face model; counts: (Shape, Training) of vlft.models.flops, or None; mode: of
                `workload.formula_flops`; rank: of adapters.
        """
        for tensors in self._later:
            self._count(*(t.tolist() for t in tensors))
        marks = [self.begun, *self.ends][self.warm : self.warm + self.steps + 1]
        each = [b - a for a, b in pairwise(marks)]
        seconds, tokens = marks[-1] - marks[0], sum(self.lengths)
        quarter = max(1, len(each) // 4)
        found = {
            "steps": len(each), "samples_per_step": self.samples / len(each), "rows_per_step": self.rows / len(each),
            "tokens_per_row": tokens / max(1, self.rows), "tokens_per_sample": tokens / max(1, self.samples),
            "s_per_step": statistics.median(each), "s_per_step_mean": seconds / len(each),
            "samples_per_s": self.samples / seconds, "tokens_per_s": tokens / seconds,
            "supervised": self.supervised / max(1, tokens), **self._mfu(config, counts, mode, rank, seconds),
            "warmup_s": self.ends[self.warm - 1] - self.begun if self.warm else 0.0,
            "step_growth": statistics.median(each[-quarter:]) / statistics.median(each[:quarter]),
            "graphs": self.graphs[-1], "graphs_after_10": self.graphs[-1] - self.graphs[min(9, len(self.graphs) - 1)],
            **self._memory(), **self.facts,
        }  # fmt: skip
        return {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in found.items()}

    def _mfu(self, config: Any, counts: Any, mode: str, rank: int, seconds: float) -> dict[str, Any]:
        from vlft.models.flops import Work, step_flops
        from vlft.models.peaks import peak_flops

        found: dict[str, Any] = {"mfu": None, "mfu_formula": None, "tflops": None}
        by_formula = workload.formula_flops(config, self.lengths, self.grids, self.supervised, mode, rank)
        if counts is not None:
            by_walk = step_flops(*counts, Work.of(counts[0], self.lengths, self.grids, self.supervised))
            found["tflops"] = by_walk / seconds / 1e12
            found["formula_over_count"] = by_formula / by_walk if by_formula else None
        peak = peak_flops(_device_name(), "bf16") if self.cuda else None
        if peak:
            found["mfu"] = found["tflops"] and found["tflops"] * 1e12 / peak
            found["mfu_formula"] = by_formula and by_formula / seconds / peak
        return found

    def _memory(self) -> dict[str, Any]:
        import torch

        versions = {"torch": torch.__version__, "gpu": _device_name() if self.cuda else "cpu"}
        if not self.cuda:
            import resource

            return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, **versions}
        grown = (self.allocated[self.warm + self.steps - 1] - self.allocated[max(0, self.warm - 1)]) / 2**30
        return {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30, "memory_growth_gib": grown, **versions,
        }  # fmt: skip


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _graphs() -> int:
    """Graphs that torch.compile has made up to now."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0
