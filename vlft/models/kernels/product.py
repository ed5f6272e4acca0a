"""Products of one input with the weights of some linear modules, forward and backward, without autograd in between.

The weights of a group are joined into one matrix in the compute dtype where that costs nothing (they must be cast,
filled up or dequantised anyway) or little (narrow ones): fewer and larger products. Adapters of a group are joined too:
one product down, one up. Joined on the way, a matrix is dropped after its use: sharding engines put other tensors into
the modules for the time of a forward and a backward. Where weights stay at their place, `Products.hold` keeps it.

N tokens or patches, D columns of the input, O columns of the outputs end to end, R ranks of all adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vlft.models.kernels import pointwise

Gradients = dict[nn.Parameter, Tensor]

ALIGNED = 64
"""Columns that a width is filled up to on a GPU, in passing.

Rows of bf16 must be aligned to 16 bytes: at 3420, the inner width of Qwen2.5-VL's vision MLP, cuBLAS falls back to
kernels of Ampere's time. Exact: rows of zeros in one matrix give zeros, which every activation leaves zero, and which
meet columns of zeros in the next; weights, optimizers and checkpoints keep their shape.
"""
NARROW = 1024
"""Rows of a weight under which its product is too small for a large GPU, so that it is joined with its neighbours."""
HELD = 36 * 2**20
"""Bytes up to which a group's joined weights are kept: those of a vision layer, of queries, keys and values."""


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
    def plain(self) -> bool:
        return type(self.base) is nn.Linear

    @property
    def dropouts(self) -> set[float]:
        """Probabilities before the adapters, in training."""
        return {getattr(m, "p", 0.0) for m in getattr(self.outer, "lora_dropout", {}).values()}

    def adapters(self) -> Iterator[Adapter]:
        outer = self.outer
        if outer is self.base:
            return
        if outer.disable_adapters and outer.merged:
            outer.unmerge()  # as PEFT's own forward: the weights of the base alone are asked for
        if outer.disable_adapters or outer.merged:
            return
        for name in outer.active_adapters:
            if name in outer.lora_A:
                yield Adapter(outer.lora_A[name].weight, outer.lora_B[name].weight, float(outer.scaling[name]))

    def write(self, target: Tensor) -> None:
        """The weight (rows, columns) into `target`, in its dtype."""
        if self.plain:
            target.copy_(self.base.weight)
            return
        from bitsandbytes import functional as bnb

        # A sharding engine has made the parameter anew where it has no state; the module remembers.
        state = getattr(self.base.weight, "quant_state", None) or self.base.quant_state
        if target.is_cuda and state.dtype == target.dtype and target.is_contiguous():
            bnb.dequantize_4bit(self.base.weight.data, state, out=target)
        else:
            target.copy_(bnb.dequantize_4bit(self.base.weight.data, state))

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


@dataclass(frozen=True)
class Piece:
    """One product of a group: of one module, or of all joined. In the compute dtype."""

    start: int
    """its first column in the group's output"""
    weight_OD: Tensor
    bias_O: Tensor | None

    def of(self, out_NO: Tensor) -> Tensor:
        """Its columns."""
        rows = len(self.weight_OD)
        return out_NO if rows == out_NO.shape[1] else out_NO[:, self.start : self.start + rows]


