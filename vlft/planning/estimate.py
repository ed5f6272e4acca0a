"""One training, estimated: from its options to memory and time on one GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlft.augmentation.policy import read_policy
from vlft.config import Run, RunConfig, deepspeed_path, global_batch
from vlft.data.budget import Budget
from vlft.data.prepare import Data, prepare_data
from vlft.data.tokens import Chat
from vlft.engine.zero import sums_in_fp32
from vlft.family import Family
from vlft.models.flops import Shape, Training, describe
from vlft.models.load import Checkpoint, Source, compute_dtype, load_config, open_checkpoint
from vlft.planning.gpus import Gpu
from vlft.planning.load import Steps, look
from vlft.planning.memory import NF4, Memory, Static, memory_of, static_of
from vlft.planning.skeleton import SkeletonSource, prepared
from vlft.planning.time import Time, time_of
from vlft.setup import Alone, check_optimizer, costs_of, data_options
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
    check_optimizer(config, config.mixed_precision or "bf16", sharded=bool(config.deepspeed))
    gpu = allowed(gpu, config)
    checkpoint = _checkpoint(config.model_name_or_path, config.trust_remote_code)
    batch = global_batch(config, world_size)
    # Where pictures move, so do the coordinates in texts: rows are planned with room for longer ones.
    policy = read_policy(config.augmentation) if config.augmentation else None
    data = prepare_data(data_options(run, Alone(world_size=world_size), checkpoint, batch, policy), _chat)
    # Of a GPU that computes in it, as nearly all do; what is here may be a laptop.
    compute = compute_dtype(config.mixed_precision or "bf16", load_config(checkpoint))
    shape, training, static = _model(run, compute)
    steps = look(data, shape, costs=costs_of((shape, training), static.parts), budget=Budget())
    zero = json.loads(deepspeed_path(config.deepspeed).read_text()) if config.deepspeed else None
    static = shared_out(static, cut_of(zero, compute), world_size, compute=compute.itemsize)
    if compute == torch.bfloat16 and not config.reference:
        static = as_trained(static, steps, alone=world_size == 1)
    memory, time = expected(config, static, shape, training, steps, gpu, compute)
    return Estimate(run, gpu, static, memory, time, steps, data)


def allowed(gpu: Gpu, config: RunConfig) -> Gpu:
    """As far as a process may use it by `--memory SIZE`."""
    if isinstance(size := config.kept, int) and size < gpu.memory:
        return replace(gpu, name=f"{gpu.name}, --memory {config.memory}", memory=size)
    return gpu


def as_trained(static: Static, steps: Steps, *, alone: bool) -> Static:
    """With masters as whole copies have them (`vlft.engine.Engine.splits_masters`), and gradients as narrow as the
    steps of one process let them be (`vlft.setup.Job.expect`)."""
    if not static.masters or static.sharded:
        return static
    one_row = all(len(rows) == 1 for rows in steps.rows)
    return static.split().narrowed() if alone and one_row else static.split()


def expected(
    config: RunConfig, static: Static, shape: Shape, training: Training, steps: Steps, gpu: Gpu, compute: torch.dtype
) -> tuple[Memory, Time]:
    """Of one process; `static`: what it holds."""
    rows = sum(map(len, steps.rows)) / len(steps.rows)
    memory = memory_of(
        static, shape, steps.largest, rows=math.ceil(rows), compute=compute.itemsize, room=gpu.memory, plan=config.kept,
        reference=config.reference,
    )  # fmt: skip
    work = steps.work()
    share = work.tokens / rows / max(steps.largest.tokens, 1)
    return memory, time_of(shape, training, work, static, memory, gpu, rows=rows, row_share=share)


@dataclass(frozen=True)
class Cut:
    """What an engine cuts up, and where it keeps it."""

    stage: int = 0
    """as ZeRO counts: 1 cuts up optimizer states, 2 gradients too, 3 weights too (FSDP does)"""
    masters: bool = False
    """Trained weights and gradients are in the compute dtype, and fp32 masters beside the states."""
    states_away: bool = False
    """Optimizer states and masters are in the host's memory, and the gradients go there."""
    weights_away: bool = False
    """Weights are, and come to the GPU for their layer."""
    packed_whole: bool = False
    """Packed 4-bit weights are not cut up (FSDP)."""
    wide_sums: bool = False
    """What is cut up of gradients is in fp32, although they come in the compute dtype."""


def cut_of(deepspeed: Mapping[str, Any] | None, compute: torch.dtype) -> Cut:
    """By DeepSpeed's configuration; nothing without."""
    if deepspeed is None:
        return Cut()
    zero = deepspeed.get("zero_optimization", {})
    away = {
        what: (zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")
    }
    return Cut(
        int(zero.get("stage", 0)), True, states_away=away["optimizer"], weights_away=away["param"],
        wide_sums=sums_in_fp32(deepspeed, bf16=compute == torch.bfloat16),
    )  # fmt: skip


def shared_out(static: Static, cut: Cut, world_size: int, *, compute: int) -> Static:
    """What one of several processes holds of it.

    Args:
        compute: bytes of a number in the compute dtype.
    """
    n, parts, states = world_size, static.parts, static.states
    if cut.masters:
        parts = [replace(part, bytes=part.bytes - part.trainable * (4 - compute)) for part in parts]
        states += 4.0 * sum(part.trainable for part in parts)
        static = static.scaled(compute / 4)
    if cut.stage == 3:
        whole = [NF4 * part.quantised if cut.packed_whole else 0.0 for part in parts]
        parts = [
            replace(part, bytes=0.0 if cut.weights_away else still + (part.bytes - still) / n)
            for part, still in zip(parts, whole, strict=True)
        ]
    gradients = 0.0 if cut.states_away else static.gradients / (n if cut.stage > 1 else 1)
    if cut.wide_sums:
        gradients *= 4 / compute
    states = 0.0 if cut.states_away else states / (n if cut.stage else 1)
    return replace(static, parts=parts, states=states, gradients=gradients, sharded=cut.stage > 0)


@lru_cache(maxsize=2)
def _chat(folder: Path, family: Family) -> Chat:
    """No change that is tried leads to another tokenizer, and one of 150,000 tokens takes a second to load."""
    return Chat.load(folder, family)


@lru_cache(maxsize=2)
def _checkpoint(name: str, trust: bool) -> Checkpoint:
    return open_checkpoint(name, trust_remote_code=trust, weights=False)


@dataclass(frozen=True)
class _Made:
    model: nn.Module
    source: Source
    shape: Shape
    training: Training


def _model(run: Run, compute: torch.dtype) -> tuple[Shape, Training, Static]:
    c = run.config
    made = _made(run.strategy, run.options.model_dump_json(), c.model_name_or_path, c.trust_remote_code, compute)
    parts, tied = made.source.parts, made.source.tied_head
    static = static_of(made.model, parts, tied, run.config.optim, compute.itemsize, made.shape)
    return made.shape, made.training, static


@lru_cache(maxsize=8)
def _made(strategy: type[Strategy], options: str, name: str, trust: bool, compute: torch.dtype) -> _Made:
    """Most changes that are tried leave the model as it is."""
    checkpoint = _checkpoint(name, trust)
    source = SkeletonSource(checkpoint, load_config(checkpoint), compute, torch.device("meta"))
    make: Callable[..., Strategy] = strategy
    model, _ = prepared(make(strategy.Config.model_validate_json(options)), source)
    return _Made(model, source, *describe(model, source.parts, source.config))
