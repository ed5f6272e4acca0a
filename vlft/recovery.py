"""What happens to a step that does not go as it should: too large for the memory, not finite, or asked to be the last.

Every function here is called on all ranks at the same point.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from vlft import checkpoint as checkpoints
from vlft import report
from vlft.allocator import held_by_others, shortage
from vlft.data.budget import Budget, Load
from vlft.data.collate import Row
from vlft.data.loader import Step
from vlft.errors import CheckpointError, DeviceMemoryError, StoppedError, TrainingError
from vlft.setup import Job
from vlft.tracking import write_json

LAUNCHER_PATIENCE = 30.0
"""Seconds from SIGTERM to SIGKILL, torchrun's default."""
SOME = 8
"""Samples that a sentence names."""
_ASKED = re.compile(r"Tried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def end_of_memory(error: torch.OutOfMemoryError) -> DeviceMemoryError:
    """Outside of a row's forward and backward there is nothing to make smaller."""
    return DeviceMemoryError(
        f"the model with gradients and optimizer states does not fit into this device ({shortage(error)}); train "
        "fewer parts, give --memory low or --optim adamw_8bit, or spread it over GPUs with --deepspeed zero3."
    )


def unfit(job: Job, row: Row, error: torch.OutOfMemoryError) -> Load:
    """How large the row is that did not fit, and whether layers can keep less of it."""
    return Load.of(row, job.memory.spare(_asked(error)))


def _asked(error: torch.OutOfMemoryError) -> int:
    """Bytes that the allocator could not give; 0 where the error does not say."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def end_of_memory_in_a_row(job: Job, load: Load, step: Step) -> NoReturn:
    """Where the ranks cannot try again together: write the smaller budget down for the resume, and end all of them.

    Raises:
        DeviceMemoryError: always.
    """
    if load.spare is not None:
        budget = job.budget.keeping_less([load])
        then = f"has {_less(budget)}"
    else:
        budget = job.budget.excluding(load.samples) if len(load.samples) == 1 else job.budget.halved([load])
        then = f"limits rows to {budget}"
    write_json(job.folder.budget, {"schema": 1, **budget.json(), "data": job.data.fingerprint})
    job.engine.end_all(DeviceMemoryError.exit_code)
    raise DeviceMemoryError(
        f"step {step.number + 1}: {_describe(job, load)} did not fit into the memory; {job.folder.budget} now {then}, "
        "go on with --resume_from_checkpoint latest."
    )


def make_room(job: Job, step: Step, load: Load | None) -> Step:
    """Have layers keep less of rows that did not fit; where they cannot, cut the step anew into smaller rows.

    The same samples, the same mathematics. To compute more again comes first: it costs less than smaller products do,
    and no sample is left out for what layers could have dropped.

    Args:
        load: the row of this rank that did not fit, or None.
    Returns:
        The step to try, the same one or as the smaller budget cuts it.
    Raises:
        DeviceMemoryError: a row without any sample did not fit.
        DataError: too many samples do not fit even alone.
    """
    loads = job.engine.gather([load] if load else [])
    stuck = [one for one in loads if one.spare is None]
    if any(not one.samples for one in stuck):
        others = f"; {held}" if (held := held_by_others()) else ""
        raise DeviceMemoryError(f"step {step.number + 1}: not even an empty row fits beside the model{others}.")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if alone := [one for one in stuck if len(one.samples) == 1]:
        # It may be its fault that other rows were cut before: go back to what other steps could do.
        job.trial = job.budget = job.budget.excluding([i for one in alone for i in one.samples])
        new = job.data.account([job.data.unfit(one.samples[0], step.number + 1) for one in alone])
        job.journal.ledger(entry.json() for entry in new)
    elif stuck:
        job.trial = job.trial.halved(stuck)
    # By the most that any rank was short: all do the same, so that none is the slowest in every step from then on.
    job.trial = job.trial.keeping_less(loads)
    job.memory.short = job.trial.short
    for one in loads:
        if one.spare is not None:
            then = _less(job.trial)
        else:
            then = "left out (ledger)" if len(one.samples) == 1 else f"rows now hold at most {job.trial}"
        job.journal.say(f"out of memory in step {step.number + 1}: {_describe(job, one)}; {then}.")
    if not stuck:
        return step
    job.open_steps()
    return next(job.steps)


def _less(budget: Budget) -> str:
    return f"layers keep less of a row, as if {budget.short / 2**30:.3g} GiB of the memory were taken"


def _describe(job: Job, load: Load) -> str:
    names = [f"{job.data.dataset_of(i)}/{job.data.index.sample_id(i)}" for i in load.samples[:SOME]]
    more = f" and {len(load.samples) - SOME} more" if len(load.samples) > SOME else ""
    return f"a row of {load.tokens} tokens and {load.patches} patches ({', '.join(names)}{more})"


def note_skipped(job: Job, step: Step, losses: Sequence[Tensor]) -> None:
    """The step's loss or gradient was not finite, so nothing was updated: say so, and stop if that goes on.

    Args:
        losses: of this rank's rows, (S,) each.
    Raises:
        TrainingError: --max_skipped_steps in a row.
    """
    suspects = [i for row, loss_S in zip(step.rows, losses, strict=True) for i in _not_finite(row, loss_S)]
    found = job.engine.gather(suspects)
    why = "its loss is not finite"
    if not found:
        found = job.engine.gather([i for row in step.rows for i in row.sample_ids])
        why = "a gradient of its step is not finite"
    number = step.number + 1
    entries = [job.data.not_finite(i, why, number) for i in sorted(found)]
    job.journal.ledger(entry.json() for entry in entries)
    job.skipped += 1
    names = ", ".join(f"{e.dataset}/{e.id}" for e in entries[:SOME])
    job.journal.say(f"skipped step {number}: {why} (ledger: {names}{' ...' if len(entries) > SOME else ''}).")
    if job.skipped >= job.run.config.max_skipped_steps:
        raise TrainingError(
            f"{job.skipped} steps in a row had no finite loss and gradient, the last one with {names}; lower the "
            "learning rates or use bf16, look at these samples, and go on with --resume_from_checkpoint latest."
        )


def _not_finite(row: Row, losses_S: Tensor) -> list[int]:
    if not row.sample_ids or bool(losses_S.isfinite().all()):
        return []
    bad = (~losses_S.isfinite()).cpu().nonzero().flatten().tolist()
    owners = row.sample_of_supervised().tolist()
    return sorted({int(row.sample_ids[owners[i]]) for i in bad})


class EvaluationStoppedError(Exception):
    """A signal asks for the end: an evaluation may outlast a launcher's patience, and the resume makes it again."""


def rows_until_stopped(job: Job, datasets: Sequence[str], limit: int | None) -> Iterator[Row]:
    """Held-out rows; samples that cannot be decoded go to the ledger.

    Raises:
        EvaluationStoppedError: on all ranks, once one of them was asked to end.
    """
    for step in job.data.eval_steps(datasets, limit):
        asked, failed = job.engine.sums([float(job.interrupt.asked), len(step.failures)])
        if agree_to_stop(job, asked):
            raise EvaluationStoppedError
        if failed:
            entries = [replace(entry, step=job.done_steps) for entry in job.engine.gather(step.failures)]
            job.journal.ledger(entry.json() for entry in job.data.account(entries))
        yield from step.rows


def agree_to_stop(job: Job, asked: float) -> bool:
    """Whether this step is the last. `asked`: the number of ranks, over all, that a signal has reached."""
    job.stopping = job.stopping or asked > 0
    return job.stopping


def warn_of_slow_save(job: Job, seconds: float) -> None:
    """A save that a launcher's patience would cut off is told while there is time to raise that."""
    if seconds > LAUNCHER_PATIENCE and "TORCHELASTIC_RUN_ID" in os.environ and not job.warned:
        job.warned = True
        job.journal.say(
            f"the save took {seconds:.0f} s, and a launcher kills {LAUNCHER_PATIENCE:.0f} s after a SIGTERM: set "
            f"PET_SHUTDOWN_TIMEOUT={2 * seconds:.0f} (torchrun --shutdown_timeout) so that a preempted run is saved."
        )


def judge(job: Job) -> None:
    """Say which parts were never seen to train; a run that trained none of what it promised is no success.

    Raises:
        TrainingError: no part was seen to train.
    """
    if not (missing := job.proof.missing):
        return
    reason = "no step with pictures reached them" if not {"llm", "head"} & {*missing} else "no step moved them"
    text = f"not proved to have trained: {', '.join(missing)}; {reason}."
    if not job.proof.proved and job.total_steps:
        raise TrainingError(
            f"{text} Nothing of what '{job.run.config.tuning_strategy}' promises was trained, so no model is written; "
            "look at the data, or choose a strategy that fits them."
        )
    job.journal.say(f"WARNING: {text} Their weights in the result are not the data's.")


def write_report(job: Job) -> None:
    """report.html, on the main process. A page that cannot be drawn costs no run: it is told, and the run goes on."""
    if not job.run.config.report or not job.engine.is_main:
        return
    try:
        report.write(job.folder.root)
    except Exception as error:  # whatever a drawing library raises
        job.journal.say(f"WARNING: no report.html this time: {type(error).__name__}: {error}; see 'vlft report'.")


def best_weights(job: Job) -> dict[str, Tensor]:
    """Trained weights of the best checkpoint, by name, where --metric_for_best asks for one other than the last.

    Called on the main process alone.

    Raises:
        CheckpointError: a file of it is missing, truncated or altered.
    """
    best = job.best
    if best is None or best.step in (0, job.done_steps):
        return {}
    folder = checkpoints.step_folder(job.folder.checkpoints, best.step)
    if folder not in checkpoints.complete(job.folder.checkpoints):
        job.journal.say(f"WARNING: {folder}, the best by {best.metric}, is gone; model/ is of step {job.done_steps}.")
        return {}
    try:
        checkpoints.read_state(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).partition('. ')[0].rstrip('.')}, and {folder} is the best by {best.metric}, which becomes "
            "the result; move it away and go on with --resume_from_checkpoint latest, then model/ is of the last step."
        ) from error
    job.journal.say(f"model/ is of step {best.step}, the best by {best.metric} ({best.value:.4g}).")
    return dict(checkpoints.load_weights(folder, job.model))


def stop(job: Job) -> NoReturn:
    """End after a save. Raises: StoppedError, always."""
    name = job.interrupt.name or "a signal to another process"
    raise StoppedError(
        f"{name}: ended after step {job.done_steps} of {job.total_steps}, which is saved; go on with "
        "--resume_from_checkpoint latest."
    )


def poisoned(total: Tensor) -> Tensor:
    """The same scalar; if it is not finite, one whose gradient is NaN everywhere.

    An infinite loss may have finite gradients. NaN in all of them makes every engine skip the step on its own, on all
    ranks, without another exchange.
    """
    return total * torch.where(total.detach().isfinite(), 1.0, math.nan)
