"""One training, estimated: from its options to memory and time on one GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from vlft.config import Run, RunConfig, deepspeed_path, global_batch
from vlft.data.prepare import Data, prepare_data
from vlft.models.flops import Shape, Training, describe
from vlft.models.load import Checkpoint, compute_dtype, load_config, open_checkpoint
from vlft.planning.gpus import Gpu
from vlft.planning.load import Steps, look
from vlft.planning.memory import Memory, Static, memory_of, static_of
from vlft.planning.skeleton import SkeletonSource, prepared
from vlft.planning.time import Time, time_of
from vlft.setup import Alone, data_options, part_costs
from vlft.strategy import Strategy


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
    if isinstance(size := config.kept, int) and size < gpu.memory:
        gpu = replace(gpu, name=f"{gpu.name}, --memory {config.memory}", memory=size)
    checkpoint = _checkpoint(config.model_name_or_path, config.trust_remote_code)
    batch = global_batch(config, world_size)
    data = prepare_data(data_options(run, Alone(world_size=world_size), checkpoint, batch))
    # Of a GPU that computes in it, as nearly all do; what is here may be a laptop.
    compute = compute_dtype(config.mixed_precision or "bf16", load_config(checkpoint))
    shape, training, static = _model(run, checkpoint, compute)
    steps = look(
        data, shape, ranks=world_size, rows_per_rank=config.gradient_accumulation_steps,
        costs=part_costs(static.parts),
    )  # fmt: skip
    static = shared_out(static, config, world_size)
    rows = sum(map(len, steps.rows)) / len(steps.rows)
    memory = memory_of(
        static, shape, steps.largest, rows=config.gradient_accumulation_steps, compute=compute.itemsize,
        room=gpu.memory, plan=config.kept,
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


@lru_cache(maxsize=2)
def _checkpoint(name: str, trust: bool) -> Checkpoint:
    return open_checkpoint(name, trust_remote_code=trust, weights=False)


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
