"""Words -> objects: everything that the loop needs, checked before the first step.

Whatever can be wrong with options, data, model, strategy or checkpoint is found here.
"""

from __future__ import annotations

import math
import shutil
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import nn

from vlft import card, compiler, evaluate, export
from vlft import checkpoint as checkpoints
from vlft.augmentation.policy import Policy, read_policy
from vlft.batch import Feed, ToInputs
from vlft.config import (
    Run,
    RunConfig,
    SharedOptions,
    accumulation_for,
    check_output_dir,
    check_resume,
    global_batch,
    resolved,
    resolved_yaml,
)
from vlft.data.budget import Budget
from vlft.data.prepare import Data, DataOptions, prepare_data
from vlft.data.sample import Costs
from vlft.engine import Engine, seed_start
from vlft.errors import CheckpointError, ConfigError, DataError, StrategyError, VlftError
from vlft.evaluate import Answers
from vlft.gallery import thumbnails, write_gallery
from vlft.interrupt import Interrupt
from vlft.meter import Meter
from vlft.metrics import Metric, load_script, lower_is_better
from vlft.models import attention_by_cudnn
from vlft.models.flops import Shape, Training, Work, unit_flops
from vlft.models.forward import PackedVLM
from vlft.models.kernels import Memory, memory_for, room_on_gpu
from vlft.models.kernels.memory import MARGIN, MARGIN_WITHOUT_RETRY
from vlft.models.load import (
    Checkpoint,
    PictureFacts,
    Source,
    cast,
    open_checkpoint,
    read_json,
    source_of,
    without_zero3,
)
from vlft.optim import Multiplier, build_optimizer, master_dtype, schedule
from vlft.proof import Proof, check_groups, logical_size, part_table, render
from vlft.rivals import nearest
from vlft.strategy import ParamGroup, Strategy
from vlft.terminal import dataset_table, duration
from vlft.trackers import Trackers
from vlft.tracking import Best, Journal, RunFolder, cut_back, run_card, told, write_json
from vlft.words import counted

SAMPLES_OF_A_TRIAL = 4
"""On which every script is tried before the first step."""
GALLERY = 12
"""Held-out samples of each data set that the report shows."""


