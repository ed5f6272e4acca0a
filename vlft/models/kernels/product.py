"""Products of one input with the weights of some linear modules, forward and backward, without autograd in between.

The weights of a group are joined into one matrix in the compute dtype where that costs nothing (they must be cast,
filled up or dequantised anyway) or little (narrow ones): fewer and larger products. Adapters of a group are joined too:
one product down, one up. Joined on the way, a matrix is dropped after its use: sharding engines put other tensors into
the modules for the time of a forward and a backward. Where weights stay at their place, `Products.hold` keeps it.

`Products` are the modules; `Weights` are their tensors, ready to be multiplied with, for one pass or for as long as
they stay: a row runs through a hundred layers, and a look at every module on the way costs the host milliseconds.

N tokens or patches, D columns of the input, O columns of the outputs end to end, R ranks of all adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vlft.models.kernels import four_bit, pointwise
from vlft.models.kernels.pointwise import Drop
from vlft.optim import gradient_dtype

Gradients = dict[int, Tensor]
"""By the parameter's `id`: its own hash is a function of Python's."""
DtypeOf = Callable[[nn.Parameter], torch.dtype]

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
        self.plain = type(self.base) is nn.Linear

    @property
    def dropouts(self) -> set[float]:
        """Probabilities before the adapters, in training."""
        return {getattr(m, "p", 0.0) for m in getattr(self.outer, "lora_dropout", {}).values()}

    def own(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight and bias of the module itself."""
        return self.base.weight, self.base.bias

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
        # A sharding engine has made the parameter anew where it has no state; the module remembers.
        state = getattr(self.base.weight, "quant_state", None) or self.base.quant_state
        four_bit.dequantize(self.base.weight.data, state, target)

    def trained(self) -> Iterator[nn.Parameter]:
        for p in self.own():
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


