"""FSDP2: PyTorch's `fully_shard`, weights, gradients and optimizer states cut up over the GPUs (Zhao et al. 2023).

Who owns which number: the accelerate file, or the FSDP_* variables, own what is kept whole after a forward and
offloaded; vlft's options own precision, clipping and batch.

Accelerate reads its file and sets up the processes, but the model is cut up here. It would make every layer a unit of
its own: a layer of a 3B model takes the GPU a millisecond or two, and its unit's gathering, sums and bookkeeping take
the host about as long, so that the GPU waited for it. Here neighbours are joined to units of some size.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.optim import Optimizer

from vlft.engine.alarm import Alarm
from vlft.engine.base import MOMENTS, Engine, Update, alone, norms_of, one_row_at_a_time, read_norms
from vlft.engine.exchange import adds_up
from vlft.errors import ConfigError
from vlft.family import Part


class FsdpEngine(Engine):
    shards_states = True
    shards_weights = True
    stage = 3
    retries = False  # the other ranks wait inside a collective of the row that failed here

    def __init__(self, mixed_precision: str | None, max_grad_norm: float) -> None:
        super().__init__(mixed_precision, max_grad_norm)
        self.alarm = Alarm() if self.world_size > 1 else None

    def _accelerator(self) -> Accelerator:
        if not torch.cuda.is_available():
            # Accelerate ignores its FSDP plugin there and runs DistributedDataParallel instead.
            raise ConfigError(
                "FSDP2 needs a GPU: Accelerate ignores it on the CPU; use --deepspeed zero3, or no sharding."
            )
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "the launcher asks for FSDP 1, which cannot hold frozen and trained weights in one layer; set "
                "fsdp_version: 2 (accelerate_configs/fsdp2.yaml does)."
            )
        if self.precision == "fp16":
            raise ConfigError("--mixed_precision fp16 does not run under FSDP2 here; use bf16.")
        alone()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False,
            mixed_precision_policy=mixed_precision_policy(self.precision),
        )  # fmt: skip
        made = Accelerator(
            mixed_precision=self.precision, fsdp_plugin=plugin, gradient_accumulation_plugin=one_row_at_a_time()
        )
        if made.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ConfigError(
                f"the launcher asks for torch.compile ({made.state.dynamo_plugin.backend.value}), which does not run "
                "under FSDP2 here; leave its dynamo_backend out."
            )
        return made

    def prepare(self, model: nn.Module, optimizer: Optimizer, whole: Sequence[nn.Module] = ()) -> nn.Module:  # noqa: ARG002
        self.model: Any = model
        self._shard(model, optimizer)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self._note_parameters(optimizer)
        self._give_shards(optimizer)
        return model

    @property
    def wants_torchs_adamw(self) -> bool:
        """On the CPU, where offloaded shards make their steps, its fused one is the faster."""
        from torch.distributed.fsdp import CPUOffloadPolicy

        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy)

    def _give_shards(self, optimizer: Optimizer) -> None:
        """The optimizer gets what lies here of each parameter, as a plain tensor.

        Of DTensors its fused step takes some 40 microseconds of the host for each, in which the device waits; and it
        refuses `grad_scale` and `found_inf`, which are plain, beside them.
        """
        self._wholes: dict[nn.Parameter, nn.Parameter] = {}
        """By the optimizer's own."""
        for group in optimizer.param_groups:
            wholes, group["params"] = group["params"], [nn.Parameter(_local(p.detach())) for p in group["params"]]
            self._wholes |= zip(group["params"], wholes, strict=True)
        # Offloaded ones are on the CPU, and the norm is not.
        self.steps_ahead = all(p.device.type == self.device.type for p in self._wholes)

    def _shard(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Cut up the model's parameters; the optimizer gets those that come in their place."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for said in _HARMLESS:
            warnings.filterwarnings("ignore", message=said)
        model.to(self.device)
        names = {p: name for name, p in model.named_parameters()}
        # Whole on each GPU. Where they are stored as floats, PyTorch's copies take them for such: what looks like no
        # number becomes another one, and 4 of 10,000 weights with it, which is 5% of their norm.
        ignored = {p for p in names if hasattr(p, "quant_state") or not p.is_floating_point()}
        how = self._sharding()
        runs = [units_of(run, ignored) for run in runs_of_layers(model)]
        units = [unit for run in runs for unit in run]
        self._passing = passing_bytes(
            units, ignored, reshard=how["reshard_after_forward"], kind=how["mp_policy"].param_dtype,
            alone=self.world_size == 1,
        )  # fmt: skip
        # What the root holds is needed at the beginning of the backward pass again, so it stays.
        for unit, keeps in [*((unit, {}) for unit in units), ([model], {"reshard_after_forward": None})]:
            whole = {p for module in unit for p in module.parameters()} & (names.keys() - ignored)
            fully_shard(unit, **how | keeps, ignored_params=ignored)
            for p in whole:
                p.data = p.new_empty(0)  # the optimizer has it still, and would hold the whole model beside its shards
            first = unit[0]
            assert isinstance(first, FSDPModule)
            if self.world_size > 1:
                adds_up(first)
        chains = [[unit[0] for unit in run] for run in runs]
        chains[:1] = [[model, *first] for first in chains[:1]]  # the root's forward comes to the first layer first
        for chain in chains:
            # Else a unit is gathered when the host arrives there, which at a step's start is just before the GPU.
            for one, following in pairwise(chain):
                assert isinstance(one, FSDPModule)
                assert isinstance(following, FSDPModule)
                one.set_modules_to_forward_prefetch([following])
        cut = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [cut[names[p]] for p in group["params"]]

    def _sharding(self) -> dict[str, Any]:
        """What `fully_shard` is told: Accelerate's file, and the precision."""
        from torch.distributed.fsdp import OffloadPolicy

        plugin: Any = self.accelerator.state.fsdp_plugin
        mesh, layout = self.accelerator.torch_device_mesh, self.accelerator.parallelism_config
        return {
            "reshard_after_forward": plugin.reshard_after_forward,
            "offload_policy": plugin.cpu_offload or OffloadPolicy(),
            "mp_policy": mixed_precision_policy(self.precision),
            "mesh": mesh[tuple(layout.fsdp_dim_names)] if mesh is not None else None,
        }

    def passing_bytes(self) -> int:
        return self._passing

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002
        # Every row is reduced at once: to wait for the last would hold whole gradients, the memory that sharding is to
        # save.
        self.accelerator.backward(loss)

    def reduce(self, fits: bool) -> bool:
        return fits  # FSDP did it within the backwards

    @torch.no_grad()
    def update(self, meanwhile: Callable[[], None] = lambda: None) -> Update:
        for shard, whole in self._wholes.items():
            here = _local(whole)
            if here.data_ptr() != shard.data_ptr():  # FSDP has laid it elsewhere
                shard.data = here
            shard.grad = None if whole.grad is None else _local(whole.grad)
        return super().update(meanwhile)

    def forget(self) -> None:
        super().forget()
        for whole in self._wholes.values():
            whole.grad = None

    def end_all(self, exit_code: int) -> None:
        if self.alarm is not None:
            self.alarm.ring(exit_code)

    @torch.no_grad()
    def _clip(self) -> tuple[float, dict[Part, float]]:
        """The base's, on the shards that lie here: with gradients, every operation on DTensors costs the host a turn
        through their dispatcher for each tensor, while the device waits.
        """
        whole, norms = self._norms()
        if whole is None:
            return 0.0, dict.fromkeys(norms, 0.0)
        factor = (self.max_grad_norm or float("inf")) / (whole + 1e-6)
        here = [_local(p.grad) for p in self._parameters if p.grad is not None]
        torch._foreach_mul_(here, factor.clamp(max=1.0).to(here[0].device, torch.float32))
        return read_norms(whole, norms)()

    @torch.no_grad()
    def _norms(self) -> tuple[Tensor | None, dict[Part, Tensor | None]]:
        """From the shards that lie here, with one all-reduce of a square for each part."""
        names = tuple(dict.fromkeys(self._parts))
        having = [(part, p.grad) for part, p in zip(self._parts, self._parameters, strict=True) if p.grad is not None]
        alike: dict[tuple[Part, int], list[Tensor]] = {}
        for (part, gradient), norm in zip(having, norms_of([_local(g) for _, g in having]), strict=True):
            alike.setdefault((part, _copies(gradient, self.world_size)), []).append(norm)
        squares = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        for (part, copies), some in alike.items():
            squares[names.index(part)] += torch.stack(some).double().square().sum() / copies
        if self.world_size > 1:
            torch.distributed.all_reduce(squares)
        return squares.sum().sqrt() if having else None, dict(zip(names, squares.sqrt().unbind(), strict=True))

    def weights(self, model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
        self._cut_again()
        return super().weights(model, names)

    def saved_tensors(self, model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, str, Tensor]]:
        self._cut_again()
        yield from super().saved_tensors(model, optimizer)

    def _cut_again(self) -> None:
        """A forward without a backward, as of an evaluation, leaves weights gathered: the model's parameters are then
        copies in the compute dtype, and would be saved in the masters' place."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gradient(self, p: nn.Parameter) -> Tensor | None:
        return None if p.grad is None else _whole(p.grad)

    def whole(self, p: nn.Parameter) -> Tensor:
        return _whole(p.detach())

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Layers gather themselves; what lies beside them is gathered by the root's forward, which is not called."""
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()

    def _whole_state(self, p: nn.Parameter, state: Tensor) -> Tensor:
        whole = self._wholes[p]
        return _whole(_cut_like(whole, state)) if state.ndim else state.clone()

    def restore_state(self, optimizer: Optimizer, weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        from torch.distributed.tensor import DTensor, distribute_tensor

        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if f"step/{name}" not in saved:
                    continue
                step = saved[f"step/{name}"]
                state = {"step": step.to(p.device) if group.get("fused") else step}
                like = self._wholes[p]
                for moment in MOMENTS[:2]:
                    whole = saved[f"{moment}/{name}"].to(self.device)
                    if isinstance(like, DTensor):
                        whole = distribute_tensor(whole, like.device_mesh, like.placements).to_local()
                    state[moment] = whole.to(p.device)
                optimizer.state[p] = state


def mixed_precision_policy(precision: str) -> Any:
    """Products in bf16; gradients are sent in it, too, and summed in fp32 (`Exchange`).

    Inputs of layers stay what they are: the angles of the vision tower's positions are fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    kind = None if precision == "no" else torch.bfloat16
    return MixedPrecisionPolicy(param_dtype=kind, cast_forward_inputs=False)


UNIT = 1 << 28
"""Parameters of a unit, in which layers are gathered, and their gradients summed, at once; a larger layer is one by
itself. 3B's language model has 12 of 3 layers, 7B's 28 of one. `passing_bytes` is what that costs."""


def layer_names(model: nn.Module) -> set[str]:
    """Classes of the layers, as transformers names them for each architecture."""
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return named & {type(module).__name__ for module in model.modules()}


def runs_of_layers(model: nn.Module) -> list[list[nn.Module]]:
    """Layers that are called one after the other; one that is in no list is a run by itself."""
    names, runs, seen = layer_names(model), list[list[nn.Module]](), set[nn.Module]()
    for module in model.modules():
        run = [*module.children()] if isinstance(module, nn.ModuleList) else [module]
        if run and seen.isdisjoint(run) and all(type(layer).__name__ in names for layer in run):
            runs.append(run)
            seen.update(run)
    return runs


def units_of(run: Sequence[nn.Module], ignored: Set[nn.Parameter]) -> list[list[nn.Module]]:
    """Neighbours, joined to about `UNIT` parameters, in their order."""
    numbers = sum(p.numel() for layer in run for p in layer.parameters() if p not in ignored)
    fit = max(1, round(len(run) * UNIT / max(numbers, 1)))
    size = math.ceil(len(run) / math.ceil(len(run) / fit))  # units alike: the largest decides what is held
    return [list(run[i : i + size]) for i in range(0, len(run), size)]


def passing_bytes(
    units: Sequence[Sequence[nn.Module]],
    ignored: Set[nn.Parameter],
    *,
    reshard: bool,
    kind: torch.dtype | None,
    alone: bool,
) -> int:
    """What a row holds of gathered weights and of gradients that are on their way, at the most.

    A unit's weights, what they were gathered into, and the same of the next; a unit's gradients as they come, as they
    are sent and as others' arrive, and those of the one before, which may still be on their way.

    Args:
        kind: of gathered weights and of gradients; None: the parameters' own.
        alone: one process, which sends nothing.
    """

    def size(unit: Sequence[nn.Module], *, learnt: bool) -> int:
        of = (p for layer in unit for p in layer.parameters() if p not in ignored and (p.requires_grad or not learnt))
        return sum(p.numel() * (kind or p.dtype).itemsize for p in of)

    weights = [size(unit, learnt=False) for unit in units]
    largest = max(weights, default=0)
    gathered = 3 * largest if reshard else sum(weights) + 2 * largest
    return gathered + (2 if alone else 5) * max((size(unit, learnt=True) for unit in units), default=0)


_HARMLESS = (
    r"FSDP2-wrapped module .* returned a view tensor",  # of a layer's output, which nothing is added to in place
    r"\d+ of the \d+ modules passed to fully_shard did not run forward",  # those of a unit that compute again
)
"""Warnings, which name each class of a unit."""


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut_like(whole: Tensor, shard: Tensor) -> Tensor:
    """What lies here of a tensor that is cut up as another is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(whole, DTensor):
        return shard
    mesh, places = whole.device_mesh, whole.placements
    return DTensor.from_local(shard, mesh, places, run_check=False, shape=whole.shape, stride=whole.stride())


def _copies(tensor: Tensor, world_size: int) -> int:
    """On how many ranks the same shard lies (more than one with hybrid sharding)."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return world_size
    sizes = [tensor.device_mesh.size(i) for i, place in enumerate(tensor.placements) if not place.is_shard()]
    return math.prod(sizes)


def _whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
