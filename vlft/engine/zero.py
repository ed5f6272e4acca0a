"""ZeRO-2 and ZeRO-3 through DeepSpeed (Rajbhandari et al. 2020), driven by hand.

Who owns which number: the DeepSpeed file owns what is sharded and offloaded and its buffers; vlft's options own the
batch, the precision and the clipping, and fill them in here. `engine.backward` and `engine.step` are called directly,
since a step has as many rows as its samples need, not a fixed accumulation count.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from vlft.engine.alarm import Alarm
from vlft.engine.base import MOMENTS, Engine, Update, alone
from vlft.engine.zero_layers import LayerGathering, can_gather_layers
from vlft.engine.zero_step import LeanStep
from vlft.engine.zero_sums import SliceReduction, can_reduce_slices
from vlft.errors import ConfigError
from vlft.family import Part

OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
         "bf16", "fp16", "optimizer", "scheduler")  # fmt: skip
"""Keys that vlft's options own; a file may leave them out or say "auto"."""


def config_of_launcher() -> Path:
    """The DeepSpeed file of an accelerate configuration that was launched with `distributed_type: DEEPSPEED`."""
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        raise ConfigError(
            "accelerate launched DeepSpeed without a configuration file; add --deepspeed zero2, zero3 or a path."
        )
    return Path(name)