@dataclass(frozen=True)
class LowRank:
    """The adapters of a group: x A^T B^T times `scale`. In the compute dtype."""

    adapters: list[tuple[int, Adapter]]
    """with the first column of its module's output"""
    a_RD: Tensor
    b_OR: Tensor
    """block diagonal: outputs end to end against ranks end to end"""
    scale: float
    """of all adapters alike; 1 where they differ, and `b_OR` has them"""

    def down(self, x_ND: Tensor) -> Tensor:
        """(N, R)."""
        return _scaled(x_ND, self.a_RD.t(), self.scale)

    def down_again(self, d_out_NO: Tensor) -> Tensor:
        """(N, R): the gradient of what `down` gave, once more times `scale`."""
        return _scaled(d_out_NO, self.b_OR, self.scale)

    def gradients(
        self, dropped_ND: Tensor, low_NR: Tensor, d_out_NO: Tensor, d_low_NR: Tensor, gradients: Gradients
    ) -> None:
        """
        Args:
            dropped_ND: the adapters' input; low_NR: what `down` gave; d_low_NR: what `down_again` gave.
        """
        firsts = _starts([len(adapter.a_rD) for _, adapter in self.adapters])
        d_a = d_low_NR.t() @ dropped_ND if any(a.a_rD.requires_grad for _, a in self.adapters) else None
        d_b = d_out_NO.t() @ low_NR if any(a.b_Or.requires_grad for _, a in self.adapters) else None
        for (start, adapter), first in zip(self.adapters, firsts, strict=True):
            ranks = slice(first, first + len(adapter.a_rD))
            own = 1.0 if self.scale == adapter.scale else adapter.scale
            if d_a is not None:
                note(gradients, adapter.a_rD, lambda r=ranks, p=adapter.a_rD: d_a[r, : p.shape[1]])
            if d_b is not None:
                rows = slice(start, start + len(adapter.b_Or))
                note(gradients, adapter.b_Or, lambda r=ranks, o=rows, s=own: _times(d_b[o, r], s))


def _scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return x @ y
    out = x.new_empty(len(x), y.shape[1])
    return torch.addmm(out, x, y, beta=0.0, alpha=scale, out=out)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _starts(widths: Sequence[int]) -> list[int]:
    return [0, *accumulate(widths)][:-1]


Copies = list[tuple[Tensor, Tensor, float]]
"""(where, from what, factor)"""


