"""The plain engine: one process, or a whole copy of the model on every process with gradients summed once a step.

Gradients are summed by `vlft.engine.summing`, not by DistributedDataParallel: a step that runs out of memory can then
be tried again, a row without pictures leaves no rank waiting, and no second copy of the gradients lies in buckets.
"""

from __future__ import annotations

import math
import os
import random
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from vlft.engine.readback import readback
from vlft.engine.store import common_store, this_attempts, wait_until_told
from vlft.engine.summing import Summing
from vlft.errors import ConfigError, VlftError
from vlft.family import Part
from vlft.optim import gradient_dtype, knows_masters, master_of, scales_gradients, step_was_left_out
from vlft.optim.rounded import add_up

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Update:
    """What became of an optimizer step."""

    applied: bool
    norm: float
    """Global gradient norm before clipping."""
    norms: dict[Part, float]
    """The same of every part that trains; their squares sum to the whole's square."""
    scaling: bool = False
    """Not applied because fp16's loss scale was too high, which is how the scale is found; nothing is wrong."""


def choose_precision(wanted: str | None) -> str:
    """`--mixed_precision`, or what the device has: bf16 on a GPU that computes in it, else none.

    Raises:
        ConfigError: fp16 without a GPU, or bf16 on a GPU that lacks it.
    """
    gpu = torch.cuda.is_available()
    if wanted is None:
        return "bf16" if gpu and torch.cuda.is_bf16_supported() else "no"
    if wanted == "fp16" and not gpu:
        raise ConfigError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    if wanted == "bf16" and gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError("--mixed_precision bf16 is not supported by this GPU; use fp16 or no.")
    return wanted


