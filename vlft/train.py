"""The story of a run, read from top to bottom: set up, fit, hand over."""

from __future__ import annotations

import math
import time
from typing import Any

from vlft import checkpoint as checkpoints
from vlft import evaluate, export
from vlft.config import Run, deepspeed_path, resolved
from vlft.data.loader import Step
from vlft.engine import seed_row, start_engine
from vlft.optim import set_rates
from vlft.setup import Job, setup
from vlft.tracking import peak_memory_gib


def main(run: Run) -> None:
    """Train, and leave a Hugging Face folder in output_dir/model."""
    config = run.config
    deepspeed = deepspeed_path(config.deepspeed) if config.deepspeed else None
    engine = start_engine(config.mixed_precision, deepspeed, config.max_grad_norm)
    job = setup(run, engine)
    fit(job)
    hand_over(job)
    # Not in a `finally`: the command line tells an error once for all ranks through the process group.
    engine.close()


# ---------------------------------------------------------------------------------------------------------------------
# Fit: one turn of this loop is one optimizer step over all ranks.
# ---------------------------------------------------------------------------------------------------------------------


def fit(job: Job) -> None:
    config = job.run.config
    job.packed.train()
    if evaluation_due(job) and not job.engine.from_main(job.journal.evaluated(job.done_steps)):
        run_evaluation(job)  # the run that goes on here ended between its save and its evaluation
    asked = time.monotonic()
    for step in job.data.steps(job.done_steps, job.total_steps, job.costs):
        began = time.monotonic()
        line = train_step(job, step)
        line["perf"] = performance(job, line, began, waited=began - asked)
        job.done_steps = step.number + 1
        job.journal.metrics(line)
        if job.done_steps % config.save_steps == 0 or job.done_steps == job.total_steps:
            save_checkpoint(job)
        # After the save: a user's script that fails must not cost the steps since the checkpoint before.
        if evaluation_due(job):
            run_evaluation(job)
        asked = time.monotonic()


def train_step(job: Job, step: Step) -> dict[str, Any]:
    """Forward, backward, update. The divisor counts what was really decoded, on all ranks, before the first forward."""
    engine = job.engine
    supervised, samples, tokens, images, failed = engine.sums(job.data.counts(step))
    if failed:
        job.journal.ledger(entry.json() for entry in job.data.account(engine.gather(step.failures)))
    rates = set_rates(job.optimizer, job.rate_factor(step.number))
    loss_sum, norm = 0.0, 0.0
    if supervised:
        for i, row in enumerate(step.rows):
            seed_row(job.run.config.seed, step.number, engine.rank * len(step.rows) + i)
            losses_S = job.packed(**job.inputs(row, True))
            engine.backward(losses_S, supervised, last=i == len(step.rows) - 1)
            loss_sum += float(losses_S.detach().double().sum())
        if not job.proof.done:
            job.proof.before_update(reached_pictures=images > 0)
        update = engine.update()
        norm = update.norm
        if update.applied and not job.proof.done and (proved := job.proof.after_update(step.number + 1)):
            job.journal.say(f"proved: {proved}")
    loss_sum = engine.sums([loss_sum])[0]
    return {
        "step": step.number + 1, "kind": "train", "loss": loss_sum / supervised if supervised else None,
        "grad_norm": norm if math.isfinite(norm) else None, "learning_rate": rates, "tokens": int(tokens),
        "supervised_tokens": int(supervised), "samples": int(samples), "images": int(images),
        "epoch": (step.number + 1) / job.data.steps_per_epoch,
    }  # fmt: skip


def performance(job: Job, line: dict[str, Any], began: float, waited: float) -> dict[str, float]:
    seconds = time.monotonic() - began
    return {
        "step_seconds": seconds, "data_wait_seconds": waited,
        "tokens_per_second": line["tokens"] / (seconds + waited),
        "samples_per_second": line["samples"] / (seconds + waited),
        "peak_memory_gib": peak_memory_gib(job.engine.device),
    }  # fmt: skip


def evaluation_due(job: Job) -> bool:
    last = job.done_steps == job.total_steps
    return bool(job.done_steps and job.data.eval_datasets and (last or job.done_steps % job.run.config.eval_steps == 0))


def run_evaluation(job: Job) -> None:
    engine, data = job.engine, job.data
    job.packed.eval()
    began = time.monotonic()
    with engine.autocast():
        line: dict[str, Any] = evaluate.held_out_loss(
            engine, job.packed, data.eval_rows(data.eval_datasets), job.inputs, data.dataset_of, data.eval_datasets
        )
        for dataset, scripts in job.metrics.items():
            made = evaluate.predictions(
                engine, job.model, data.eval_rows([dataset]), job.inputs, data.chat.tokenizer, data.describe
            )
            line |= evaluate.score(dataset, made, scripts)
            job.journal.predictions(job.done_steps, dataset, made)
    job.packed.train()
    perf = {"eval_seconds": time.monotonic() - began}
    job.journal.metrics({"step": job.done_steps, "kind": "eval", **line, "perf": perf})


def save_checkpoint(job: Job) -> None:
    # Gathering is collective: all ranks call, the main process gets the tensors and writes.
    tensors = {"weights": job.engine.weights(job.model), "optimizer": job.engine.moments(job.optimizer)}
    if job.engine.is_main:
        state = {"global_batch": job.global_batch, "options": resolved(job.run), "bad": job.data.bad,
                 "scaler": job.engine.scaler_state()}  # fmt: skip
        checkpoints.save(job.folder.checkpoints, job.done_steps, tensors, state)
        checkpoints.keep_newest(job.folder.checkpoints, job.run.config.save_total_limit)
    job.engine.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Hand over: a Hugging Face folder, and the next command to type.
# ---------------------------------------------------------------------------------------------------------------------


def hand_over(job: Job) -> None:
    whole = job.engine.weights(job.model, export.needed(job.strategy, job.model, job.source))
    if job.engine.is_main:
        limits = {"min_pixels": job.data.options.min_pixels, "max_pixels": job.data.options.max_pixels}
        facts = {"strategy": job.run.config.tuning_strategy, "distribution": job.run.distribution}
        export.save_result(job.strategy, job.model, job.source, whole, job.folder.model, facts=facts, **limits)
        job.journal.say(f"model: {job.folder.model}")
        if (job.folder.model / "adapter_config.json").exists():
            job.journal.say(f"merge: vlft merge {job.folder.model} --output_dir {job.folder.root / 'merged'}")
    job.engine.wait()