@dataclass
class Job:
    """Everything that the loop needs."""

    run: Run
    engine: Engine
    folder: RunFolder
    source: Source
    strategy: Strategy
    model: nn.Module
    """What the strategy prepared."""
    packed: nn.Module
    """The one wrapped module: `model` inside `PackedVLM` inside DDP."""
    optimizer: torch.optim.Optimizer
    rate_factor: Multiplier
    proof: Proof
    data: Data
    inputs: ToInputs
    metrics: dict[str, dict[str, Metric]]
    journal: Journal
    interrupt: Interrupt
    costs: Costs
    """What ranks are balanced by."""
    global_batch: int
    total_steps: int
    done_steps: int
    skipped: int
    """Steps in a row, up to now, whose loss or gradient was not finite."""
    budget: Budget
    """What rows may hold, as steps that are done have taught."""
    trial: Budget
    """The same, with what this step tries."""
    memory: Memory
    """What layers keep of each row."""
    meter: Meter
    answers: Answers
    best: Best | None
    """The best evaluation so far, where --metric_for_best asks for it."""
    warned: bool = False
    """Of slow saves."""
    stopping: bool = False
    """All ranks agree to end after this step."""
    steps: Feed = field(init=False)
    done_before: int = field(init=False)
    """Steps that were done when this process took the run up."""

    def __post_init__(self) -> None:
        self.done_before = self.done_steps

    def open_steps(self) -> None:
        """(Re)start the loader, at the step after the last one done, with the budget that holds now."""
        self.memory.short = self.trial.short
        self.steps = Feed(self.data.steps(self.done_steps, self.total_steps, self.costs, self.trial), self.inputs)

    def expect(self, rows: int) -> None:
        """Before a step's first row, also of another try: gradients that no other row's are added to may be narrow."""
        if self.engine.narrows_gradients:
            # Of a whole copy, which no engine has wrapped into a class of its own; mypy knows an nn.Module alone.
            self.packed.narrow_gradients(torch.bfloat16 if rows == 1 else None)  # type: ignore[operator]

    @property
    def eval_on_start(self) -> bool:
        asked = self.run.config.eval_on_start
        return bool(self.metrics) if asked is None else asked

    @property
    def is_best(self) -> bool:
        """Whether the step that was done last is the best one so far."""
        return self.best is not None and self.best.step == self.done_steps > 0

    def judge_best(self) -> None:
        """After an evaluation, on all ranks: which is the best now?"""
        if best := self.best:
            self.best = self.engine.on_main(lambda: self.journal.best(best))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors."""
        return {
            "global_batch": self.global_batch, "options": resolved(self.run), "bad": self.data.bad,
            "scaler": self.engine.scaler_state(), "skipped": self.skipped, "budget": self.budget.json(),
            "proved": self.proof.state(), "data": self.data.fingerprint, "precision": self.engine.precision,
            "augmentation": self.data.options.policy.digest if self.data.options.policy else None,
        }  # fmt: skip


def setup(run: Run, engine: Engine) -> Job:
    config, folder = run.config, RunFolder(run.config.output_dir)
    check_memory(config, engine.device)
    engine.on_main(lambda: check_output_dir(config))
    resume = engine.on_main(lambda: checkpoints.find(config.resume_from_checkpoint, folder.checkpoints))
    # Once, not on every rank: the checksums of a large model's states take a while.
    state = engine.on_main(lambda: checkpoints.read_state(resume)) if resume else None
    policy = read_policy(config.augmentation) if config.augmentation else None
    metrics = load_metrics(engine, config.eval_dataset_scripts)
    checkpoint = base_checkpoint(run, engine, folder, fresh=resume is None)
    source = source_of(
        checkpoint, engine.precision, engine.device, sharded=engine.shards_weights, packed_too=engine.shards_packed
    )

    batch = int(state["global_batch"]) if state else global_batch(config, engine.world_size)
    if state:
        check_resume(state["options"], run, stored_global_batch=batch, world_size=engine.world_size,
                     precision=(state["precision"], engine.precision))  # fmt: skip
    data = same_data(engine, data_options(run, engine, checkpoint, batch, policy))
    if state and state["data"] != data.fingerprint:
        raise CheckpointError(
            f"the data are not those of {resume} (now {data.plan.samples_per_epoch} training samples an epoch); go on "
            "with the data as they were, or start a new --output_dir from the result."
        )
    if state and state.get("augmentation") != (policy.digest if policy else None):
        raise CheckpointError(
            f"the augmentation policy {config.augmentation} is not that of {resume}; go on with the file as it was, or "
            "start a new --output_dir from the result."
        )
    best = choose_best(config, try_metrics(engine, data, metrics))
    done = int(state["step"]) if state else 0
    # 1.1 x 100 is 110.00000000000001, which would be a step too many.
    total = config.max_steps or math.ceil(config.epochs * data.steps_per_epoch - 1e-9)

    if done > total:
        raise CheckpointError(
            f"{resume} is of step {done}, beyond the {total} that --max_steps or --epochs ask for; ask for more, or go "
            "on from an earlier checkpoint."
        )

    seed_start(config.seed)
    strategy, model, groups = prepare_strategy(run, source)
    check_groups(model, groups, config.tuning_strategy, source.parts, run.rates, source.tied_head)
    check_same(
        engine, f"{len(groups)} groups, digest {digest_of(groups)}", StrategyError,
        f"the parameter groups of '{config.tuning_strategy}'",
        "prepare_model and param_groups must not depend on the rank or on chance",
    )  # fmt: skip
    check_optimizer(config, engine.precision, sharded=engine.shards_states)
    cast(model, source.compute_dtype, masters=not engine.keeps_masters and config.optim == "adamw")
    optimizer = build_optimizer(
        model, groups, run.rates, config.weight_decay, config.optim, engine.device, torchs_own=engine.wants_torchs_adamw
    )
    table = part_table(model, groups, source.parts, run.rates, source.tied_head)
    meter = Meter(model, source.parts, source.config, engine.device, engine.precision)
    saved = checkpoints.load_weights(resume, model) if resume else {}
    if resume:
        engine.restore_weights(model, saved)
    wrapped = PackedVLM(model, source.parts, source.config.image_token_id, reference=config.reference)
    packed = engine.prepare(wrapped, optimizer, whole=wrapped.installed.layers)
    if engine.splits_masters:
        wrapped.split_masters()
    memory = remember(wrapped, config, engine)
    proof = Proof(model, groups, engine)  # FSDP puts other parameters in the place of those before `prepare`
    if resume and state:
        engine.restore_state(optimizer, saved, checkpoints.load_tensors(resume, "optimizer"))
        engine.restore_scaler(state["scaler"])
        data.restore([*state["bad"], *told_since_save(engine, folder, int(state["step"]))])
        proof.restore(state["proved"])

    warmup = math.ceil(0.03 * total) if config.warmup_steps is None else config.warmup_steps
    budget = known_budget(state, folder, engine, data)
    trackers = Trackers(
        config.trackers, folder.root, project=config.wandb_project, run_name=config.wandb_run_name, done_steps=done,
        options=resolved(run), rates=lambda: {g["name"]: g["lr"] for g in optimizer.param_groups},
        thumbnails=lambda: thumbnails(folder.gallery),
    )  # fmt: skip
    job = Job(
        run, engine, folder, source, strategy, model, packed, optimizer,
        schedule(config.lr_scheduler_type, warmup, total), proof, data,
        ToInputs(checkpoint.pictures, data.options.policy, engine.device), metrics,
        Journal(folder, trackers, is_main=engine.is_main, total_steps=total), Interrupt(speaks=engine.is_main),
        costs_of(meter.counts, table), batch, total, done, int(state["skipped"]) if state else 0, budget, budget,
        memory, meter, Answers(config.eval_max_new_tokens, config.eval_temperature, config.seed), best,
    )  # fmt: skip
    engine.on_main(trackers.start)
    open_folder(job)
    job.judge_best()
    kernels = kernels_sentence(engine.device, engine.gather)
    if engine.is_main:
        counts = dataset_table(read_json(folder.data)["datasets"])
        chosen = [best_sentence(best)] if best else []
        if config.warmup_steps and warmup > total:
            chosen.append(
                f"--warmup_steps {warmup} of {counted(total, 'step')}: the rates end before they reach what is given."
            )
        runs = (wrapped.said(), *kernels, *engine.said(), start_sentence(job))
        for note in (*run.notes, *data.summary, counts, *chosen, *runs, render(table)):
            job.journal.say(note)
    return job


def same_data(engine: Engine, options: DataOptions) -> Data:
    """The data, on the main process first, which the others find indexed.

    Raises:
        DataError: as `prepare_data`, or a machine that has other files.
    """
    data = engine.main_first(lambda: prepare_data(options))
    advice = "give all machines the same files and pictures under the same paths"
    check_same(engine, data.told, DataError, "the data", advice)
    return data


def check_same(engine: Engine, mine: str, kind: type[VlftError], what: str, advice: str) -> None:
    """Raise `kind` on all ranks where `mine`, which says what `what` is on this one, is not the same on all: each would
    take its part of another step, and none would be told.
    """
    seen = engine.gather([(socket.gethostname(), mine)])
    for rank, (host, found) in enumerate(seen):
        if found != seen[0][1]:
            raise kind(
                f"process {rank} (on {host}) finds {what} to be other than process 0 (on {seen[0][0]}): {found} there, "
                f"{seen[0][1]} here; {advice}."
            )


def digest_of(groups: Sequence[ParamGroup]) -> str:
    return xxhash.xxh3_64_hexdigest(repr(list(groups)).encode())[:8]


def load_metrics(engine: Engine, scripts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Metric]]:
    """The scripts of each data set by their stem, on the main process; on the others the data sets alone."""
    found: dict[str, dict[str, Metric]] = {dataset: {} for dataset in scripts}

    def load() -> None:
        for dataset, names in scripts.items():
            found[dataset] = dict(load_script(name) for name in names)

    engine.on_main(load)
    return found


def try_metrics(engine: Engine, data: Data, metrics: Mapping[str, Mapping[str, Metric]]) -> set[str]:
    """Try every script on a few held-out samples of its data set.

    Returns:
        The keys that evaluations will give.
    Raises:
        ConfigError: a data set of no such name, one without held-out samples, or a script that fails.
    """
    check_scored(set(metrics), data.names, data.eval_datasets)

    def rehearse() -> set[str]:
        keys: set[str] = set()
        for dataset, scripts in metrics.items():
            keys |= evaluate.rehearse(dataset, data.some_held_out(dataset, SAMPLES_OF_A_TRIAL), scripts)
        return keys

    return {f"eval/{name}/loss" for name in data.eval_datasets} | engine.on_main(rehearse)


def check_scored(wanted: Collection[str], names: Sequence[str], held_out: Collection[str]) -> None:
    """Raise a ConfigError about data sets whose answers shall be scored and which are not there, or not held out."""
    if strange := sorted(set(wanted) - set(names)):
        raise ConfigError(
            [
                f"--eval_dataset_scripts: there is no data set '{name}' here{nearest(name, names)}; "
                f"there is {', '.join(names)}."
                for name in strange
            ]
        )
    if unknown := sorted(set(wanted) - set(held_out)):
        raise ConfigError(
            f"--eval_dataset_scripts names {', '.join(unknown)}, which has no held-out samples; "
            "lower --train_split_ratio or leave it out."
        )


def choose_best(config: RunConfig, keys: Collection[str]) -> Best | None:
    """What --metric_for_best means.

    Raises:
        ConfigError: no evaluation gives it.
    """
    if config.metric_for_best is None:
        return None
    key = "eval/" + config.metric_for_best.removeprefix("eval/")
    if key not in keys:
        raise ConfigError(
            f"--metric_for_best {config.metric_for_best} is no metric of this run{nearest(key, keys)}; it has "
            f"{', '.join(sorted(keys)) or 'none, since nothing is held out'}."
        )
    given = config.greater_is_better
    return Best(key, not lower_is_better(key) if given is None else given)


def best_sentence(best: Best) -> str:
    """A user's own metric may be called anything, so that the direction is said while it can still be changed."""
    better, other = ("greatest", "false") if best.greater else ("smallest", "true")
    return f"the best checkpoint is that with the {better} {best.metric}; --greater_is_better {other} turns that round."