def read_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed file without what vlft owns.

    Raises:
        ConfigError: not JSON, no ZeRO stage 1 to 3, or a number that vlft's options own; all at once.
    """
    try:
        config = json.loads(path.read_text())
        stage = int(config["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--deepspeed {path} is no DeepSpeed configuration with a zero_optimization.stage ({error}); "
            "start from a bundled one, --deepspeed zero2 or zero3."
        ) from error
    problems = [] if stage in (1, 2, 3) else [f"--deepspeed {path}: ZeRO stage {stage} is not 1, 2 or 3; choose one."]
    if config["zero_optimization"].get("compute_grad_norm", True) is not True:
        problems.append(
            f"--deepspeed {path}: 'compute_grad_norm' is off, but vlft logs norms and skips by them; leave it out."
        )
    if stage == 3 and config["zero_optimization"].get("stage3_module_granularity_threshold"):
        # Their memory is given to the next gathering while the GPU still reads it, where the host runs ahead: on an
        # H200 the loss after 36 steps was 7.39, and without that key 5.77.
        problems.append(
            f"--deepspeed {path}: with 'stage3_module_granularity_threshold' DeepSpeed 0.19.8 lets go of a layer's "
            "weights before they are read; leave it out, layers are gathered whole anyway."
        )
    for key in OWNED:
        value = config.pop(key, "auto")
        if value != "auto" and not (isinstance(value, dict) and value.get("enabled") in ("auto", None)):
            problems.append(f"--deepspeed {path}: '{key}' belongs to vlft's options; leave it out or write \"auto\".")
    if problems:
        raise ConfigError(problems)
    return dict(config)


def sums_in_fp32(config: Mapping[str, Any], *, bf16: bool) -> bool:
    """Whether gradients of a step's rows add up in fp32.

    In bf16, DeepSpeed's own choice, a sum of 32 rows is 0.6% off, 20 times as far as in fp32. Under ZeRO-1 it would run
    another optimizer for it, and in fp16 it was not tried.
    """
    asked = (config.get("data_types") or {}).get("grad_accum_dtype")
    if asked is not None:
        return "16" not in asked
    return bf16 and int(config.get("zero_optimization", {}).get("stage", 0)) > 1


def completed(config: Mapping[str, Any], precision: str, max_grad_norm: float) -> dict[str, Any]:
    """A file as `read_config` gives it, with what vlft's options own and with better defaults than DeepSpeed's."""
    config = dict(config) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    # It measures samples a second for a line that is never printed, and waits for the GPU before each row and after
    # each step.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    zero, deepcompile = config["zero_optimization"], (config.get("compile") or {}).get("deepcompile")
    if int(zero["stage"]) == 2 and zero.get("zenflow") is None and not deepcompile:  # DeepSpeed refuses it beside these
        # A row's share is already of all ranks, and a division of all gradients is a pass over them.
        config.setdefault("gradient_allreduce_op", "sum")
    if precision != "no":
        config[precision] = {"enabled": True}
    if sums_in_fp32(config, bf16=precision == "bf16"):
        config["data_types"] = (config.get("data_types") or {}) | {"grad_accum_dtype": "fp32"}
    return config


class ZeroEngine(Engine):
    keeps_masters = True
    shards_states = True
    retries = False  # the other ranks wait inside a collective of the row that failed here
    wants_torchs_adamw = True  # DeepSpeed calls it piece by piece, over flat masters of its own

    def __init__(self, mixed_precision: str | None, path: Path, max_grad_norm: float) -> None:
        self.deepspeed: dict[str, Any] = read_config(path)
        self.stage = int(self.deepspeed["zero_optimization"]["stage"])
        self.shards_weights = self.shards_packed = self.stage == 3
        super().__init__(mixed_precision, max_grad_norm)
        self.alarm = Alarm() if self.world_size > 1 else None

    def _accelerator(self) -> Accelerator:
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError("--deepspeed needs DeepSpeed: pip install 'vlft[deepspeed]'.") from error
        # Of collectives that DeepSpeed calls: newer PyTorch would tell it again and again.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        handlers = []
        if not torch.accelerator.is_available():
            # `cpu=True` would ignore the plugin; without gloo Accelerate counts 1 process and DeepSpeed 2.
            os.environ.pop("ACCELERATE_USE_CPU", None)
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            handlers = [InitProcessGroupKwargs(backend="gloo")]
            # DeepSpeed would compile a shared-memory reduction for a minute, which needs a compiler and gains nothing.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        alone()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        self.deepspeed = completed(self.deepspeed, self.precision, self.max_grad_norm)
        plugin = DeepSpeedPlugin(hf_ds_config=self.deepspeed, zero3_init_flag=False)
        return Accelerator(mixed_precision=self.precision, deepspeed_plugin=plugin, kwargs_handlers=handlers)

    def prepare(self, model: nn.Module, optimizer: Optimizer, whole: Sequence[nn.Module] = ()) -> nn.Module:
        from deepspeed.utils import set_z3_leaf_module

        if self.stage == 3:
            for module in whole:
                # ZeRO-3 gathers weights as modules are called; those inside are not called one by one.
                set_z3_leaf_module(module, True)
                if any(p.requires_grad for p in module.parameters()):
                    module.register_forward_pre_hook(_with_gradient)
        self._names = [list(g["names"]) for g in optimizer.param_groups]
        self._group_parts: list[Part] = [g["part"] for g in optimizer.param_groups]
        self._by_name = {n: p for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)}
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        assert isinstance(self.model, nn.Module)
        self.zero: Any = self.model.optimizer  # DeepSpeed's ZeRO optimizer
        self._lean = LeanStep(self.zero)
        asked = self.deepspeed["zero_optimization"]
        self._gathering: LayerGathering | None = None
        if can_reduce_slices(self.zero, asked):
            SliceReduction(self.zero)
        elif can_gather_layers(self.zero, asked, whole):
            self._gathering = LayerGathering(self.zero, whole)
        return self.model

    def passing_bytes(self) -> int:
        return self._gathering.passing_bytes() if self._gathering else 0  # DeepSpeed's own are not known

    def _pending_gradients(self) -> int:
        """ZeRO-2 makes room for its share when a step's first ones come, ZeRO-3 at the start."""
        if self.stage != 2 or self.zero.cpu_offload:
            return 0
        there, sizes = self.zero.averaged_gradients, self.zero.partition_size
        missing = sum(int(size) for group, size in enumerate(sizes) if there.get(group) is None)
        return missing * int(self.zero.gradient_accumulation_dtype.itemsize)

    def _pending_states(self) -> int:
        """Adam's, of the shards that lie here; masters are there from the start."""
        flats = [
            flat for flat in self._masters if flat.device.type == self.device.type and flat not in self._adam.state
        ]
        return sum(2 * flat.numel() * flat.element_size() for flat in flats) - self._held

    @property
    def _masters(self) -> list[Tensor]:
        cut = self.shards_weights
        found = self.zero.fp32_partitioned_groups_flat if cut else self.zero.single_partition_of_fp32_groups
        return list(found)

    def forget(self) -> None:
        """In the way in which DeepSpeed drops the gradients of a step whose loss scale was too high."""
        zero = self.zero
        if self.stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(1.0)
            # A weight that the next row does not reach would find the gradient of this one.
            zero.grad_partitions_flat_buffer.zero_()
            return
        real, scale, checks = zero.check_overflow, zero._update_scale, zero.check_grad_overflow

        def overflow(**_: Any) -> None:
            zero.overflow = True

        # The scale itself stays: nothing has overflowed.
        zero.check_overflow, zero._update_scale, zero.check_grad_overflow = overflow, lambda _: None, True
        try:
            zero.step()
        finally:
            zero.check_overflow, zero._update_scale, zero.check_grad_overflow = real, scale, checks

    def end_all(self, exit_code: int) -> None:
        if self.alarm is not None:
            self.alarm.ring(exit_code)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        engine: Any = self.model
        engine.set_gradient_accumulation_boundary(last)
        if engine.gradient_average and self._gathering is None:
            loss = loss * self.world_size  # DeepSpeed takes the mean; a row's share is already of all ranks
        engine.backward(loss, scale_wrt_gas=False)

    def reduce(self, fits: bool) -> bool:
        return fits  # DeepSpeed did it within the last backward

    def update(self, meanwhile: Callable[[], None] = lambda: None) -> Update:
        engine: Any = self.model
        scale = float(self.zero.loss_scaler.cur_scale) if self.precision == "fp16" else 1.0
        self._lean.begin()
        engine.step()
        meanwhile()  # not before: what it takes longer than the GPU's backlog would delay the step
        # ZeRO skips a step whose norm is not finite in every precision, and calls that an overflow.
        overflow = bool(self.zero.overflow)
        norms = self._part_norms(scale)
        return Update(not overflow, math.hypot(*norms.values()), norms, scaling=overflow and scale > 1.0)

    def _part_norms(self, scale: float) -> dict[Part, float]:
        """From the norms of DeepSpeed's groups, each already summed over the ranks."""
        taken = self._lean.norms()
        if not taken:
            return dict.fromkeys(self._group_parts, math.inf)  # an overflow ends the step before they are taken
        squares = dict.fromkeys(self._group_parts, 0.0)
        for i, norm in enumerate(taken):
            group = self.zero.sub_group_to_group_id[i] if self.stage == 3 else i
            squares[self._group_parts[group]] += (norm / scale) ** 2 if norm >= 0 else math.inf
        return {part: math.sqrt(square) for part, square in squares.items()}

    # -- whole tensors -----------------------------------------------------------------------------------------------

    def gradient(self, p: nn.Parameter) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        found: Tensor | None = safe_get_full_grad(p)
        return found

    def whole(self, p: nn.Parameter) -> Tensor:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor | None = safe_get_full_fp32_param(p) if p.requires_grad else None
        if master is not None:
            return master.detach()
        with deepspeed.zero.GatheredParameters([p], enabled=self.shards_weights):
            return p.detach().clone()

    def _readers(self, model: nn.Module, _: Optimizer) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, p in model.named_parameters():
            if p.requires_grad:
                yield "weights", name, partial(self.whole, p)
        step = self._step_count()
        if step is None:
            return
        self._link_states()
        for name, p in self._by_name.items():
            for moment in MOMENTS[:2]:
                yield "optimizer", f"{moment}/{name}", partial(safe_get_full_optimizer_state, p, moment)
            yield "optimizer", f"step/{name}", partial(torch.tensor, float(step))

    @property
    def _adam(self) -> Any:
        """The optimizer that really steps: under offload, Accelerate puts DeepSpeed's CPU Adam over the same groups."""
        return self.zero.optimizer

    def _step_count(self) -> float | None:
        steps = [float(state["step"]) for state in self._adam.state.values() if "step" in state]
        return steps[0] if steps else None

    def restore_weights(self, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
        import deepspeed

        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    cut = hasattr(p, "ds_id")
                    with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=cut):
                        if not cut or self.is_main:
                            p.copy_(saved[name])

    def restore_state(self, optimizer: Optimizer, weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, p in self._by_name.items():
            # The masters were made from weights in the compute dtype: put the saved digits back.
            safe_set_full_fp32_param(p, weights[name].to(self.device))
        if not saved:
            return  # every step so far was skipped
        self._make_states(float(saved[next(k for k in saved if k.startswith("step/"))]))
        for name, p in self._by_name.items():
            for moment in MOMENTS[:2]:
                safe_set_full_optimizer_state(p, saved[f"{moment}/{name}"].to(self.device), moment)

    def _make_states(self, step: float) -> None:
        """DeepSpeed's setters write into states that exist; Adam makes them with its first step only."""
        for flat in self._masters:
            moments = {m: torch.zeros_like(flat.data) for m in MOMENTS[:2]}
            # DeepSpeed's own Adams count in plain numbers.
            count = torch.tensor(step, device=flat.device) if isinstance(self._adam, torch.optim.AdamW) else int(step)
            self._adam.state[flat] = {"step": count, **moments}
        self._link_states()

    def _link_states(self) -> None:
        """ZeRO-2 links parameters to Adam's state after the first GROUP's first step, so other groups' are missed."""
        if not self.shards_weights:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def scaler_state(self) -> dict[str, Any]:
        scaler = getattr(self.zero, "loss_scaler", None)
        if self.precision != "fp16" or scaler is None:
            return {}
        if not scaler.dynamic:
            return {"scale": float(scaler.cur_scale), "good_steps": 0}
        good = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": float(scaler.cur_scale), "good_steps": good, "hysteresis": scaler.cur_hysteresis}

    def restore_scaler(self, state: dict[str, Any]) -> None:
        scaler = getattr(self.zero, "loss_scaler", None)
        if not state or self.precision != "fp16" or scaler is None or not scaler.dynamic:
            return
        scaler.cur_scale = state["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = int(state["good_steps"]), -1
        scaler.cur_hysteresis = state.get("hysteresis", scaler.cur_hysteresis)


def _with_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG001
    """The input of a module that is gathered whole gets a gradient, although nobody reads it.

    Its weights' gradients are reduced by a full backward hook. Where no input has one, below the first layer of an LLM
    that has adapters alone, PyTorch calls that hook before the module's backward and not after it.
    """
    first, *others = inputs
    if first.requires_grad or not torch.is_grad_enabled():
        return None
    return first.detach().requires_grad_(), *others