class Products:
    """Some products of one input, whose results lie side by side in one tensor."""

    def __init__(self, modules: Sequence[nn.Module], *, fills_up: bool = False, filled_up: bool = False) -> None:
        """
        Args:
            fills_up: on a GPU each result has zeros behind it, up to an aligned width.
            filled_up: the input has.
        Raises:
            UnsupportedError: the modules' inputs differ in width, or their adapters' in dropout.
        """
        self.each = [Product(module) for module in modules]
        self.fills_up, self.filled_up = fills_up, filled_up
        self._piece: Piece | None = None
        self._low: LowRank | None = None
        self.dropout = 0.0
        self.check()

    def check(self) -> None:
        """Of adapters that are there now: others may come after this was made.

        Raises:
            UnsupportedError: as at the start.
        """
        for product in self.each:
            if product.outer is not product.base:
                _check_adapters(product.outer)
        if len({p.columns for p in self.each}) > 1:
            raise UnsupportedError("products of one input with different widths")
        dropouts = set().union(*(p.dropouts for p in self.each))
        if len(dropouts) > 1:
            raise UnsupportedError("adapters of one input with different dropout")
        self.dropout = max(dropouts, default=0.0)

    def trained(self) -> Iterator[nn.Parameter]:
        for product in self.each:
            yield from product.trained()

    # -- weights -----------------------------------------------------------------------------------------------------

    def columns(self, device: torch.device) -> int:
        """Of the input."""
        own = self.each[0].columns
        return aligned(own, device) if self.filled_up else own

    def widths(self, device: torch.device) -> list[int]:
        """Columns of each module's result."""
        return [aligned(p.rows, device) if self.fills_up else p.rows for p in self.each]

    def pieces(self, kind: torch.dtype, device: torch.device) -> list[Piece]:
        if self._piece is not None and self._piece.weight_OD.dtype == kind:
            return [self._piece]
        columns, widths = self.columns(device), self.widths(device)
        if not self._joins(kind, columns, widths):
            starts = _starts(widths)
            return [Piece(at, p.base.weight, p.base.bias) for at, p in zip(starts, self.each, strict=True)]
        piece, copies = self._joined(kind, columns, device, widths)
        for product, weight, bias in copies:
            product.write(weight)
            if bias is not None:
                bias.copy_(product.base.bias)
        return [piece]

    def low_rank(self, kind: torch.dtype, device: torch.device) -> LowRank | None:
        if self._low is not None and self._low.a_RD.dtype == kind:
            return self._low
        low, copies = self._joined_adapters(kind, device)
        for target, p, factor in copies:
            target.copy_(p)
            if factor != 1.0:
                target.mul_(factor)
        return low

    def hold(self, kind: torch.dtype, device: torch.device) -> Copies:
        """Keep joined weights, where they are small, and joined adapters from now on.

        Returns:
            Copies to be made now, and again whenever the parameters that they are from have changed.
        """
        self._piece, copies = None, []
        columns = self.columns(device)
        widths = self.widths(device)
        small = sum(widths) * columns * kind.itemsize <= HELD
        if small and all(p.plain for p in self.each) and self._joins(kind, columns, widths):
            self._piece, joined = self._joined(kind, columns, device, widths)
            for product, weight, bias in joined:
                copies.append((weight, product.base.weight, 1.0))
                if bias is not None:
                    copies.append((bias, product.base.bias, 1.0))
        self._low, more = self._joined_adapters(kind, device)
        return copies + more

    def drop(self) -> None:
        """Hold nothing any more."""
        self._piece = self._low = None

    def _joins(self, kind: torch.dtype, columns: int, widths: Sequence[int]) -> bool:
        if any(not p.plain or p.base.weight.dtype != kind for p in self.each):
            return True
        if columns != self.each[0].columns or any(w != p.rows for w, p in zip(widths, self.each, strict=True)):
            return True
        return len(self.each) > 1 and min(p.rows for p in self.each) < NARROW

    def _joined(
        self, kind: torch.dtype, columns: int, device: torch.device, widths: Sequence[int]
    ) -> tuple[Piece, list[tuple[Product, Tensor, Tensor | None]]]:
        """One piece for all, and where each module's weight and bias go in it."""
        full = columns == self.each[0].columns and list(widths) == [p.rows for p in self.each]
        make: Any = torch.empty if full else torch.zeros
        weight = make(sum(widths), columns, dtype=kind, device=device)
        biased = any(p.base.bias is not None for p in self.each)
        bias = torch.zeros(sum(widths), dtype=kind, device=device) if biased else None
        copies = []
        for start, p in zip(_starts(widths), self.each, strict=True):
            rows = slice(start, start + p.rows)
            own = bias[rows] if bias is not None and p.base.bias is not None else None
            copies.append((p, weight[rows] if columns == p.columns else weight[rows, : p.columns], own))
        return Piece(0, weight, bias), copies

    def _joined_adapters(self, kind: torch.dtype, device: torch.device) -> tuple[LowRank | None, Copies]:
        """What `low_rank` gives, and what must be copied into it."""
        columns, widths = self.columns(device), self.widths(device)
        adapters = [(at, one) for at, p in zip(_starts(widths), self.each, strict=True) for one in p.adapters()]
        if not adapters:
            return None, []
        ranks = [len(adapter.a_rD) for _, adapter in adapters]
        a = torch.zeros(sum(ranks), columns, dtype=kind, device=device)
        b = torch.zeros(sum(widths), sum(ranks), dtype=kind, device=device)
        scales = {adapter.scale for _, adapter in adapters}
        copies: Copies = []
        for (start, adapter), first, rank in zip(adapters, _starts(ranks), ranks, strict=True):
            copies.append((a[first : first + rank, : adapter.a_rD.shape[1]], adapter.a_rD, 1.0))
            target = b[start : start + len(adapter.b_Or), first : first + rank]
            copies.append((target, adapter.b_Or, 1.0 if len(scales) == 1 else adapter.scale))
        return LowRank(adapters, a, b, scales.pop() if len(scales) == 1 else 1.0), copies

    # -- products ----------------------------------------------------------------------------------------------------

    def forward(self, x_ND: Tensor, kind: torch.dtype, seed: int | None) -> tuple[Tensor, Tensor | None]:
        """(N, O), and the adapters' (N, R) in between, which the backward pass takes if there is any.

        Args:
            x_ND: in the compute dtype `kind`.
            seed: of the adapters' dropout; None drops nothing. One mask serves all modules of this input.
        """
        device = x_ND.device
        out = x_ND.new_empty(len(x_ND), sum(self.widths(device)))
        low = self.low_rank(kind, device)
        low_NR = None if low is None else low.down(self._dropped(x_ND, seed))
        for piece in self.pieces(kind, device):
            part, weight_T = piece.of(out), piece.weight_OD.t()
            if low is None or low_NR is None:
                _product(piece.bias_O, x_ND, weight_T, part)
                continue
            # The adapters first: they write what the large product then reads on its way, instead of a pass of its own.
            rows = slice(piece.start, piece.start + len(piece.weight_OD))
            _product(piece.bias_O, low_NR, low.b_OR[rows].t(), part)
            part.addmm_(x_ND, weight_T)
        return out, low_NR

    def backward_low(self, d_out_NO: Tensor, kind: torch.dtype) -> Tensor | None:
        """(N, R): the gradient that reaches the adapters' inner side; both other backwards take it."""
        low = self.low_rank(kind, d_out_NO.device)
        return None if low is None else low.down_again(d_out_NO)

    def backward_input(self, d_out_NO: Tensor, d_low_NR: Tensor | None, kind: torch.dtype, seed: int | None) -> Tensor:
        """The gradient of x (N, D)."""
        d_x = None
        low = self.low_rank(kind, d_out_NO.device)
        if low is not None and d_low_NR is not None:
            d_x = d_low_NR @ low.a_RD
            if seed is not None:
                d_x = pointwise.dropout(d_x, self.dropout, seed, in_place=True)
        for piece in self.pieces(kind, d_out_NO.device):
            part = piece.of(d_out_NO)
            d_x = part @ piece.weight_OD if d_x is None else d_x.addmm_(part, piece.weight_OD)
        assert d_x is not None
        return d_x

    def backward_weights(
        self,
        x_ND: Tensor,
        low_NR: Tensor | None,
        d_out_NO: Tensor,
        d_low_NR: Tensor | None,
        kind: torch.dtype,
        seed: int | None,
        gradients: Gradients,
    ) -> None:
        """The gradients of what trains. `low_NR`: from the forward pass."""
        device = x_ND.device
        for start, width, p in zip(_starts(self.widths(device)), self.widths(device), self.each, strict=True):
            weight, bias = p.base.weight, p.base.bias
            trains = weight.requires_grad
            if trains or (bias is not None and bias.requires_grad):
                part = d_out_NO[:, start : start + width]
                note(gradients, weight, lambda d=part, p=p: _of_weight(d, x_ND, p.base.weight)[: p.rows, : p.columns])
                note(gradients, bias, lambda d=part, p=p: d.sum(0)[: p.rows])
        low = self.low_rank(kind, device)
        if low is not None:
            assert low_NR is not None
            assert d_low_NR is not None
            low.gradients(self._dropped(x_ND, seed), low_NR, d_out_NO, d_low_NR, gradients)

    def backward(
        self,
        x_ND: Tensor,
        low_NR: Tensor | None,
        d_out_NO: Tensor,
        kind: torch.dtype,
        seed: int | None,
        gradients: Gradients,
        *,
        wants_input: bool = True,
    ) -> Tensor | None:
        """The gradient of x (N, D), and those of what trains into `gradients`."""
        d_low = self.backward_low(d_out_NO, kind)
        self.backward_weights(x_ND, low_NR, d_out_NO, d_low, kind, seed, gradients)
        return self.backward_input(d_out_NO, d_low, kind, seed) if wants_input else None

    def _dropped(self, x_ND: Tensor, seed: int | None) -> Tensor:
        """The adapters' input. Drawn again in the backward pass: a mask that is kept costs a byte for each value."""
        return x_ND if seed is None else pointwise.dropout(x_ND, self.dropout, seed)


def _product(bias_O: Tensor | None, x_ND: Tensor, weight_DO: Tensor, out_NO: Tensor) -> None:
    if bias_O is None:
        torch.mm(x_ND, weight_DO, out=out_NO)
    else:
        torch.addmm(bias_O, x_ND, weight_DO, out=out_NO)


def note(gradients: Gradients, p: nn.Parameter | None, gradient: Callable[..., Any]) -> None:
    """Work out a gradient and add it to what is there, if the parameter trains."""
    if p is None or not p.requires_grad:
        return
    found = gradient()
    gradients[p] = gradients[p] + found if p in gradients else found


def _of_weight(d_out_NO: Tensor, x_ND: Tensor, p: nn.Parameter) -> Tensor:
    """In the parameter's dtype where the product can give it: rounded to bf16 first, masters would lose digits."""
    if x_ND.is_cuda and p.dtype == torch.float32 and x_ND.dtype != torch.float32:
        return torch.mm(d_out_NO.t(), x_ND, out_dtype=torch.float32)
    return d_out_NO.t() @ x_ND
