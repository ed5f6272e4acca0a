"""A few steps under torch.profiler: kernels and operations by their time, and how long the GPU waits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOP = 40
BORDER = "vlft_bench_border"


class Profile:
    """From its making to `finish`; `border` marks where one step ends and the next begins."""

    def __init__(self, *, cuda: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.cuda = cuda
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self.profiler = profile(activities=kinds)
        self.profiler.start()

    def border(self) -> None:
        from torch.profiler import record_function

        with record_function(BORDER):
            pass

    def finish(self, path: Path) -> dict[str, Any]:
        """Write the tables; returns the shares of time that a JSON line has."""
        import torch

        self.border()
        if self.cuda:
            torch.cuda.synchronize()
        self.profiler.stop()
        events = self.profiler.events()
        borders = sorted(e.time_range.start for e in events if e.name == BORDER and "CPU" in str(e.device_type))
        on_gpu = [e for e in events if "CUDA" in str(e.device_type) and not annotates(e)]
        found = shares([(e.time_range.start, e.time_range.end) for e in on_gpu], borders)
        averages = self.profiler.key_averages()
        tables = [f"{name}: {value}" for name, value in found.items()]
        if on_gpu:
            tables += ["\nkernels: ms and launches of a step", *kernels(on_gpu, max(1, len(borders) - 1))]
        for key in (*(["self_cuda_time_total"] if self.cuda else []), "self_cpu_time_total"):
            tables += [f"\ntop {TOP} by {key}", averages.table(sort_by=key, row_limit=TOP, max_name_column_width=90)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(tables) + "\n")
        return found


def kernels(on_gpu: list[Any], steps: int) -> Iterator[str]:
    """A line each, the dearest first, down to a thousandth of all."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in on_gpu:
        times[event.name].append(event.time_range.elapsed_us())
    whole = sum(map(sum, times.values()))
    yield f"{whole / steps / 1000:10.2f} {len(on_gpu) / steps:8.0f} all"
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        if sum(each) > whole / 1000:
            yield f"{sum(each) / steps / 1000:10.2f} {len(each) / steps:8.0f} {name[:160]}"


def annotates(event: Any) -> bool:
    """A name that a library gave to a span, shown on the GPU's line, where it hides gaps between kernels."""
    return event.name == BORDER or bool(getattr(event, "is_user_annotation", False))


def shares(kernels: list[tuple[float, float]], borders: list[float]) -> dict[str, Any]:
    """Parts of the time from the first border to the last.

    Args:
        kernels: (start, end) of what ran on the GPU; streams may overlap. borders: between steps, on the CPU.
    Returns:
        `gpu_busy`; `gpu_idle_between`: idle spans in which a step ended (0 where the CPU runs ahead).
    """
    if not kernels or len(borders) < 2:
        return {}
    first, last = borders[0], borders[-1]
    idle, at = [], first
    for start, end in sorted(kernels):
        if start > at:
            idle.append((at, min(start, last)))
        at = max(at, end)
        if at >= last:
            break
    if at < last:
        idle.append((at, last))
    window = last - first
    between = [span for span in idle if any(span[0] <= b <= span[1] for b in borders[1:-1])]
    inner = (len(borders) - 1) / max(1, len(borders) - 2)  # one border in each step, the two outer ones are cut
    return {
        "gpu_busy": round(1 - sum(b - a for a, b in idle) / window, 4),
        "gpu_idle_between": round(inner * sum(b - a for a, b in between) / window, 4),
    }