@dataclass(frozen=True, slots=True)
class Piece:
    """One product of a group: of one module, or of all joined. In the compute dtype."""

    start: int
    """its first column in the group's output"""
    stop: int
    weight_OD: Tensor
    weight_DO: Tensor
    """the same, transposed"""
    bias_O: Tensor | None
    whole: bool
    """There is no other."""

    @classmethod
    def of(cls, start: int, weight_OD: Tensor, bias_O: Tensor | None, width: int) -> Piece:
        """`width`: columns of the group's output."""
        rows = weight_OD.shape[0]
        return cls(start, start + rows, weight_OD, weight_OD.t(), bias_O, whole=rows == width)

    def columns(self, out_NO: Tensor) -> Tensor:
        """Its own."""
        return out_NO if self.whole else out_NO[:, self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one adapter lies among those of a group."""

    adapter: Adapter
    outputs: slice
    """of its module"""
    ranks: slice
    scale: float
    """that its gradient must still be multiplied with"""


class LowRank:
    """The adapters of a group: x A^T B^T times `scale`. In the compute dtype."""

    def __init__(self, adapters: Sequence[tuple[int, Adapter]], a_RD: Tensor, b_OR: Tensor, scale: float) -> None:
        """
        Args:
            adapters: with the first column of its module's output.
            b_OR: block diagonal: outputs end to end against ranks end to end.
            scale: of all adapters alike; 1 where they differ, and `b_OR` has them.
        """
        self.a_RD, self.b_OR, self.scale = a_RD, b_OR, scale
        self.a_DR, self.b_RO = a_RD.t(), b_OR.t()
        firsts = _starts([one.a_rD.shape[0] for _, one in adapters])
        self.places = [
            Place(
                one, slice(start, start + one.b_Or.shape[0]), slice(first, first + one.a_rD.shape[0]),
                1.0 if scale == one.scale else one.scale,
            )
            for (start, one), first in zip(adapters, firsts, strict=True)
        ]  # fmt: skip
        self.trains_a = any(one.a_rD.requires_grad for _, one in adapters)

    def down(self, x_ND: Tensor) -> Tensor:
        """(N, R)."""
        return _scaled(x_ND, self.a_DR, self.scale)

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
        d_a = _of_weight(d_low_NR, dropped_ND, self.places[0].adapter.a_rD) if self.trains_a else None
        for place in self.places:
            a, b = place.adapter.a_rD, place.adapter.b_Or
            if d_a is not None and a.requires_grad:
                own = d_a[place.ranks]
                note(gradients, a, own if own.shape == a.shape else own[:, : a.shape[1]])
            if b.requires_grad:
                # Each by itself, though one product could give all: a piece of that would have to be copied out again.
                d_b = _of_weight(d_out_NO[:, place.outputs], low_NR[:, place.ranks], b)
                note(gradients, b, d_b if place.scale == 1.0 else d_b * place.scale)


def _scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    # Not addmm with a factor: narrow products by it took the host of an H200 200 microseconds each, `mm` 65.
    out = x @ y
    return out if scale == 1.0 else out.mul_(scale)


def _starts(widths: Sequence[int]) -> list[int]:
    return [0, *accumulate(widths)][:-1]


Copies = list[tuple[Tensor, Tensor, float]]
"""(where, from what, factor)"""


@dataclass(frozen=True, slots=True)
class Trained:
    """A module of a group whose weight or bias trains."""

    outputs: slice
    """its columns of the output, with those that fill it up"""
    rows: int
    columns: int
    """of the parameter"""
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def gradients(self, x_ND: Tensor, d_out_NO: Tensor, sums_O: Tensor | None, gradients: Gradients) -> None:
        """`sums_O`: of the columns of `d_out`."""
        if self.weight is not None:
            found = _of_weight(d_out_NO[:, self.outputs], x_ND, self.weight)
            whole = found.shape == self.weight.shape
            note(gradients, self.weight, found if whole else found[: self.rows, : self.columns])
        if self.bias is not None:
            assert sums_O is not None
            start = self.outputs.start
            note(gradients, self.bias, sums_O[start : start + self.rows])


class Weights:
    """The tensors of a group in the compute dtype, and the products with them."""

    def __init__(
        self, group: Products, kind: torch.dtype, device: torch.device, pieces: list[Piece] | None, low: LowRank | None
    ) -> None:
        """
        Args:
            pieces: None: large, and to be cast or dequantised, so made anew for each product and dropped after it.
        """
        self.group, self.kind, self.device, self.low = group, kind, device, low
        self._pieces = pieces
        widths = group.widths(device)
        self.width = sum(widths)
        self.trained = [
            Trained(slice(start, start + width), p.rows, p.columns, _learning(p.base.weight), _learning(p.base.bias))
            for start, width, p in zip(_starts(widths), widths, group.each, strict=True)
        ]
        self.trained = [one for one in self.trained if one.weight is not None or one.bias is not None]
        biases = [gradient_dtype(one.bias) for one in self.trained if one.bias is not None]
        self.of_biases = reduce(torch.promote_types, biases) if biases else None
        """The dtype of the biases' gradients, where some train."""

    def drop(self, seed: int | None) -> Drop | None:
        """What the adapters' input loses."""
        if self.low is None or seed is None or not self.group.dropout:
            return None
        return Drop(self.group.dropout, seed)

    @property
    def pieces(self) -> list[Piece]:
        return self.group.fresh_pieces(self.kind, self.device) if self._pieces is None else self._pieces

    def forward(self, x_ND: Tensor, dropped_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, O), and the adapters' (N, R) in between, which the backward pass takes if there is any.

        Args:
            x_ND: in the compute dtype.
            dropped_ND: the adapters' input; one mask serves all modules of this input.
        """
        low_NR = None if self.low is None else self.low.down(dropped_ND)
        pieces = self.pieces
        if pieces[0].whole:
            return self._forward_piece(pieces[0], x_ND, low_NR, None), low_NR
        out = x_ND.new_empty(x_ND.shape[0], self.width)
        for piece in pieces:
            self._forward_piece(piece, x_ND, low_NR, piece.columns(out))
        return out, low_NR

    def _forward_piece(self, piece: Piece, x_ND: Tensor, low_NR: Tensor | None, into: Tensor | None) -> Tensor:
        if self.low is None or low_NR is None:
            return _product(piece.bias_O, x_ND, piece.weight_DO, into)
        # The adapters first: they write what the large product then reads on its way, instead of a pass of its own.
        out = _product(piece.bias_O, low_NR, piece.columns(self.low.b_RO), into)
        return out.addmm_(x_ND, piece.weight_DO)

    def backward_low(self, d_out_NO: Tensor) -> Tensor | None:
        """(N, R): the gradient that reaches the adapters' inner side; both other backwards take it."""
        return None if self.low is None else self.low.down_again(d_out_NO)

    def backward_input(self, d_out_NO: Tensor, d_low_NR: Tensor | None, drop: Drop | None) -> Tensor:
        """The gradient of x (N, D)."""
        d_x = None
        if self.low is not None and d_low_NR is not None:
            a_RD = self.low.a_RD
            d_x = d_low_NR @ a_RD if drop is None else pointwise.product_dropped(d_low_NR, a_RD, drop)
        for piece in self.pieces:
            part = piece.columns(d_out_NO)
            d_x = part @ piece.weight_OD if d_x is None else d_x.addmm_(part, piece.weight_OD)
        assert d_x is not None
        return d_x

    def backward_weights(
        self,
        x_ND: Tensor,
        dropped_ND: Tensor,
        low_NR: Tensor | None,
        d_out_NO: Tensor,
        d_low_NR: Tensor | None,
        gradients: Gradients,
        sums_O: Tensor | None = None,
    ) -> None:
        """The gradients of what trains. `x_ND` is read if one of the modules' own weights does (`trained`).

        Args:
            low_NR: from the forward pass.
            sums_O: of the columns of `d_out`, where they are known already.
        """
        if sums_O is None and self.of_biases is not None:
            sums_O = pointwise.column_sums(d_out_NO, self.of_biases)
        for one in self.trained:
            one.gradients(x_ND, d_out_NO, sums_O, gradients)
        if self.low is not None:
            assert low_NR is not None
            assert d_low_NR is not None
            self.low.gradients(dropped_ND, low_NR, d_out_NO, d_low_NR, gradients)

    def backward(
        self,
        x_ND: Tensor,
        dropped_ND: Tensor,
        low_NR: Tensor | None,
        d_out_NO: Tensor,
        drop: Drop | None,
        gradients: Gradients,
        *,
        wants_input: bool = True,
        sums_O: Tensor | None = None,
    ) -> Tensor | None:
        """The gradient of x (N, D), and those of what trains into `gradients`."""
        d_low = self.backward_low(d_out_NO)
        self.backward_weights(x_ND, dropped_ND, low_NR, d_out_NO, d_low, gradients, sums_O)
        return self.backward_input(d_out_NO, d_low, drop) if wants_input else None


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
        self._held: Weights | None = None
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

    def columns(self, device: torch.device) -> int:
        """Of the input."""
        own = self.each[0].columns
        return aligned(own, device) if self.filled_up else own

    def widths(self, device: torch.device) -> list[int]:
        """Columns of each module's result."""
        return [aligned(p.rows, device) if self.fills_up else p.rows for p in self.each]

    def weights(self, kind: torch.dtype, device: torch.device) -> Weights:
        """What is held, or what the modules have now: `kind` is the compute dtype."""
        if self._held is not None and self._held.kind == kind:
            return self._held
        low, copies = self._joined_adapters(kind, device)
        for target, p, factor in copies:
            target.copy_(p)
            if factor != 1.0:
                target.mul_(factor)
        return Weights(self, kind, device, self._as_they_are(kind, device), low)

    def hold(self, kind: torch.dtype, device: torch.device) -> Copies:
        """Keep `weights` from now on, with joined weights where they are small, and joined adapters.

        Returns:
            Copies to be made now, and again whenever the parameters that they are from have changed.
        """
        self.drop()
        copies: Copies = []
        pieces = self._as_they_are(kind, device)
        if pieces is None and self._may_be_held(kind, device):
            piece, joined = self._joined(kind, device)
            pieces = [piece]
            for product, weight, bias in joined:
                copies.append((weight, product.base.weight, 1.0))
                if bias is not None:
                    copies.append((bias, product.base.bias, 1.0))
        low, more = self._joined_adapters(kind, device)
        self._held = Weights(self, kind, device, pieces, low)
        return copies + more

    def drop(self) -> None:
        """Hold nothing any more."""
        self._held = None

    def copied(self, kind: torch.dtype, device: torch.device, of: DtypeOf) -> tuple[int, int]:
        """Bytes of the copies that `hold` would keep, and of what is made anew for each product and dropped after it.

        Args:
            device: to be asked for, so that it need not be here.
            of: a parameter's dtype in the run; here it may lie in another, or nowhere.
        """
        columns, width = self.columns(device), sum(self.widths(device))
        ranks = sum(len(adapter.a_rD) for p in self.each for adapter in p.adapters())
        held, joined = ranks * (columns + width) * kind.itemsize, columns * width * kind.itemsize
        if self._lie_ready(kind, device, of):
            return held, 0
        return (held + joined, 0) if self._may_be_held(kind, device) else (held, joined)

    def _may_be_held(self, kind: torch.dtype, device: torch.device) -> bool:
        small = sum(self.widths(device)) * self.columns(device) * kind.itemsize <= HELD
        return small and all(p.plain for p in self.each)

    def _lie_ready(self, kind: torch.dtype, device: torch.device, of: DtypeOf = attrgetter("dtype")) -> bool:
        """The modules' own weights can be multiplied with as they are, and are not better joined."""
        if any(not p.plain or any(own is not None and of(own) != kind for own in p.own()) for p in self.each):
            return False
        own = self.columns(device) == self.each[0].columns and self.widths(device) == [p.rows for p in self.each]
        return own and (len(self.each) == 1 or min(p.rows for p in self.each) >= NARROW)

    def _as_they_are(self, kind: torch.dtype, device: torch.device) -> list[Piece] | None:
        if not self._lie_ready(kind, device):
            return None
        widths = self.widths(device)
        return [
            Piece.of(start, p.base.weight, p.base.bias, sum(widths))
            for start, p in zip(_starts(widths), self.each, strict=True)
        ]

    def fresh_pieces(self, kind: torch.dtype, device: torch.device) -> list[Piece]:
        """All joined, cast or dequantised just now."""
        piece, copies = self._joined(kind, device)
        for product, weight, bias in copies:
            product.write(weight)
            if bias is not None:
                bias.copy_(product.base.bias)
        return [piece]

    def _joined(
        self, kind: torch.dtype, device: torch.device
    ) -> tuple[Piece, list[tuple[Product, Tensor, Tensor | None]]]:
        """One piece for all, and where each module's weight and bias go in it."""
        columns, widths = self.columns(device), self.widths(device)
        full = columns == self.each[0].columns and widths == [p.rows for p in self.each]
        make: Any = torch.empty if full else torch.zeros
        weight = make(sum(widths), columns, dtype=kind, device=device)
        biased = any(p.base.bias is not None for p in self.each)
        bias = torch.zeros(sum(widths), dtype=kind, device=device) if biased else None
        copies = []
        for start, p in zip(_starts(widths), self.each, strict=True):
            rows = slice(start, start + p.rows)
            own = bias[rows] if bias is not None and p.base.bias is not None else None
            copies.append((p, weight[rows] if columns == p.columns else weight[rows, : p.columns], own))
        return Piece.of(0, weight, bias, sum(widths)), copies

    def _joined_adapters(self, kind: torch.dtype, device: torch.device) -> tuple[LowRank | None, Copies]:
        """Room for the adapters, and what must be copied into it."""
        columns, widths = self.columns(device), self.widths(device)
        adapters = [(at, one) for at, p in zip(_starts(widths), self.each, strict=True) for one in p.adapters()]
        if not adapters:
            return None, []
        ranks = [adapter.a_rD.shape[0] for _, adapter in adapters]
        a = torch.zeros(sum(ranks), columns, dtype=kind, device=device)
        b = torch.zeros(sum(widths), sum(ranks), dtype=kind, device=device)
        scales = {adapter.scale for _, adapter in adapters}
        copies: Copies = []
        for (start, adapter), first, rank in zip(adapters, _starts(ranks), ranks, strict=True):
            copies.append((a[first : first + rank, : adapter.a_rD.shape[1]], adapter.a_rD, 1.0))
            target = b[start : start + adapter.b_Or.shape[0], first : first + rank]
            copies.append((target, adapter.b_Or, 1.0 if len(scales) == 1 else adapter.scale))
        return LowRank(adapters, a, b, scales.pop() if len(scales) == 1 else 1.0), copies


def _learning(p: nn.Parameter | None) -> nn.Parameter | None:
    return p if p is not None and p.requires_grad else None


def _product(bias_O: Tensor | None, x_ND: Tensor, weight_DO: Tensor, out_NO: Tensor | None) -> Tensor:
    """Into `out_NO`, if it is there."""
    if bias_O is None:
        return torch.mm(x_ND, weight_DO, out=out_NO)
    return torch.addmm(bias_O, x_ND, weight_DO, out=out_NO)


def note(gradients: Gradients, p: nn.Parameter, gradient: Tensor) -> None:
    """Add a gradient to what is there: one module may be called by several."""
    before = gradients.get(id(p))
    gradients[id(p)] = gradient if before is None else before + gradient


def _of_weight(d_out_NO: Tensor, x_ND: Tensor, p: nn.Parameter) -> Tensor:
    """In the gradient's dtype where the product can give it: rounded to bf16 first, a sum in fp32 would lose digits."""
    if x_ND.is_cuda and x_ND.dtype != torch.float32 and gradient_dtype(p) == torch.float32:
        return torch.mm(d_out_NO.t(), x_ND, out_dtype=torch.float32)
    return d_out_NO.t() @ x_ND