def prepare_strategy(run: Run, source: Source) -> tuple[Strategy, nn.Module, list[ParamGroup]]:
    """Build the strategy and let it load its model.

    Raises:
        StrategyError: the plugin fails; it is named with its distribution, and the cause is kept.
    """
    try:
        strategy = run.strategy(run.options)  # type: ignore[call-arg]  # a protocol says nothing of constructors
        model = strategy.prepare_model(source)
        return strategy, model, list(strategy.param_groups(model))
    except (VlftError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a plugin may raise anything
        raise StrategyError(
            f"strategy '{run.config.tuning_strategy}' of {run.distribution} failed while it prepared the model: "
            f"{type(error).__name__}: {error}; ask its authors."
        ) from error


def check_optimizer(config: RunConfig, precision: str, *, sharded: bool) -> None:
    """
    Args:
        precision: that training computes in.
        sharded: an engine cuts optimizer states up.
    Raises:
        ConfigError: an optimizer without masters is asked for where there must be some.
    """
    if config.optim == "adamw":
        return
    if sharded:
        raise ConfigError(
            f"--optim {config.optim} runs on one GPU or on whole copies; with DeepSpeed or FSDP, whose own "
            "masters are cut up, use adamw."
        )
    if precision != "bf16":
        raise ConfigError(
            f"--optim {config.optim} keeps trained weights in bf16, but --mixed_precision is "
            f"{precision}; give --mixed_precision bf16, or use adamw."
        )


def kernels_sentence(device: torch.device, gather: Callable[[list[str]], list[str]]) -> list[str]:
    """Which kernels some process lacks: lines, or none. Collective: machines may differ."""
    if device.type != "cuda":
        return []
    lines = [compiler.said(why) for why in gather([compiler.trouble()]) if why][:1]
    return lines + [attention_by_cudnn.said(why) for why in gather([attention_by_cudnn.missing(device)]) if why][:1]


def check_memory(config: RunConfig, device: torch.device) -> None:
    """
    Raises:
        ConfigError: the size of a GPU is given where there is none.
    """
    if isinstance(config.kept, int) and device.type != "cuda":
        raise ConfigError(
            f"--memory {config.memory} is the size of a GPU, but this run is on the {device.type}; give all, low or "
            "the path of a YAML file, or leave it out."
        )


def remember(packed: PackedVLM, config: RunConfig, engine: Engine) -> Memory:
    """What layers keep for their backward pass. Those that keep transformers' forward keep all or their input."""
    on_gpu = engine.device.type == "cuda"
    plan = config.kept
    size = plan if isinstance(plan, int) else None
    chooses = on_gpu and (plan == "auto" or size is not None)
    head = getattr(packed.hf.get_submodule(packed.parts.head), "weight", None)
    # What is gathered for the head may stay for the whole backward pass.
    stays = beside_head(head, engine) if engine.shards_weights else 0
    margin = MARGIN if engine.retries else MARGIN_WITHOUT_RETRY
    beside = stays + engine.passing_bytes()
    room = room_on_gpu(engine.device, lambda: engine.pending_bytes() + beside, size, margin) if chooses else None
    vocabulary = int(packed.hf.config.get_text_config().vocab_size)
    packed.memory = memory_for(
        packed.installed, vocabulary, plan, room, gradients_stay=not engine.shards_states,
        beside=lambda: 0 if engine.shards_weights else beside_head(head, engine),
    )  # fmt: skip
    packed.installed.holds = plan != "low" and not engine.shards_states
    if plan == "low" or chooses:
        # Non-reentrant: frozen embeddings give inputs without a gradient, which the reentrant kind would cut off.
        packed.hf.gradient_checkpointing_enable({"use_reentrant": False})
        packed.hf.disable_input_require_grads()  # which the line before asks for, for the reentrant kind's sake
        for layer in packed.installed.layers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
    return packed.memory


def beside_head(weight: nn.Parameter | None, engine: Engine) -> int:
    """Bytes of the head's weight cast to the compute dtype or gathered, and of its gradient before it is widened, added
    to that of a row before, or handed on. None: a plugin's head, of which nothing is known."""
    if weight is None:
        return 0
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(engine.precision, weight.dtype)
    numbers = logical_size(weight)
    cast = weight.dtype != compute or engine.shards_weights
    narrow = weight.requires_grad and (weight.dtype != compute or engine.shards_states or weight.grad is not None)
    wide = weight.requires_grad and weight.dtype != compute and weight.grad is not None
    # The cast is gone by the time that the gradient is widened.
    return numbers * max(compute.itemsize * (cast + narrow), (compute.itemsize + weight.dtype.itemsize) * wide)


def known_budget(state: Mapping[str, Any] | None, folder: RunFolder, engine: Engine, data: Data) -> Budget:
    """Of the checkpoint, and of a run that ended out of memory since."""
    budget = Budget.from_json(state["budget"]) if state else Budget()
    left = engine.from_main(read_json(folder.budget) if engine.is_main and folder.budget.exists() else None)
    if not left:
        return budget
    found = Budget.from_json(left)
    # Its samples are numbers: of other data these would be other samples.
    return budget.meet(found if left.get("data") == data.fingerprint else replace(found, without=()))


def told_since_save(engine: Engine, folder: RunFolder, step: int) -> list[dict[str, Any]]:
    """Ledger entries of the evaluation that follows the checkpoint's save: the checkpoint does not know of them."""
    lines = engine.from_main(told(folder.ledger, step) if engine.is_main else [])
    return [line for line in lines if line["step"] == step and line["reason"] != "not_finite"]


class _Sized(Protocol):
    @property
    def part(self) -> str: ...
    @property
    def parameters(self) -> int: ...


ATTENTION = 3.0
"""How much longer attention takes for a FLOP than a product does: 2.7 times by cuDNN, 4.2 by flash kernels, as
`vlft.planning.time` has it."""


def costs_of(counts: tuple[Shape, Training] | None, rows: Sequence[_Sized]) -> Costs:
    """FLOPs, forward and backward, as the model trains: a frozen tower has no backward pass, and one that trains below
    adapters, whose language model has no gradients of its weights, costs half as much again for a parameter.

    Args:
        counts: of the prepared model; None: of layers that no formula knows, so that parameters must do.
        rows: its parts.
    """
    if counts is None:
        sizes = {row.part: float(row.parameters) for row in rows}
        return Costs(token=sizes.get("llm", 1.0), patch=sizes.get("vit", 0.0))
    shape, _ = counts
    cost = Work(*unit_flops(*counts))
    whole_windows = (shape.window * shape.merge) ** 2
    return Costs(
        token=cost.tokens, learnt=cost.supervised,
        token_pair=ATTENTION * cost.causal_pairs, patch_pair=ATTENTION * cost.frame_pairs,
        patch=cost.patches + cost.merged / shape.merge**2 + ATTENTION * cost.window_pairs * whole_windows,
    )  # fmt: skip


def start_sentence(job: Job) -> str:
    c, world = job.run.config, job.engine.world_size
    rows = accumulation_for(c, world, job.global_batch)
    going = f"going on after step {job.done_steps}" if job.done_steps else "from the start"
    if job.done_steps == job.total_steps:
        going = "all done before"
    precision = "fp32" if job.engine.precision == "no" else job.engine.precision
    return (
        f"{c.tuning_strategy} from {job.run.distribution}, {precision} on {job.engine.device.type}: "
        f"{counted(job.total_steps, 'step')} of {counted(job.global_batch, 'sample')} "
        f"({c.per_device_train_batch_size} a forward x {counted(rows, 'forward')} x {counted(world, 'process')}), "
        f"{going}."
    )


def end_sentence(job: Job) -> str:
    if job.done_before == job.total_steps:
        return f"this run is at its last step, {job.total_steps}; nothing was left to train."
    trained, seconds = ", ".join(job.proof.proved) or "nothing", time.monotonic() - job.journal.began
    steps = counted(job.done_steps, "step")
    here = f", the last {job.done_steps - job.done_before} of them" if job.done_before else ""
    return f"trained {trained} by {job.run.config.tuning_strategy} for {steps}{here} in {duration(seconds)}"


def base_checkpoint(run: Run, engine: Engine, folder: RunFolder, *, fresh: bool) -> Checkpoint:
    """The model to start from. The adapter of an earlier run is merged into output_dir/base first (a second stage).

    Args:
        fresh: a training from its first step, of which nothing is there yet.
    """
    trust = run.config.trust_remote_code
    found = open_checkpoint(run.config.model_name_or_path, trust_remote_code=trust)
    if not found.is_adapter:
        return found
    engine.on_main(lambda: merge_base(found.folder, folder.base, fresh=fresh))
    return open_checkpoint(str(folder.base), trust_remote_code=trust)


def merge_base(adapter: Path, base: Path, *, fresh: bool) -> None:
    """Merge `adapter` into `base`. What weights were trained on stays as it was; only a fresh start makes it anew,
    where an earlier one, which ended before its first checkpoint, has merged another adapter there.
    """
    whole, mark = (base / "config.json").exists(), base / "merged_from.json"
    if whole and not fresh:
        return
    files = {file.name: checkpoints.checksum(file) for file in sorted(adapter.glob("adapter_*"))}
    if whole and mark.exists() and read_json(mark)["files"] == files:
        return
    if base.exists():
        shutil.rmtree(base)
    with without_zero3():  # else the base would be cut up on the one process that merges
        export.merge(adapter, base)
    write_json(mark, {"adapter": str(adapter.resolve()), "files": files})


def data_options(
    run: Run, engine: Place, checkpoint: Checkpoint, batch: int, policy: Policy | None = None
) -> DataOptions:
    c, pictures = run.config, checkpoint.pictures
    check_pixels(c, pictures)
    return shared_data_options(
        c, engine, checkpoint, pictures, global_batch=batch, train_batch_size=c.per_device_train_batch_size,
        rows_per_rank=accumulation_for(c, engine.world_size, batch), eval_batch_size=c.per_device_eval_batch_size,
        policy=policy,
    )  # fmt: skip


def check_pixels(c: RunConfig, pictures: PictureFacts) -> None:
    """Raise a ConfigError where the largest picture would be smaller than the checkpoint's smallest."""
    if not c.min_pixels and c.max_pixels < pictures.min_pixels:
        raise ConfigError(
            f"--max_pixels is {c.max_pixels}, below the {pictures.min_pixels} pixels of the checkpoint's smallest "
            "picture; raise it or give --min_pixels."
        )


class Place(Protocol):
    """What the data needs to know of an engine."""

    rank: int
    world_size: int
    device: torch.device
    is_main: bool


@dataclass
class Alone:
    """A place without an engine, on the CPU: for commands that look at data and train nothing."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_main: bool = True


def shared_data_options(
    c: SharedOptions, engine: Place, checkpoint: Checkpoint, pictures: PictureFacts, **own: Any
) -> DataOptions:
    """What training and `vlft eval` ask of the data alike; `own`: the fields in which they differ."""
    return DataOptions(
        registry=c.dataset_config_path, names=c.dataset_names, folder=checkpoint.folder, family=checkpoint.family,
        layout=pictures.layout, min_pixels=c.min_pixels or pictures.min_pixels,
        max_pixels=c.max_pixels or pictures.max_pixels, max_seq_length=c.max_seq_length, on_too_long=c.on_too_long,
        train_split_ratio=c.train_split_ratio, max_bad_fraction=c.max_bad_fraction,
        allow_remote_images=c.allow_remote_images, cache_dir=c.cache_dir, seed=c.seed, rank=engine.rank,
        world_size=engine.world_size, num_workers=c.num_workers, pin_memory=engine.device.type == "cuda",
        progress=engine.is_main, eval_limit=c.eval_limit, **own,
    )  # fmt: skip


def result_facts(run: Run, folder: RunFolder, unproved: Sequence[str], step: int | None) -> dict[str, Any]:
    """What a result says of the run that it came from, in vlft.json; `step`: of its weights, None for the last."""
    return {
        "strategy": run.config.tuning_strategy, "options": run.options.model_dump(mode="json"),
        "distribution": run.distribution, "unproved": unproved, "run": card.facts(folder.root, step),
    }  # fmt: skip


def open_folder(job: Job) -> None:
    """Write what describes the run; a resume cuts metrics and ledger back to the step it goes on from."""
    if not job.engine.is_main:
        return
    folder = job.folder
    folder.root.mkdir(parents=True, exist_ok=True)
    config, engine = job.run.config, job.engine
    facts = run_card(
        strategy=config.tuning_strategy, distribution=job.run.distribution, seed=config.seed,
        mixed_precision=engine.precision, world_size=engine.world_size, distributed_type=engine.kind,
        global_batch=job.global_batch, trust_remote_code=config.trust_remote_code,
        dtypes=sorted({str(master_dtype(p)) for p in job.model.parameters()}),
    )  # fmt: skip
    write_json(folder.root / "run_card.json", facts)
    checkpoints.set_aside(sorted(folder.evaluations.glob("step-*")), job.done_steps)
    for aside in checkpoints.set_aside(checkpoints.complete(folder.checkpoints), job.done_steps):
        job.journal.say(f"{aside} is of a course that this run leaves; it is kept until you delete it.")
    # The evaluation before the first step belongs to a course that begins there.
    cut_back(folder.metrics, job.done_steps or -1)
    cut_back(folder.ledger, job.done_steps)
    if not job.done_steps:
        folder.ledger.write_text("")
        job.journal.ledger(entry.json() for entry in job.data.ledger)
    # A run that ended out of memory could not do this any more.
    unfit = job.data.account([job.data.unfit(i, job.done_steps) for i in job.budget.without])
    job.journal.ledger(entry.json() for entry in unfit)
    (folder.root / "run.yaml").write_text(resolved_yaml(job.run))
    write_json(folder.data, job.data.statistics())
    if not (folder.gallery / "gallery.json").exists():
        write_gallery(folder.gallery, job.data.gallery(GALLERY), boxes=job.source.checkpoint.family.box_convention)