@contextmanager
def _adding_up(before: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, a backward pass adds to these gradients with stochastic rounding (`vlft.optim.rounded.add_up` says why).

    A row's own gradient of a parameter lives until the pass has left it, as when autograd adds: nothing more is held.
    """
    seed = int(torch.randint(2**31, ()))  # of the CPU's generator, which a row seeds
    places = {p: place for place, p in enumerate(before)}

    def join(p: nn.Parameter) -> None:
        if (total := before.pop(p, None)) is not None:
            if p.grad is not None:
                add_up(total, p.grad, seed + 0x9E3779B1 * places[p])
            p.grad = total

    for p in before:
        p.grad = None
    hooks = [p.register_post_accumulate_grad_hook(join) for p in before]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p in [*before]:  # of which this row has none
            join(p)


def one_row_at_a_time() -> GradientAccumulationPlugin:
    """vlft divides a step's losses itself. Given no plugin, Accelerate divides them once more by what a variable of the
    environment (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) says.
    """
    return GradientAccumulationPlugin(num_steps=1)


class Engine:
    """Devices, ranks, backward and update. Whole tensors on every rank, so "gathering" costs nothing here."""

    keeps_masters = False
    """The engine holds fp32 masters of trained weights itself."""
    shards_weights = False
    """Parameters are empty outside their own forward; look at them through `whole`."""
    shards_packed = False
    """Packed 4-bit weights are cut up with the others."""
    shards_states = False
    """Gradients and optimizer states are cut up over the ranks: reading a whole one is collective."""
    steps_ahead = True
    """The step may be asked of the optimizer before the norm is known, where the optimizer can do its part."""
    stage: int = 0
    """What is cut up, as ZeRO counts: 1 optimizer states, 2 gradients too, 3 weights too; 0: whole copies."""
    deepspeed: Mapping[str, Any] | None = None
    """DeepSpeed's configuration, where it runs."""
    retries = True
    """A step that ran out of memory can be tried again: no rank waits for another before `reduce`."""

    def __init__(self, mixed_precision: str | None, max_grad_norm: float) -> None:
        if not torch.accelerator.is_available():
            # Without it Accelerate starts one process each and believes it is alone, in silence.
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        self.precision = choose_precision(mixed_precision)
        self.max_grad_norm = max_grad_norm
        self.accelerator: Accelerator = self._accelerator()
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self._works = 0
        """How often the main process has worked alone."""
        self.kind: str = self.accelerator.distributed_type.value
        """What Accelerate really set up, not always what was meant: NO, MULTI_CPU, MULTI_GPU, DEEPSPEED, FSDP."""
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.world_size:
            raise ConfigError(
                f"the launcher started {asked} processes, but Accelerate counts {self.world_size}; "
                "launch with torchrun, or an accelerate config of type MULTI_GPU or MULTI_CPU."
            )
        self._hosts = hosts_of_one_machine(self.device) if self.world_size > 1 else None
        """Carries what ranks tell each other, where it does not lie on the devices."""

    def _accelerator(self) -> Accelerator:
        return Accelerator(mixed_precision=self.precision, gradient_accumulation_plugin=one_row_at_a_time())

    # -- processes ---------------------------------------------------------------------------------------------------

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; the results of all, in rank order. If one fails, all raise its error.

        Without that, the others would wait for the failed one in their next collective.
        """
        made, failed = None, None
        try:
            made = work()
        except VlftError as error:
            failed = error
        found = self.gather([(made, failed)])
        if errors := [error for _, error in found if error is not None]:
            raise errors[0]
        return [value for value, _ in found]  # type: ignore[misc]  # no failure: every value is a T

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on the main process; its result everywhere, or its error. It may take as long as it likes."""

        def here() -> T | None:
            if not self.is_main:
                self._await_main()
                return None
            try:
                return work()
            finally:
                self._release()

        return self.together(here)[0]  # type: ignore[return-value]

    def _release(self) -> None:
        if self.world_size > 1:
            self._works += 1
            common_store().set(this_attempts(f"main has done {self._works}"), "")

    def _await_main(self) -> None:
        """Not in a collective: it gives up after ten minutes, which an index, a judge of answers or the writing of a
        large result may take. A main process that dies takes the store with it, or the launcher ends the others.
        """
        self._works += 1
        wait_until_told(this_attempts(f"main has done {self._works}"))

    def main_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the main process, then on the others (who find its result in the cache)."""
        made: list[T] = []
        self.on_main(lambda: made.append(work()))
        self.together(lambda: None if self.is_main else made.append(work()))
        return made[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def from_main(self, value: T) -> T:
        """The main process's `value`, everywhere."""
        box = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(box, group=self._hosts)
        return box[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in fp64."""
        if self.world_size == 1:
            return [float(v) for v in values]  # a tensor on the device would have to wait for all that runs there
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if self._hosts else self.device)
        torch.distributed.all_reduce(total, group=self._hosts)
        return [float(v) for v in total.tolist()]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, on all ranks, in rank order."""
        if self.world_size == 1:
            return list(items)
        found: list[list[T]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(found, list(items), group=self._hosts)
        return [item for some in found for item in some]

    # -- one step ----------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, optimizer: Optimizer, whole: Sequence[nn.Module] = ()) -> nn.Module:  # noqa: ARG002
        """Move the model to the device, with mixed precision around its forward.

        Args:
            whole: modules whose forward uses the weights of all modules inside, not through these modules' own.
        """
        self.optimizer: Any
        # evaluation_mode: no DistributedDataParallel around it (see the module's docstring).
        self.model: Any = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self._note_parameters(optimizer)
        assert isinstance(self.model, nn.Module)
        if self.world_size > 1:
            self._summing = Summing(self._parameters, self.device, self._hosts)
        return self.model

    def _note_parameters(self, optimizer: Optimizer) -> None:
        self._parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self._parts: list[Part] = [g["part"] for g in optimizer.param_groups for _ in g["params"]]
        # Once: to ask hundreds of DTensors takes the host milliseconds, and it is needed before every row.
        self._numbers = [_local_numel(p) for p in self._parameters]

    @property
    def wants_torchs_adamw(self) -> bool:
        """No other will do: with fp16, torch's scaler tells its fused AdamW of an overflow, and no wait is needed."""
        return bool(self.precision == "fp16")

    @property
    def splits_masters(self) -> bool:
        """After `prepare`: fp32 weights that products in bf16 take may lie in two halves (`vlft.optim.remainder`)."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return bool(self.precision == "bf16" and not self.shards_states and knows_masters(inner))

    @property
    def narrows_gradients(self) -> bool:
        """And a single row's gradients of these weights may be in bf16. Gradients that other ranks' are added to are
        sums, which want fp32's digits."""
        return self.splits_masters and self.world_size == 1

    def autocast(self) -> Any:
        """Mixed precision outside the wrapped forward."""
        return self.accelerator.autocast()

    def passing_bytes(self) -> int:
        """Of weights that are gathered and gradients that are summed while a row runs, beside what always lies here."""
        return 0

    def pending_bytes(self) -> int:
        """Of gradients and optimizer states that are not there yet and will be, on this device."""
        return self._pending_gradients() + self._pending_states()

    def _pending_gradients(self) -> int:
        missing = (each for each in zip(self._parameters, self._numbers, strict=True) if each[0].grad is None)
        return sum(n * gradient_dtype(p).itemsize for p, n in missing)

    def _pending_states(self) -> int:
        """Bytes of the states that the first update will make, but for what is held for them."""
        of = getattr(getattr(self.optimizer, "optimizer", None), "state_bytes", _adams_bytes)
        state = self.optimizer.state
        states = sum(of(p) for group in self.optimizer.param_groups for p in group["params"] if p not in state)
        return int(states) - self._held

    _held: int = 0
    _summing: Summing | None = None

    @contextmanager
    def holding_states(self) -> Iterator[None]:
        """Inside, the memory is taken that optimizer states will take: before the first update there are none."""
        size = self._pending_states()
        in_their_place = self._hold(size)
        self._held = size
        try:
            yield
        finally:
            self._held = 0
            del in_their_place

    def _hold(self, size: int) -> Tensor | None:
        """That many bytes of a GPU; a CPU's memory is not taken before it is written to."""
        return torch.empty(size, dtype=torch.uint8, device=self.device) if self.device.type == "cuda" else None

    def said(self) -> list[str]:
        """What was chosen in `prepare`, in sentences."""
        if self._summing is None or self._summing.rate is None:
            return []
        when = "large ones during" if self._summing.during else "after"
        return [f"gradients are summed {when} the backward pass: {self._summing.rate / 1e9:.0f} GB/s between the GPUs."]

    def forget(self) -> None:
        """Drop the gradients: of rows that shall train nothing, or after the step."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a row's gradient. `loss`: its share of the step's loss; `last`: no other row follows."""
        before = {p: p.grad for p in self._parameters if p.grad is not None and p.grad.dtype == torch.bfloat16}
        adding = _adding_up(before) if before else nullcontext()
        # What is added up is final only after the pass.
        final = self._summing.begins() if last and not before and self._summing else nullcontext()
        with adding, final:
            self.accelerator.backward(loss)

    def reduce(self, fits: bool) -> bool:
        """After the last row: sum the ranks' gradients, if it did fit on all of them; otherwise drop them.

        Args:
            fits: this rank had memory enough.
        Returns:
            Whether all had.
        """
        if self._summing is not None:
            fits = self._summing.finish(fits)
        if not fits:
            self.forget()
        return fits

    def update(self, meanwhile: Callable[[], None] = lambda: None) -> Update:
        """Clip and step, unless a gradient is not finite; gradients are cleared.

        Args:
            meanwhile: called once, before the host waits for the norms.
        """
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        ahead = self.steps_ahead and self.accelerator.scaler is None and scales_gradients(inner)
        if not ahead:
            meanwhile()
        norm, norms = self._step_ahead(inner, meanwhile) if ahead else self._clip()
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        applied = scaler is not None or math.isfinite(norm)
        if not ahead:
            if applied:
                self.optimizer.step()
                # The scale falls when a gradient overflows. Accelerate's own `optimizer_step_was_skipped` misses that
                # of a fused optimizer, whose step is called and then leaves everything as it is.
                applied = scaler is None or scaler.get_scale() >= scale
            self.forget()
        return Update(applied, norm, norms, scaling=not applied and scale > 1.0)

    def _step_ahead(self, optimizer: Any, meanwhile: Callable[[], None]) -> tuple[float, dict[Part, float]]:
        """`_clip` and the step without a look at the norm in between: the device never waits for the host.

        The step divides the gradients itself, and leaves everything as it is where their norm is not finite.
        """
        whole, norms = self._norms()
        if whole is None:
            meanwhile()
            return 0.0, dict.fromkeys(norms, 0.0)
        limit = self.max_grad_norm or float("inf")
        optimizer.grad_scale = ((whole + 1e-6) / limit).clamp(min=1.0).float()
        optimizer.found_inf = (~whole.isfinite()).float()
        read = read_norms(whole, norms)
        self.optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None
        self.forget()
        meanwhile()
        found = read()
        if not math.isfinite(found[0]):
            step_was_left_out(optimizer)
        return found

    def _clip(self) -> tuple[float, dict[Part, float]]:
        """Unscale and clip; the norms of the whole gradient and of every part's before.

        `torch.nn.utils.clip_grad_norm_` in two halves, so that one pass over the gradients serves both.
        """
        self.accelerator.unscale_gradients()
        whole, norms = self._norms()
        if whole is None:
            return 0.0, dict.fromkeys(norms, 0.0)
        having = [p for p in self._parameters if p.grad is not None]
        clip_grads_with_norm_(having, self.max_grad_norm or float("inf"), whole)
        return read_norms(whole, norms)()

    def _norms(self) -> tuple[Tensor | None, dict[Part, Tensor | None]]:
        """Of the whole gradient and of every part's, on the device; None where there is none."""
        names = tuple(dict.fromkeys(self._parts))
        having = [(part, p) for part, p in zip(self._parts, self._parameters, strict=True) if p.grad is not None]
        norms = norms_of([p.grad for _, p in having if p.grad is not None])
        if not norms:
            return None, dict.fromkeys(names)
        members = {part: [n for (of, _), n in zip(having, norms, strict=True) if of == part] for part in names}
        parts = {part: torch.linalg.vector_norm(torch.stack(some)) if some else None for part, some in members.items()}
        return torch.linalg.vector_norm(torch.stack(norms)), parts

    # -- whole tensors, wherever their shards lie: collective, so call on all ranks -----------------------------------

    def gradient(self, p: nn.Parameter) -> Tensor | None:
        """The whole gradient of one parameter, between backward and update."""
        return p.grad

    def whole(self, p: nn.Parameter) -> Tensor:
        """The whole value of one parameter."""
        return master_of(p)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Around Hugging Face's `generate`, which calls the model inside the wrapped module."""
        yield

    def weights(self, model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
        """Parameters by name, whole, on the CPU; only the main process gets them."""
        found = {}
        for name, p in model.named_parameters():
            if name in names:
                value = self.whole(p)
                if self.is_main:
                    found[name] = value.detach().cpu().contiguous()
        return found

    def saved_tensors(self, model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, str, Tensor]]:
        """What a checkpoint holds: (file stem, name, whole tensor on the CPU), the share that this rank writes.

        Weights that train are "weights", NAME; Adam's states are "optimizer", MOMENT/NAME. One at a time is whole.
        """
        for k, (stem, name, whole) in enumerate(self._readers(model, optimizer)):
            mine = k % self.world_size == self.rank
            if mine or self.shards_states:
                value = whole()
                if mine:
                    yield stem, name, value.detach().cpu().contiguous()

    def _readers(self, model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
        for name, p in model.named_parameters():
            if p.requires_grad:
                yield "weights", name, partial(self.whole, p)
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                # AdamW's `MOMENTS`, or what another optimizer has in their place.
                for moment, value in optimizer.state.get(p, {}).items():
                    yield "optimizer", f"{moment}/{name}", partial(self._whole_state, p, value)

    def _whole_state(self, p: nn.Parameter, state: Tensor) -> Tensor:  # noqa: ARG002
        """Of a parameter as the optimizer has it, which says how the state is cut up where one is."""
        return state if state.ndim else state.clone()  # which may be a view of all counts

    def restore_weights(self, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Copy saved weights into the trained parameters, before `prepare`."""
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(saved[name])

    def restore_state(self, optimizer: Optimizer, weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Put Adam's state back (and fp32 masters, where the engine has its own), after `prepare`.

        Args:
            weights: the saved weights, by name.
            saved: what `moments` gave.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in saved.items():
            moment, name = key.split("/", 1)
            by_name.setdefault(name, {})[moment] = value
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if name in by_name:
                    state = {moment: value.to(p.device) for moment, value in by_name[name].items()}
                    if not group.get("fused"):
                        state["step"] = state["step"].cpu()
                    optimizer.state[p] = state

    def scaler_state(self) -> dict[str, Any]:
        """Of fp16's loss scale, the same for every engine: the scale, and the steps since it last fell or grew."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return {}
        state = scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}

    def restore_scaler(self, state: dict[str, Any]) -> None:
        scaler = self.accelerator.scaler
        if state and scaler is not None:
            own = scaler.state_dict()
            good = int(state["good_steps"]) % own["growth_interval"]
            scaler.load_state_dict(own | {"scale": state["scale"], "_growth_tracker": good})

    def end_all(self, exit_code: int) -> None:
        """End every other rank, which may wait inside a collective. (Here none does: errors are told in `together`.)"""

    def close(self) -> None:
        self.accelerator.end_training()


def _adams_bytes(p: Tensor) -> int:
    return 2 * _local_numel(p) * p.element_size()


def _local_numel(p: Tensor) -> int:
    """Of the shard that lies here."""
    return (p.to_local() if hasattr(p, "to_local") else p).numel()


def read_norms(
    whole: Tensor, norms: Mapping[Part, Tensor | None]
) -> Callable[[], tuple[float, dict[Part, float]]]:  # fmt: skip
    """The norms as numbers: what is returned waits for them, and for nothing that the device is asked for later."""
    zero = torch.zeros_like(whole)
    read = readback(torch.stack([whole, *(zero if norm is None else norm for norm in norms.values())]))

    def numbers() -> tuple[float, dict[Part, float]]:
        total, *each = read().tolist()
        return total, dict(zip(norms, each, strict=True))

    return numbers


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each, on the first one's device."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, gradient in enumerate(gradients):
        kinds.setdefault((gradient.device, gradient.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for (_, kind), places in kinds.items():
        # In bf16 a norm would have three digits, and the clipping by it too.
        wide = torch.promote_types(kind, torch.float32)
        found |= zip(places, torch._foreach_norm([gradients[i] for i in places], dtype=wide), strict=True)
    return [found[i].to(gradients[0].device) for i in range(len(gradients))]


_HOSTS_LIMIT = timedelta(minutes=10)
"""Of what hosts tell each other: NCCL's own, where gloo would wait for half an hour."""


def hosts_of_one_machine(device: torch.device) -> Any:
    """A group in which the hosts of ranks with GPUs talk to each other, all on one machine; else None.

    What they say would go through NCCL behind all that the GPUs were asked for, and each answer would wait for it: at
    the end of a step no host could ask for the next one while the GPUs are still at the update. Between machines the
    GPUs carry it: gloo would have to be told which network joins them.
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE", "unknown") == os.environ.get("WORLD_SIZE")
    if device.type != "cuda" or not one_machine:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=_HOSTS_LIMIT)


def alone() -> None:
    """Started without a launcher, be a group of one all the same: sharding engines want a group."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})


def seed_row(seed: int, step: int, row: int) -> None:
    """Seed dropout from (seed, step, row), so that a resume needs no generator state."""
    mixed = int(np.random.SeedSequence((seed, step, row)).generate_state(1, np.uint64)[0]) % 2**63
    torch.manual_seed(mixed)


def seed_start(seed: int) -> None:
    """Seed what a strategy draws while it builds adapters."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (third-party strategies may draw from the legacy generator)
    torch.manual_seed(seed)
