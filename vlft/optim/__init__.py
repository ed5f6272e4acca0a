"""AdamW over a strategy's groups, and rates as a pure function of the step: a resume has no schedule to lose.

`rounded.py` is an AdamW of our own, with fp32 masters or without, `on_gpu.py` its step as one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vlft import compiler
from vlft.family import Part
from vlft.optim.remainder import keep_remainder, master_dtype, master_of
from vlft.optim.rounded import KernelAdamW
from vlft.strategy import ParamGroup

__all__ = [
    "KernelAdamW",
    "Kind",
    "Multiplier",
    "build_optimizer",
    "gradient_dtype",
    "group_rate",
    "keep_remainder",
    "knows_masters",
    "master_dtype",
    "master_of",
    "scales_gradients",
    "schedule",
    "set_rates",
    "step_was_left_out",
]  # fmt: skip

Kind = Literal["adamw", "adamw_bf16", "adamw_8bit"]
"""fp32 weights and states; bf16 weights with bf16 states; bf16 weights with states of eight bits."""

Multiplier = Callable[[int], float]


def group_rate(group: ParamGroup, rates: Mapping[Part, float]) -> float:
    """Peak learning rate of a group; the head takes the LLM's."""
    return rates["llm" if group.part == "head" else group.part] * group.lr_scale


def build_optimizer(
    model: nn.Module,
    groups: Sequence[ParamGroup],
    rates: Mapping[Part, float],
    weight_decay: float,
    kind: Kind = "adamw",
    device: torch.device | None = None,
    *,
    torchs_own: bool = False,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with decoupled decay on matrices only: norms and biases never decay.

    Each torch group carries `names`, `part` and `peak_lr`.

    Args:
        device: where steps will be made; None: where the parameters are now. A model that will be cut up is loaded on
            the CPU, and what torch itself chooses for FSDP's parameters is a loop of single operations.
        torchs_own: whoever makes the steps knows torch's AdamW alone.
    """
    by_name = dict(model.named_parameters())
    torch_groups: list[dict[str, Any]] = []
    for group in groups:
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        for suffix, wanted in (("", True), ("/no_decay", False)):
            names = [n for n in group.parameters if _is_matrix(by_name[n]) == wanted]
            if names:
                rate = group_rate(group, rates)
                torch_groups.append(
                    {
                        "params": [by_name[n] for n in names],
                        "names": names,
                        "name": group.name + suffix,
                        "part": group.part,
                        "peak_lr": rate,
                        "lr": rate,
                        "weight_decay": decay if wanted else 0.0,
                    }
                )
    if kind != "adamw":
        return KernelAdamW(torch_groups, "bf16" if kind == "adamw_bf16" else "8bit")
    on_gpu = all((device or p.device).type == "cuda" for g in torch_groups for p in g["params"])
    whole = all(p.dtype == torch.float32 for g in torch_groups for p in g["params"])
    if on_gpu and whole and not torchs_own and not compiler.trouble():
        return KernelAdamW(torch_groups, "fp32")
    return AdamW(torch_groups, fused=on_gpu)


def _is_matrix(p: Tensor) -> bool:
    """ZeRO-3 has an empty vector in the place of a weight that it has cut up, and its real shape beside it."""
    return len(getattr(p, "ds_shape", p.shape)) >= 2


def scales_gradients(optimizer: Optimizer) -> bool:
    """Whether its step divides gradients by its attribute `grad_scale`, so that they need no pass of their own."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return isinstance(optimizer, KernelAdamW) or (isinstance(optimizer, AdamW) and fused)


def knows_masters(optimizer: Optimizer) -> bool:
    """Whether its weights are fp32 ones, which may have a remainder, and their gradients may be in bf16."""
    return isinstance(optimizer, KernelAdamW) and optimizer.states == "fp32"


def gradient_dtype(p: Tensor) -> torch.dtype:
    """Of the gradient that a backward pass gives this leaf."""
    return p.grad_dtype or p.dtype


def step_was_left_out(optimizer: Optimizer) -> None:
    """The last step met `found_inf`. torch's fused AdamW counts its steps on the device and knows."""
    if isinstance(optimizer, KernelAdamW):
        optimizer.uncount()


def schedule(name: str, warmup_steps: int, total_steps: int) -> Multiplier:
    """step (0-based) -> factor of the peak rate, in the shape of transformers' scheduler of that name.

    Shifted by one: transformers' own would spend the first step at rate 0 under warmup, and a linear decay the last.
    """
    from transformers import get_scheduler

    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    # With a polynomial decay transformers ends at an absolute rate, which must be below the optimizer's.
    made = get_scheduler(name, dummy, num_warmup_steps=warmup_steps, num_training_steps=total_steps + 1)
    shape = made.lr_lambdas[0]
    return lambda step: float(shape(step + 1))


def set_rates(optimizer: Optimizer, factor: float) -> dict[Part, float]:
    """Set every group's rate to its peak times `factor`; returns the highest rate of each part."""
    now: dict[Part, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        now[group["part"]] = max(now.get(group["part"], 0.0), group["lr"])
    return now
