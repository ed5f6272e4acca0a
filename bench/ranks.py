"""The program vlft as one of several processes, with a note beside it of what each of them did.

    VLFT_BENCH_RANKS='{"folder": "/tmp/notes", "strategy": "full", "steps": 12, "warm": 4, "device": "cuda"}' \\
        accelerate launch --config_file accelerate_configs/ddp.yaml bench/ranks.py WORDS OF A USER

Started by bench/scaling.py. Nothing is exchanged between the processes for it: each writes lines to its own file,
folder/rank-R.jsonl, at once, since it may be killed at any moment. The first has its process id; then one for each
step; and, after the last of the timed steps, one with what bench/measure.py makes of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train as bench
from measure import Recorder

ASKED = "VLFT_BENCH_RANKS"


class Busy:
    """Seconds of a step's forwards and backwards, by the device's clock where it has one."""

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[Any] = []

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **options: Any) -> Any:
            self._mark()
            try:
                return work(*args, **options)
            finally:
                self._mark()

        return marked

    def _mark(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def read(self) -> float:
        """Of the step that has ended; its update was waited for, and so these marks were."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks.clear()
        if not self._cuda:
            return sum(end - begin for begin, end in pairs)
        for _, end in pairs:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000


def note_steps(asked: dict[str, Any]) -> None:
    from vlft import train

    rank = int(os.environ.get("RANK", "0"))
    out = (Path(asked["folder"]) / f"rank-{rank}.jsonl").open("w", buffering=1)

    def note(**facts: Any) -> None:
        out.write(json.dumps(facts) + "\n")

    note(pid=os.getpid())
    # On one rank, for which the others wait: it comes after the steps that are timed.
    profile = Path(asked["profile"]) if "profile" in asked and not rank else None
    recorder = Recorder(asked["steps"], asked["warm"], device=asked["device"], profile=profile)
    busy = Busy(cuda=asked["device"] == "cuda")
    train.forward_backward = busy.around(train.forward_backward)

    def after(job: Any, step: Any) -> None:
        note(step=step.number + 1, busy_s=round(busy.read(), 6))
        if len(recorder.ends) == recorder.total:
            # Where weights or gradients are cut up, a rank waits for the others within its forward and backward.
            facts = {"own_pace": job.engine.retries, "kind": job.engine.kind, "world_size": job.engine.world_size}
            note(line=bench.process_line(job, recorder, asked["strategy"]) | facts)

    bench.watch(recorder, after)


if __name__ == "__main__":  # data workers that are spawned import this module again
    note_steps(json.loads(os.environ[ASKED]))
    from vlft.cli import main

    sys.exit(main())
