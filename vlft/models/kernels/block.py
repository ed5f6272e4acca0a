"""A whole pre-norm transformer layer as ONE autograd node: x + attention(norm(x)), then + MLP(norm(.)).

One node, because its backward is written out: it knows which values are cheap to compute again (norms, activations) and
keeps only what is dear, launches a third of the kernels, and needs nothing from a compiler. Both towers of all families
are such layers; `install.py` finds their pieces.

N tokens or patches, D width, H heads, K key-value heads, C = H + 2K, d head size, I inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlft.models.attention import (
    Attended,
    attend,
    attend_again,
    attend_backward,
    attend_windows,
    attend_windows_backward,
    has_windows,
)
from vlft.models.kernels import pointwise
from vlft.models.kernels.pointwise import Activation, Drop
from vlft.models.kernels.product import Copies, Gradients, Products, Weights, note
from vlft.optim import gradient_dtype

Keep = Literal["all", "attention", "attended", "input"]
"""What a layer keeps for its backward pass: all that is dear; all but the MLP's inner values; all but these and
queries, keys and values, so that what the attention gave stays; or its input alone."""


class Norm:
    """LayerNorm where the module has a bias, RMSNorm where not."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.eps = float(getattr(module, "variance_epsilon", None) or module.eps)

    @property
    def weight(self) -> nn.Parameter:
        # Past the module's own search, which takes Python longer than a launch.
        return self.module._parameters["weight"]  # type: ignore[no-any-return]

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module._parameters.get("bias")  # type: ignore[no-any-return]

    def trained(self) -> Iterator[nn.Parameter]:
        yield from (p for p in (self.weight, self.bias) if p is not None and p.requires_grad)

    def forward(
        self, x_ND: Tensor, branch_ND: Tensor | None, kind: torch.dtype, drop: Drop | None, *, plain: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `pointwise.norm`."""
        return pointwise.norm(x_ND, branch_ND, self.weight, self.bias, self.eps, kind, drop, plain=plain)

    def backward(self, d_out_ND: Tensor, x_ND: Tensor, d_more_ND: Tensor, gradients: Gradients) -> Tensor:
        weight, bias = self.weight, self.bias
        learns = weight.requires_grad, bias is not None and bias.requires_grad
        d_x, d_weight, d_bias = pointwise.norm_backward(
            d_out_ND, x_ND, weight, bias, self.eps, d_more_ND, trains=any(learns)
        )
        _note(gradients, weight, d_weight)
        _note(gradients, bias, d_bias)
        return d_x


def _note(gradients: Gradients, p: nn.Parameter | None, gradient: Tensor | None) -> None:
    if p is not None and p.requires_grad:
        assert gradient is not None
        note(gradients, p, gradient)


@dataclass(slots=True)
class Call:
    """What a layer is called with beside its input."""

    cos_Nd: Tensor
    sin_Nd: Tensor
    borders: Tensor
    """(S + 1,) int32 of the segments that attend to themselves"""
    longest: int | None
    kind: torch.dtype
    """compute dtype"""
    keep: Keep
    seeds: tuple[int, int, int, int] | tuple[None, None, None, None]
    """of the dropout before the adapters of (queries keys values, output, inner, down)"""
    learns: bool = True
    """A backward pass may follow; otherwise nothing is kept for one."""
    rows_S: Tensor | None = None
    """int64 places, each once: only these go on after the attention, as behind the last layer nothing else is read"""


@dataclass(slots=True)
class Kept:
    """From the forward to the backward pass."""

    before: Tensor | None = None
    """(N, C, d) before the rotation, where queries and keys have norms or attend in short windows"""
    attended: Attended | None = None
    """(N, H, d), and what its backward needs"""
    middle: Tensor | None = None
    """(N, D) residual stream between attention and MLP"""
    inner: Tensor | None = None
    """(N, I) or (N, 2 I) before the activation"""
    lows: dict[str, Tensor | None] = field(default_factory=dict)
    """(N, R) between the two halves of the adapters, of each group that has some"""


Groups = tuple[Weights, Weights, Weights, Weights]
"""(queries keys values, output, inner, down), ready to be multiplied with."""
Drops = tuple[Drop | None, Drop | None, Drop | None, Drop | None]


@dataclass(eq=False)
class Block:
    """The pieces of one layer."""

    norm_1: Norm
    qkv: Products
    q_norm: Norm | None
    k_norm: Norm | None
    out: Products
    norm_2: Norm
    inner: Products
    activation: Activation
    down: Products
    heads: int
    kv_heads: int
    size: int
    """of a head"""
    scale: float
    causal: bool
    held: list[nn.Parameter] | None = field(default=None, init=False)
    """What trains, where that is known not to have changed."""
    halves_alike: bool | None = field(default=None, init=False)
    """Whether both halves of a head are rotated by the same angles, which `attend_windows` takes for granted. Asked at
    the first row: to ask waits for the device."""

    def trained(self) -> list[nn.Parameter]:
        if self.held is not None:
            return self.held
        pieces = (self.norm_1, self.qkv, self.q_norm, self.k_norm, self.out, self.norm_2, self.inner, self.down)
        return [p for piece in pieces if piece is not None for p in piece.trained()]

    def norms(self) -> list[Norm]:
        return [norm for norm in (self.norm_1, self.q_norm, self.k_norm, self.norm_2) if norm is not None]

    def hold(self, kind: torch.dtype, device: torch.device) -> Copies:
        """Keep what is looked up in modules; returns the copies that this takes, as `Products.hold` does."""
        copies = [copy for group in self.groups() for copy in group.hold(kind, device)]
        self.held = None
        self.held = self.trained()
        return copies

    def drop(self) -> None:
        """Hold nothing any more."""
        self.held = None
        for group in self.groups():
            group.drop()

    def groups(self) -> tuple[Products, Products, Products, Products]:
        return self.qkv, self.out, self.inner, self.down

    def seeds(self, *, training: bool) -> tuple[int, int, int, int] | tuple[None, None, None, None]:
        """From torch's generator on the CPU, which a step seeds; no wait for the device."""
        if not training or not any(group.dropout for group in self.groups()):
            return None, None, None, None
        one, two, three, four = torch.randint(2**62, (4,)).tolist()
        return one, two, three, four

    @property
    def _head_norms(self) -> tuple[nn.Parameter | None, nn.Parameter | None, float]:
        if self.q_norm is None or self.k_norm is None:
            return None, None, 0.0
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.eps

    def _ready(self, call: Call, device: torch.device) -> tuple[Groups, Drops]:
        one, two, three, four = (group.weights(call.kind, device) for group in self.groups())
        a, b, c, d = call.seeds
        return (one, two, three, four), (one.drop(a), two.drop(b), three.drop(c), four.drop(d))

    def _has_windows(self, before: Tensor, call: Call) -> bool:
        if not has_windows(before, self.heads, call.borders, call.longest, causal=self.causal):
            return False
        if self.halves_alike is None:
            half = self.size // 2
            turns = call.cos_Nd, call.sin_Nd
            self.halves_alike = all(torch.equal(turn[:, :half], turn[:, half:]) for turn in turns)
        return self.halves_alike

    def _before(
        self, x_ND: Tensor, call: Call, kept: Kept, qkv: Weights, drop: Drop | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before their rotation (N, C, d); the norm that they are of, plain and dropped."""
        _, n_ND, dropped_ND = self.norm_1.forward(x_ND, None, call.kind, drop)
        flat, kept.lows["qkv"] = qkv.forward(n_ND, dropped_ND)
        return flat.view(x_ND.shape[0], -1, self.size), n_ND, dropped_ND

    def _rotated(self, before: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return pointwise.rotate(before, call.cos_Nd, call.sin_Nd, self.heads, self.kv_heads, *self._head_norms)

    def _attend(self, x_ND: Tensor, call: Call, kept: Kept, qkv: Weights, drop: Drop | None, *, learns: bool) -> None:
        before = self._before(x_ND, call, kept, qkv, drop)[0]
        if self.q_norm is None and self._has_windows(before, call):
            turns = call.cos_Nd, call.sin_Nd
            kept.attended = Attended(attend_windows(before, *turns, call.borders, self.scale), None, windows=True)
            kept.before = before if learns else None
            return
        rotated = self._rotated(before, call)
        kept.before = before if self.q_norm is not None else None
        kept.attended = attend(*rotated, call.borders, call.longest, self.scale, causal=self.causal, learns=learns)

    def _qkv_again(
        self, x_ND: Tensor, call: Call, kept: Kept, qkv: Weights, drop: Drop | None
    ) -> tuple[Tensor, Tensor]:
        """What was not kept of what the attention got; returns the norm that it is of, plain and dropped."""
        assert kept.attended is not None
        before, n_ND, dropped_ND = self._before(x_ND, call, kept, qkv, drop)
        if not kept.attended.windows:
            kept.attended = attend_again(
                kept.attended, self._rotated(before, call), call.borders, call.longest, self.scale, causal=self.causal
            )
        if kept.attended.windows or self.q_norm is not None:
            kept.before = before
        return n_ND, dropped_ND

    def _meet(
        self, x_ND: Tensor, call: Call, kept: Kept, out: Weights, drop: Drop | None, inner_drop: Drop | None
    ) -> tuple[Tensor, Tensor]:
        """The attention's output into the residual stream; returns the norm of that, plain and dropped."""
        attended_ND, dropped_ND = self._attended(call, kept, drop)
        branch, kept.lows["out"] = out.forward(attended_ND, dropped_ND)
        kept.middle, m_ND, m_dropped = self.norm_2.forward(_rows(x_ND, call), branch, call.kind, inner_drop)
        return m_ND, m_dropped

    @staticmethod
    def _attended(call: Call, kept: Kept, drop: Drop | None) -> tuple[Tensor, Tensor]:
        assert kept.attended is not None
        attended_ND = _rows(kept.attended.out.flatten(1), call)
        return attended_ND, attended_ND if drop is None else pointwise.dropout(attended_ND, drop)

    def forward(self, x_ND: Tensor, call: Call, kept: Kept, *, learns: bool) -> Tensor:
        (qkv, outer, inner, down), drops = self._ready(call, x_ND.device)
        self._attend(x_ND, call, kept, qkv, drops[0], learns=learns and call.keep != "input")
        m_ND, m_dropped = self._meet(x_ND, call, kept, outer, drops[1], drops[2])
        assert kept.middle is not None
        kept.inner, kept.lows["inner"] = inner.forward(m_ND, m_dropped)
        del m_ND, m_dropped
        out, kept.lows["down"] = down.forward(*pointwise.activate(kept.inner, self.activation, drops[3]))
        out = out.add_(kept.middle) if out.dtype == x_ND.dtype else kept.middle + out
        if call.keep != "all":
            kept.inner = None
        if call.keep == "attended":
            assert kept.attended is not None
            kept.before = None
            kept.attended.drop_qkv()
        if call.keep == "input":
            kept.before = kept.attended = kept.middle = None
            kept.lows = {"down": kept.lows["down"]}
        return out

    def backward(
        self, x_ND: Tensor, d_out_ND: Tensor, call: Call, kept: Kept, gradients: Gradients, *, wants_input: bool
    ) -> Tensor | None:
        kind = call.kind
        (qkv, outer, inner, down), drops = self._ready(call, x_ND.device)
        # A norm or an activation as it is, and not dropped, is wanted only by frozen weights' products and by the
        # gradients of weights that are not adapters'.
        if kept.attended is None:
            self._attend(x_ND, call, kept, qkv, drops[0], learns=True)
            m_ND, m_dropped = self._meet(x_ND, call, kept, outer, drops[1], drops[2])
        else:
            assert kept.middle is not None
            wanted = kept.inner is None or bool(inner.trained)
            _, m_ND, m_dropped = self.norm_2.forward(kept.middle, None, kind, drops[2], plain=wanted)
        if kept.inner is None:
            kept.inner, kept.lows["inner"] = inner.forward(m_ND, m_dropped)
        if not inner.trained:
            m_ND = m_dropped
        assert kept.attended is not None
        assert kept.middle is not None
        d_down = d_out_ND.to(kind)
        low, d_low = kept.lows["down"], down.backward_low(d_down)
        d_active = down.backward_input(d_down, d_low, drops[3])
        d_inner, active, dropped, sums = pointwise.activate_backward(
            kept.inner, d_active, self.activation, drops[3], plain=bool(down.trained), sums=inner.of_biases
        )
        down.backward_weights(active, dropped, low, d_down, d_low, gradients)
        del active, dropped, d_active, d_down
        d_m = inner.backward(m_ND, m_dropped, kept.lows["inner"], d_inner, drops[2], gradients, sums_O=sums)
        del d_inner, m_ND, m_dropped
        kept.inner = None
        assert d_m is not None
        d_middle = self.norm_2.backward(d_m, kept.middle, d_out_ND, gradients)
        kept.middle = None
        attended_ND, dropped = self._attended(call, kept, drops[1])
        d_attended = outer.backward(
            attended_ND, dropped, kept.lows["out"], d_middle.to(kind), drops[1], gradients
        )  # fmt: skip
        del attended_ND, dropped
        assert d_attended is not None
        d_attended, d_middle = _all_rows(d_attended, call, x_ND), _all_rows(d_middle, call, x_ND)
        if call.keep == "attended":
            n_ND, n_dropped = self._qkv_again(x_ND, call, kept, qkv, drops[0])
        d_before = self._attend_backward(d_attended.view_as(kept.attended.out), call, kept, kept.attended, gradients)
        kept.before = kept.attended = None
        if call.keep != "attended":
            _, n_ND, n_dropped = self.norm_1.forward(x_ND, None, kind, drops[0], plain=bool(qkv.trained))
        wants_n = wants_input or any(True for _ in self.norm_1.trained())
        d_n = qkv.backward(
            n_ND, n_dropped, kept.lows["qkv"], d_before.flatten(1), drops[0], gradients, wants_input=wants_n
        )  # fmt: skip
        return None if d_n is None else self.norm_1.backward(d_n, x_ND, d_middle, gradients)

    def _attend_backward(
        self, d_out_NHd: Tensor, call: Call, kept: Kept, attended: Attended, gradients: Gradients
    ) -> Tensor:
        """The gradient of queries, keys and values before their rotation (N, C, d)."""
        turns = call.cos_Nd, call.sin_Nd
        if attended.windows:
            assert kept.before is not None
            return attend_windows_backward(d_out_NHd, kept.before, *turns, call.borders, self.scale)
        d_q, d_k, d_v = attend_backward(attended, d_out_NHd)
        q_weight, k_weight, eps = self._head_norms
        d_before, d_q_weight, d_k_weight = pointwise.rotate_backward(
            d_q, d_k, d_v, *turns, kept.before, q_weight, k_weight, eps
        )
        _note(gradients, q_weight, d_q_weight)
        _note(gradients, k_weight, d_k_weight)
        return d_before


def _rows(x_ND: Tensor, call: Call) -> Tensor:
    return x_ND if call.rows_S is None else x_ND[call.rows_S]


def _all_rows(d_SD: Tensor, call: Call, like_ND: Tensor) -> Tensor:
    if call.rows_S is None:
        return d_SD
    return d_SD.new_zeros(len(like_ND), d_SD.shape[1]).index_copy_(0, call.rows_S, d_SD)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Block, call: Call, x_ND: Tensor, *trained: nn.Parameter) -> Tensor:
        kept = Kept()
        learns = call.learns and any(ctx.needs_input_grad)  # the latter is true of weights under no_grad too
        with no_autocast(x_ND.device):
            out = block.forward(x_ND, call, kept, learns=learns)
        if learns:
            # Not by save_for_backward: pieces are dropped one by one as they are used.
            ctx.block, ctx.call, ctx.x_ND, ctx.kept, ctx.trained = block, call, x_ND, kept, trained
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out_ND: Tensor) -> tuple[Any, ...]:
        gradients: Gradients = {}
        block, call, x_ND, kept, trained = ctx.block, ctx.call, ctx.x_ND, ctx.kept, ctx.trained
        # The node outlives its backward for as long as the loss does.
        ctx.block = ctx.call = ctx.x_ND = ctx.kept = ctx.trained = None
        with no_autocast(x_ND.device):
            d_x = block.backward(x_ND, d_out_ND, call, kept, gradients, wants_input=ctx.needs_input_grad[2])
        return None, None, d_x, *(_as(gradients[id(p)], p) for p in trained)


def _as(gradient: Tensor, p: nn.Parameter) -> Tensor:
    if gradient.dtype != (wanted := gradient_dtype(p)):
        gradient = gradient.to(wanted)
    return gradient if gradient.shape == p.shape else gradient.view(p.shape)


class no_autocast:  # noqa: N801  (a function to those who use it)
    """The dtypes are chosen here; autocast would cast once more. torch's own context takes as long as two launches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device.type

    def __enter__(self) -> None:
        self.was = torch.is_autocast_enabled(self.device)
        if self.was:
            torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *_: object) -> None:
        if self.was:
            torch.set_autocast_enabled(self.device, True)


def run(block: Block, x_ND: Tensor, call: Call) -> Tensor:
    """(N, D) of a layer."""
    out: Tensor = _Layer.apply(block, call, x_ND, *block.trained())  # type: ignore[no-untyped-call]
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of products: autocast's, or the stream's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
