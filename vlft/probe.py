"""The largest micro-batch, once before training: what does not fit is found in the first seconds, not after a day.

Nothing of the run shows it: gradients are dropped, generators and buffers are put back, and the loaders are not
touched. All ranks run the same rows, since any of them may meet these, and since sharded ones must call alike. The
memory that the optimizer's states will take is held meanwhile.

On a CPU nothing is tried unless `--skip_probe false` asks for it: where memory is short there, the system ends the
process, and no error is raised from which smaller rows could be learnt.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from vlft import recovery
from vlft.data.budget import Load
from vlft.data.largest import Planned
from vlft.data.loader import Step
from vlft.meter import peak_memory_gib
from vlft.setup import Job

TRIES = 16
"""How often rows may fail to fit before it is left to the steps to find the others."""


def try_largest(job: Job) -> None:
    """Run the largest rows of the epoch that begins; make room where one does not fit, as a step would. All ranks.

    Raises:
        DeviceMemoryError: it does not fit, and nothing can be done about it in this process.
        DataError: too many samples do not fit even alone.
    """
    wanted = job.run.config.skip_probe
    if job.done_steps >= job.total_steps or (job.engine.device.type == "cpu" if wanted is None else wanted):
        return
    job.journal.doing("trying the largest rows")
    for _ in range(TRIES):
        planned = job.data.largest(job.done_steps, job.total_steps, job.costs, job.trial)
        began = time.monotonic()
        unfit, fits, peak = _run(job, planned)
        if fits:
            job.journal.say(f"probe: {_described(planned)} ran forward and backward in "
                            f"{time.monotonic() - began:.1f} s; peak {peak:.2f} GiB{_of_device(job)}.")  # fmt: skip
            break
        job.journal.say(f"probe: {_described(planned)} did not fit.")
        recovery.make_room(job, _next_step(job), unfit)
    else:
        job.journal.say(f"probe: stopped after {TRIES} rows that did not fit; steps make room where they need it.")
    job.budget = job.trial


def _run(job: Job, planned: Sequence[Planned]) -> tuple[Load | None, bool, float]:
    """The row of this rank that did not fit, whether all fit on all ranks, and the highest peak in GiB."""
    engine, gpu = job.engine, job.engine.device.type == "cuda"
    rows = [job.data.row(one) for one in planned]
    if job.data.options.rows_per_rank > 1 or job.trial.tokens is not None:
        rows *= 2  # in a step of several rows, gradients are there before all but the first
    if gpu:
        torch.cuda.reset_peak_memory_stats(engine.device)
    with _no_trace(job), engine.holding_states():
        unfit = None
        job.expect(len(rows))
        for i, row in enumerate(rows):
            try:
                losses_S = job.packed(**job.inputs(row, True))
                engine.backward(losses_S.sum() / max(1, row.supervised), last=i == len(rows) - 1)
            except torch.OutOfMemoryError as error:
                unfit = recovery.unfit(job, row, error)
                break
        if unfit and not engine.retries:
            recovery.end_of_memory_in_a_row(job, unfit, _next_step(job))
        fits = engine.reduce(fits=unfit is None)
        engine.forget()
        peak = max(engine.gather([peak_memory_gib(engine.device)]))
    if gpu:
        # The first step finds the memory as it would have, and its own peak is told.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(engine.device)
    return unfit, fits, peak


@contextmanager
def _no_trace(job: Job) -> Iterator[None]:
    """Generators, from which layers of a plugin may draw, and buffers, in which they may count, are as before."""
    gpus = [torch.cuda.current_device()] if job.engine.device.type == "cuda" else []
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    buffers = [(b, b.detach().clone()) for b in job.packed.buffers()]
    with torch.random.fork_rng(devices=gpus):
        yield
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def _next_step(job: Job) -> Step:
    """Where what was learnt belongs: a checkpoint keeps what steps before it have told, and no later one."""
    return Step(number=job.done_steps, epoch=0, rows=[], failures=[], supervised_tokens=0, samples=0)


def _described(planned: Sequence[Planned]) -> str:
    each = [f"{row.tokens:,} tokens, {row.patches:,} patches of step {row.step + 1}" for row in planned]
    return f"the largest row{'s' if len(each) > 1 else ''} ({'; '.join(each)})"


def _of_device(job: Job) -> str:
    if job.engine.device.type != "cuda":
        return ""
    return f" of {torch.cuda.get_device_properties(job.engine.device).total_memory / 2**30:.1f}"
