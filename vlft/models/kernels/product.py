"""Products of one input with the weights of some linear modules, forward and backward, without autograd in between.

What a module holds is looked up at every use: sharding engines put other tensors there for the time of a forward and
a backward, adapters can be switched off, 4-bit weights are dequantised for the product and dropped after it.

N tokens or patches, D columns of the input, O columns of the outputs end to end, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Gradients = dict[nn.Parameter, Tensor]

ALIGNED = 64
"""Columns that a width is filled up to on a GPU, in passing.

Rows of bf16 must be aligned to 16 bytes: at 3420, the inner width of Qwen2.5-VL's vision MLP, cuBLAS falls back to
kernels of Ampere's time. Exact: the activation writes zeros behind the width, which meet columns of zeros in the next
product; weights, optimizers and checkpoints keep their shape.
"""


class UnsupportedError(Exception):
    """This module computes something that the faster layers do not know; it keeps its own forward."""


def aligned(width: int, device: torch.device) -> int:
    return -(-width // ALIGNED) * ALIGNED if device.type == "cuda" else width


@dataclass(frozen=True)
class Adapter:
    """x A^T B^T times `scale` (LoRA, Hu et al. 2021)."""

    a_rD: nn.Parameter
    b_Or: nn.Parameter
    scale: float


class Product:
    """One linear module: plain or 4-bit (bitsandbytes), alone or inside a PEFT layer."""

    def __init__(self, module: nn.Module) -> None:
        """
        Raises:
            UnsupportedError: it is of another class, or its adapters are no plain LoRA.
        """
        self.outer: Any = module
        self.base: Any = getattr(module, "base_layer", module)
        if type(self.base) is not nn.Linear and type(self.base).__name__ != "Linear4bit":
            raise UnsupportedError(f"a {type(self.base).__name__} as linear module")
        if module is not self.base:
            _check_adapters(module)
        self.columns = int(self.base.in_features)
        self.rows = int(self.base.out_features)

    @property
    def dropout(self) -> float:
        """Probability before the adapters, in training."""
        found = [m.p for m in getattr(self.outer, "lora_dropout", {}).values() if isinstance(m, nn.Dropout)]
        return max(found, default=0.0)

    def adapters(self) -> Iterator[Adapter]:
        outer = self.outer
        if outer is self.base or outer.disable_adapters or outer.merged:
            return
        for name in outer.active_adapters:
            if name in outer.lora_A:
                yield Adapter(outer.lora_A[name].weight, outer.lora_B[name].weight, float(outer.scaling[name]))

    def weight(self, kind: torch.dtype, columns: int) -> Tensor:
        """(rows, columns) in the compute dtype, with columns of zeros at its end where more are asked for."""
        held = self.base.weight
        if type(self.base) is nn.Linear:
            found = held.to(kind)
        else:
            found = _dequantised(self.base, kind)
        return F.pad(found, (0, columns - self.columns)) if columns != self.columns else found

    def trained(self) -> Iterator[nn.Parameter]:
        for p in (self.base.weight, self.base.bias):
            if p is not None and p.requires_grad:
                yield p
        for adapter in self.adapters():
            yield from (p for p in (adapter.a_rD, adapter.b_Or) if p.requires_grad)


def _check_adapters(module: Any) -> None:
    if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "active_adapters")):
        raise UnsupportedError(f"a {type(module).__name__} around a linear module")
    if any(getattr(module, "lora_variant", {}).values()) or any(getattr(module, "use_dora", {}).values()):
        raise UnsupportedError("a variant of LoRA")
    for pair in (module.lora_A, module.lora_B):
        if any(type(m) is not nn.Linear or m.bias is not None for m in pair.values()):
            raise UnsupportedError("an adapter with a bias")
    if any(type(m) not in (nn.Dropout, nn.Identity) for m in module.lora_dropout.values()):
        raise UnsupportedError("an unknown dropout before an adapter")


def _dequantised(module: Any, kind: torch.dtype) -> Tensor:
    from bitsandbytes import functional as bnb

    state = module.weight.quant_state if hasattr(module.weight, "quant_state") else None
    if state is None:
        # A sharding engine has made the parameter anew; the module remembers.
        state = module.quant_state
    found: Tensor = bnb.dequantize_4bit(module.weight.data, state)
    return found.to(kind)


class Products:
    """Some products of one input, whose results lie side by side in one tensor."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.each = [Product(module) for module in modules]
        if len({p.columns for p in self.each}) > 1:
            raise UnsupportedError("products of one input with different widths")

    @property
    def dropout(self) -> float:
        return max(p.dropout for p in self.each)

    def trained(self) -> Iterator[nn.Parameter]:
        for product in self.each:
            yield from product.trained()

    def forward(self, x_ND: Tensor, kind: torch.dtype, seed: int | None, width: int | None = None) -> Tensor:
        """(N, O).

        Args:
            x_ND: in the compute dtype `kind`; it may have columns of zeros behind the modules' own.
            seed: of the adapters' dropout; None drops nothing. One mask serves all modules of this input.
            width: columns of each module's share of the result, None for as many as it has. What lies behind its own
                is not set.
        """
        out = x_ND.new_empty(len(x_ND), sum(width or p.rows for p in self.each))
        start, dropped = 0, None
        for product in self.each:
            part = out[:, start : start + product.rows]
            weight_T = product.weight(kind, x_ND.shape[1]).t()
            if product.base.bias is not None:
                torch.addmm(product.base.bias.to(kind), x_ND, weight_T, out=part)
            else:
                torch.mm(x_ND, weight_T, out=part)
            for adapter in product.adapters():
                dropped = self._dropped(x_ND, seed) if dropped is None else dropped
                low = dropped @ adapter.a_rD.to(kind).t()
                part.addmm_(low, adapter.b_Or.to(kind).t(), alpha=adapter.scale)
            start += width or product.rows
        return out

    def backward(
        self,
        x_ND: Tensor,
        d_out_NO: Tensor,
        kind: torch.dtype,
        seed: int | None,
        gradients: Gradients,
        width: int | None = None,
        *,
        wants_input: bool = True,
    ) -> Tensor | None:
        """The gradient of x (N, D), and those of what trains into `gradients`."""
        d_x: Tensor | None = None
        d_dropped: Tensor | None = None
        start, dropped = 0, None
        for product in self.each:
            d_part = d_out_NO[:, start : start + product.rows]
            if wants_input:
                weight = product.weight(kind, x_ND.shape[1])
                d_x = d_part @ weight if d_x is None else d_x.addmm_(d_part, weight)
            note(gradients, product.base.weight, lambda d=d_part, p=product: _of_weight(d, x_ND)[:, : p.columns])
            note(gradients, product.base.bias, lambda d=d_part: d.sum(0))
            for adapter in product.adapters():
                dropped = self._dropped(x_ND, seed) if dropped is None else dropped
                a, b = adapter.a_rD.to(kind), adapter.b_Or.to(kind)
                d_low = (d_part @ b).mul_(adapter.scale)
                note(gradients, adapter.b_Or, lambda d=d_part, x=dropped, a=a, s=adapter.scale: d.t() @ (x @ a.t()) * s)
                note(gradients, adapter.a_rD, lambda d=d_low, x=dropped: d.t() @ x)
                if wants_input:
                    d_dropped = d_low @ a if d_dropped is None else d_dropped.addmm_(d_low, a)
            start += width or product.rows
        if d_x is not None and d_dropped is not None:
            if seed is not None:
                d_dropped = d_dropped * self._mask(d_dropped, seed)
            columns = d_dropped.shape[1]
            d_x[:, :columns].add_(d_dropped)
        return d_x

    def _dropped(self, x_ND: Tensor, seed: int | None) -> Tensor:
        """The adapters' input: the modules' own columns, some of them dropped."""
        x_ND = x_ND[:, : self.each[0].columns]
        return x_ND if seed is None else x_ND * self._mask(x_ND, seed)

    def _mask(self, like: Tensor, seed: int) -> Tensor:
        """Drawn again in the backward pass from the same seed: to keep it would cost a byte for each value."""
        keep = 1.0 - self.dropout
        generator = _generator(like.device).manual_seed(seed)
        return torch.empty_like(like).bernoulli_(keep, generator=generator).div_(keep)


def note(gradients: Gradients, p: nn.Parameter | None, gradient: Callable[..., Any]) -> None:
    """Work out a gradient and add it to what is there, if the parameter trains."""
    if p is None or not p.requires_grad:
        return
    found = gradient()
    gradients[p] = gradients[p] + found if p in gradients else found


def _of_weight(d_out_NO: Tensor, x_ND: Tensor) -> Tensor:
    return d_out_NO.t() @ x_ND


@lru_cache(maxsize=8)
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)
