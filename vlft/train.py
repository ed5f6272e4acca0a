"""The story of a run, read from top to bottom: set up, fit, hand over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlft import checkpoint as checkpoints
from vlft import evaluate, export, probe, recovery
from vlft.config import Run, deepspeed_path
from vlft.data.budget import Load
from vlft.data.loader import Step
from vlft.engine import readback, seed_row, settled, start_engine
from vlft.meter import loss_by_dataset
from vlft.optim import set_rates
from vlft.planning.start import say_plan
from vlft.setup import Job, end_sentence, result_facts, setup


def main(run: Run) -> None:
    """Train, and leave a Hugging Face folder in output_dir/model."""
    config = run.config
    deepspeed = deepspeed_path(config.deepspeed) if config.deepspeed else None
    engine = start_engine(config.mixed_precision, deepspeed, config.max_grad_norm)
    try:
        job = setup(run, engine)
        with job.journal:
            say_plan(job)
            fit(job)
            recovery.judge(job)
            hand_over(job)
    except torch.OutOfMemoryError as error:
        raise recovery.end_of_memory(error) from error
    # Not in a `finally`: the command line tells an error once for all ranks through the process group.
    engine.close()


# ---------------------------------------------------------------------------------------------------------------------
# Fit: one turn of this loop is one optimizer step over all ranks.
# ---------------------------------------------------------------------------------------------------------------------


def fit(job: Job) -> None:
    config = job.run.config
    job.packed.train()
    with job.interrupt, settled():
        probe.try_largest(job)
        if evaluation_due(job) and not job.engine.on_main(lambda: job.journal.evaluated(job.done_steps)):
            run_evaluation(job)  # the run that goes on here ended between its save and its evaluation
            if job.stopping:
                recovery.stop(job)
        job.open_steps()
        while job.done_steps < job.total_steps:
            began = time.monotonic()
            step = next(job.steps)
            line = train_step(job, step)
            line["perf"] = performance(job, step, line, began)
            job.done_steps = step.number + 1
            job.journal.metrics(line)
            saved = job.stopping or job.done_steps % config.save_steps == 0 or job.done_steps == job.total_steps
            if saved:
                save_checkpoint(job)
            # After the save: a user's script that fails must not cost the steps since the checkpoint before.
            if evaluation_due(job) and not job.stopping:
                run_evaluation(job)
            if (job.stopping or job.is_best) and not saved:
                save_checkpoint(job)
            if saved or job.is_best:
                recovery.write_report(job)
            if job.stopping:
                recovery.stop(job)


def train_step(job: Job, step: Step) -> dict[str, Any]:
    """Forward, backward, update. The divisor counts what was really decoded, on all ranks, before the first forward."""
    engine = job.engine
    while True:
        supervised, samples, tokens, images, failed, padding, reached = engine.sums(job.data.counts(step))
        reads, unfit = forward_backward(job, step, supervised) if supervised else ([], None)
        if engine.reduce(fits=unfit is None):
            break
        step = recovery.make_room(job, step, unfit)
    job.budget = job.trial
    rates = set_rates(job.optimizer, job.rate_factor(step.number))
    update = None
    if supervised:
        if not job.proof.done:
            job.proof.before_update(reached_pictures=reached > 0)
        # Not where a stop is asked for: a launcher waits half a minute, and a slow disk may take it for the next step.
        update = engine.update(meanwhile=lambda: None if job.interrupt.asked else job.steps.look_ahead())
    losses = [read() for read in reads]
    if failed:
        job.journal.ledger(entry.json() for entry in job.data.account(engine.gather(step.failures)))
    mine = [sum(float(x.double().sum()) for x in losses), float(job.interrupt.asked)]
    loss_sum, asked_to_stop, *by_dataset = engine.sums(mine + loss_by_dataset(step.rows, losses, len(job.data.names)))
    recovery.agree_to_stop(job, asked_to_stop)
    norm, norms, skipped = 0.0, dict.fromkeys(rates, 0.0), None if supervised else "nothing_to_learn"
    if update is not None:
        norm, norms = update.norm, update.norms
        if update.applied:
            job.skipped = 0
            if not job.proof.done and job.proof.after_update(step.number + 1):
                job.journal.say(job.proof.render())
        elif update.scaling and math.isfinite(loss_sum):
            skipped = "loss_scaling"
        else:
            skipped = "not_finite"
            recovery.note_skipped(job, step, losses)
    return {
        "step": step.number + 1, "kind": "train",
        "loss": loss_sum / supervised if supervised and math.isfinite(loss_sum) else None,
        "dataset_loss": job.data.by_name(by_dataset),
        "grad_norm": norm if math.isfinite(norm) else None, "skipped": skipped, "learning_rate": rates,
        "grad_norms": {part: n if math.isfinite(n) else None for part, n in norms.items()},
        "tokens": int(tokens), "supervised_tokens": int(supervised), "samples": int(samples), "images": int(images),
        "padding": padding / (tokens + padding) if tokens else 0.0,
        "epoch": (step.number + 1) / job.data.steps_per_epoch,
    }  # fmt: skip


def forward_backward(
    job: Job, step: Step, supervised: float
) -> tuple[list[Callable[[], Tensor]], Load | None]:  # fmt: skip
    """Every row's losses, (S,) each, to be read once the device has been asked for the update: to wait for them leaves
    it without work. Or, if a row did not fit into the memory, how large that one was."""
    reads: list[Callable[[], Tensor]] = []
    job.expect(len(step.rows))
    for i, row in enumerate(step.rows):
        seed_row(job.run.config.seed, step.number, job.engine.rank * len(step.rows) + i)
        try:
            losses_S = job.packed(**job.steps.inputs(row))
            read = readback(losses_S.detach())
            total = recovery.poisoned(losses_S.sum())
            job.engine.backward(total / supervised, last=i == len(step.rows) - 1)
        except torch.OutOfMemoryError as error:
            unfit = recovery.unfit(job, row, error)
            if not job.engine.retries:
                recovery.end_of_memory_in_a_row(job, unfit, step)
            return [], unfit
        reads.append(read)
    return reads, None


def performance(job: Job, step: Step, line: dict[str, Any], began: float) -> dict[str, float]:
    work = job.engine.sums(job.meter.work(step.rows))
    waited = job.steps.waited()
    seconds = time.monotonic() - began - waited
    return job.meter.perf(work, job.engine.world_size, line["tokens"], line["samples"], seconds, waited)


def evaluation_due(job: Job) -> bool:
    if not job.data.eval_datasets:
        return False
    if not job.done_steps:
        return job.eval_on_start
    return job.done_steps == job.total_steps or job.done_steps % job.run.config.eval_steps == 0


def run_evaluation(job: Job) -> None:
    began = time.monotonic()
    job.journal.doing("evaluating")
    job.packed.eval()
    try:
        rows = partial(recovery.rows_until_stopped, job)
        found = evaluate.evaluate(
            job.engine, job.packed, job.model, rows, job.inputs, job.data, job.metrics, job.answers
        )  # fmt: skip
    except recovery.EvaluationStoppedError:
        return
    except torch.OutOfMemoryError as error:
        raise evaluate.does_not_fit(error) from error
    finally:
        job.packed.train()
    job.journal.evaluation(job.done_steps, found.values, found.made, found.failed, time.monotonic() - began)
    job.judge_best()


def save_checkpoint(job: Job) -> None:
    """All ranks: each writes a share of the tensors, then the main process puts the folder in its place."""
    engine, root, step = job.engine, job.folder.checkpoints, job.done_steps
    began = time.monotonic()
    job.journal.doing("saving")
    engine.on_main(lambda: checkpoints.begin(root, step))
    tensors = engine.saved_tensors(job.model, job.optimizer)
    shares = engine.together(lambda: checkpoints.write(root, step, engine.rank, tensors))
    files = {name: facts for share in shares for name, facts in share.items()}
    limit, best = job.run.config.save_total_limit, job.best.step if job.best else 0
    engine.on_main(lambda: checkpoints.finish(root, step, files, job.state(), limit, best))
    recovery.warn_of_slow_save(job, time.monotonic() - began)


# ---------------------------------------------------------------------------------------------------------------------
# Hand over: a Hugging Face folder, and the next command to type.
# ---------------------------------------------------------------------------------------------------------------------


def hand_over(job: Job) -> None:
    whole = job.engine.weights(job.model, export.needed(job.strategy, job.model, job.source))

    def write() -> None:
        best = recovery.best_weights(job)
        whole.update(best)
        limits = {"min_pixels": job.data.options.min_pixels, "max_pixels": job.data.options.max_pixels}
        facts = result_facts(job.run, job.folder, job.proof.missing, job.best.step if job.best and best else None)
        export.save_result(job.strategy, job.model, job.source, whole, job.folder.model, facts=facts, **limits)
        adapter = (job.folder.model / "adapter_config.json").exists()
        job.journal.ended(end_sentence(job), job.best if best or job.is_best else None, merges=adapter)
        recovery.write_report(job)

    job.engine.on_main(write)
