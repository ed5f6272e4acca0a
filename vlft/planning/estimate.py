"""One training, estimated: from its options to memory and time on one GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from vlft.config import Run, RunConfig, deepspeed_path, memory_plan
from vlft.data.prepare import Data, prepare_data
from vlft.models.flops import Shape, Training, describe
from vlft.models.kernels.block import Keep
from vlft.models.load import Checkpoint, compute_dtype, load_config, open_checkpoint, picture_facts
from vlft.planning.gpus import Gpu
from vlft.planning.load import Steps, look
from vlft.planning.memory import Memory, Static, memory_of, static_of
from vlft.planning.skeleton import SkeletonSource, prepared
from vlft.planning.time import Time, time_of
from vlft.setup import check_pixels, shared_data_options
from vlft.strategy import Strategy


@dataclass
class Alone:
    """One process on the CPU: what the data needs to know of an engine."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_main: bool = True


@dataclass(frozen=True)
class Estimate:
    run: Run
    gpu: Gpu
    static: Static
    memory: Memory
    time: Time
    steps: Steps
    data: Data

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.gpu.memory


def estimate(run: Run, gpu: Gpu, *, world_size: int = 1) -> Estimate:
    """
    Raises:
        VlftError: as training does: options, model, data or plugin.
    """
    config = run.config
    checkpoint = _checkpoint(config.model_name_or_path, config.trust_remote_code)
    check_pixels(config, checkpoint.pictures)
    data = _data(config, checkpoint, world_size)
    # Of a GPU that computes in it, as nearly all do; what is here may be a laptop.
    compute = compute_dtype(config.mixed_precision or "bf16", load_config(checkpoint))
    shape, training, static = _model(run, checkpoint, compute)
    numbers = {part.part: float(part.parameters) for part in static.parts}
    steps = look(
        data, shape, ranks=world_size, rows_per_rank=config.gradient_accumulation_steps,
        costs=(numbers.get("llm", 1.0), numbers.get("vit", 0.0)),
    )  # fmt: skip
    static = shared_out(static, config, world_size)
    rows = sum(map(len, steps.rows)) / len(steps.rows)
    memory = memory_of(
        static, shape, steps.largest, rows=config.gradient_accumulation_steps, compute=compute.itemsize,
        room=gpu.memory, keep=_keep(config),
    )  # fmt: skip
    work = steps.work()
    share = work.tokens / rows / max(steps.largest.tokens, 1)
    time = time_of(shape, training, work, static, memory, gpu, rows=rows, row_share=share)
    return Estimate(run, gpu, static, memory, time, steps, data)


def shared_out(static: Static, config: RunConfig, world_size: int) -> Static:
    """What one of several processes holds of it under DeepSpeed."""
    if world_size == 1 or not config.deepspeed:
        return static
    stage = int(json.loads(deepspeed_path(config.deepspeed).read_text()).get("zero_optimization", {}).get("stage", 0))
    n = world_size
    parts = [replace(part, bytes=part.bytes / n) for part in static.parts] if stage == 3 else static.parts
    states, gradients = static.states / (n if stage else 1), static.gradients / (n if stage > 1 else 1)
    return replace(static, parts=parts, states=states, gradients=gradients)


def _keep(config: RunConfig) -> Keep | None:
    if config.gradient_checkpointing is not None:
        return "input" if config.gradient_checkpointing else "all"
    return "input" if memory_plan(config.memory) == "low" else None


@lru_cache(maxsize=2)
def _checkpoint(name: str, trust: bool) -> Checkpoint:
    return open_checkpoint(name, trust_remote_code=trust, weights=False)


def _data(config: RunConfig, checkpoint: Checkpoint, world_size: int) -> Data:
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    return prepare_data(
        shared_data_options(
            config, Alone(world_size=world_size), checkpoint, picture_facts(checkpoint), global_batch=batch,
            train_batch_size=config.per_device_train_batch_size, rows_per_rank=config.gradient_accumulation_steps,
            eval_batch_size=1,
        )
    )  # fmt: skip


def _model(run: Run, checkpoint: Checkpoint, compute: torch.dtype) -> tuple[Shape, Training, Static]:
    source = SkeletonSource(checkpoint, load_config(checkpoint), compute, torch.device("meta"))
    make: Callable[..., Strategy] = run.strategy
    model, _ = prepared(make(run.options), source)
    shape, training = describe(model, source.parts, source.config)
    return (
        shape,
        training,
        static_of(model, source.parts, source.tied_head, run.config.optim, compute.itemsize, shape),
    )
