"""The plan in short, before the first step of a run: from what the run has at hand by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlft.allocator import held_by_others
from vlft.planning import gpus
from vlft.planning.estimate import Cut, allowed, as_trained, cut_of, expected, shared_out
from vlft.planning.gpus import GIB, Gpu
from vlft.planning.load import Steps, look
from vlft.planning.memory import Memory, static_of
from vlft.planning.time import Time
from vlft.setup import Job
from vlft.terminal import duration
from vlft.words import counted

STEPS = 50
"""That are looked at for a mean one: the start shall not wait."""


def say_plan(job: Job) -> None:
    """On the main process; nothing on a CPU, whose memory and speed no formula here knows."""
    if job.engine.is_main and (gpu := gpus.here()) is not None and job.done_steps < job.total_steps:
        for line in short(job, gpu):
            job.journal.say(line)
        if others := held_by_others():
            job.journal.say(f"this GPU is shared: {others}; the plan above counts what this run takes alone.")


def short(job: Job, gpu: Gpu) -> Sequence[str]:
    """Memory by component, time of a step and of an epoch. None for layers that no formula knows."""
    config, engine = job.run.config, job.engine
    if job.meter.counts is None or config.reference:
        return []
    shape, training = job.meter.counts
    compute, source = job.source.compute_dtype, job.source
    static = static_of(job.model, source.parts, source.tied_head, config.optim, compute.itemsize, shape)
    # Of the engine, which also reads a file that Accelerate's launcher names.
    own = Cut(engine.stage, packed_whole=not engine.shards_packed)
    cut = cut_of(engine.deepspeed, compute) if engine.deepspeed else own
    static = shared_out(static, cut, engine.world_size, compute=compute.itemsize)
    static = replace(static, passing=engine.passing_bytes())
    steps = look(
        job.data, shape, costs=job.costs, budget=job.trial, start=job.done_steps, total=job.total_steps, steps=STEPS
    )  # fmt: skip
    peak = job.meter.peak  # in this run's precision; None for a GPU that no table knows
    gpu = allowed(replace(gpu, peak=peak or gpu.peak), config)
    if engine.splits_masters:
        static = as_trained(static, steps, alone=engine.narrows_gradients)
    memory, time = expected(config, static, shape, training, steps, gpu, compute)
    return [_memory(memory, gpu), *([_time(time, steps)] if peak else [])]


def _memory(m: Memory, gpu: Gpu) -> str:
    components = {
        "weights": m.weights, "gradients": m.gradients, "optimizer states": m.states, "copies": m.copies,
        "kept by layers": m.kept, "logits": m.logits, "buffers": m.buffers,
    }  # fmt: skip
    each = ", ".join(f"{name} {size / GIB:.1f}" for name, size in components.items())
    over = "" if m.peak <= gpu.memory else "; that is more than there is, see 'vlft plan' with the same options"
    return f"plan: {m.peak / GIB:.1f} of {gpu.memory / GIB:.1f} GiB at the worst moment ({each}){over}."


def _time(t: Time, steps: Steps) -> str:
    epoch = duration(t.step * steps.steps_per_epoch)
    return f"plan: about {t.step:.2g} s a step, {epoch} an epoch of {counted(steps.steps_per_epoch, 'step')}."
