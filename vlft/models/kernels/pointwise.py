"""What lies between the products of a transformer layer, forward and backward as plain functions.

Each function here is the reference: PyTorch alone, any device, any float dtype. On a GPU with Triton the same signature
runs as one kernel instead of five to twelve (`on_gpu.py`), which is what these functions are for: they move memory and
hardly compute. Arithmetic is in fp32 (fp64 for fp64), results in the dtype asked for.

N tokens or patches, D width, C = H + 2K heads of queries, keys and values, d head size, I inner width of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlft import compiler

Activation = Literal["silu_gated", "gelu", "gelu_pytorch_tanh", "quick_gelu"]

Function = TypeVar("Function", bound=Callable[..., Any])


@lru_cache(maxsize=1)
def kernels() -> Any:
    """`on_gpu.py`; None where Triton cannot compile."""
    if compiler.trouble():
        return None
    from vlft.models.kernels import on_gpu

    return on_gpu


def _one_kernel(function: Function) -> Function:
    """Run the kernel of the same name where the first argument lies on a GPU."""

    @wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.is_cuda and first.dtype != torch.float64 and (fast := kernels()) is not None:
            return getattr(fast, function.__name__)(first, *args, **kwargs)
        return function(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Dropout before adapters (Srivastava et al. 2014), scaled so that the mean stays


_64 = 2**64 - 1


@dataclass(frozen=True)
class Drop:
    """Which values of a tensor are dropped: a function of the seed, the shape and the place, the same on every device.

    So a backward pass needs no mask kept, and every function here that has a value can drop it in passing.
    """

    probability: float
    seed: int
    """of 62 bits"""

    @cached_property
    def keys(self) -> tuple[int, int]:
        """Two numbers of 31 bits, mixed (splitmix64, Steele et al. 2014), so that close seeds have distant ones."""
        mixed = (self.seed + 0x9E3779B97F4A7C15) & _64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _64
        mixed ^= mixed >> 31
        return mixed & 0x7FFFFFFF, (mixed >> 31) & 0x7FFFFFFF

    @cached_property
    def scale(self) -> tuple[int, float]:
        """(A value stays if its 16 bits are no less, what it is multiplied with then.)"""
        least = round(self.probability * 65536)
        return least, 65536 / (65536 - least) if least < 65536 else 0.0

    def of(self, x: Tensor) -> Tensor:
        """x without those that are dropped."""
        least, factor = self.scale
        stays = torch.empty(x.numel(), dtype=torch.bool, device=x.device)
        for start in range(0, x.numel(), _PIECE):  # a place takes three numbers of eight bytes
            stop = min(start + _PIECE, x.numel())
            torch.ge(_bits(start, stop, self.keys, x.device), least, out=stays[start:stop])
        return torch.where(stays.view(x.shape), wide(x) * factor, 0.0).to(x.dtype)


_PIECE = 2**22


def _bits(start: int, stop: int, keys: tuple[int, int], device: torch.device) -> Tensor:
    """16 bits for each of these places, by a hash of 32 (C. Wellons' hash-prospector, bias 0.11), keyed twice."""
    mixed = torch.arange(start, stop, device=device).add_(keys[0]).bitwise_and_(0xFFFFFFFF)
    mixed = (mixed ^ (mixed >> 16)).mul_(0x21F0AAAD).bitwise_and_(0xFFFFFFFF)
    mixed = (mixed ^ (mixed >> 15) ^ keys[1]).mul_(0xD35A2D97).bitwise_and_(0xFFFFFFFF)
    return (mixed ^ (mixed >> 15)) >> 16


@_one_kernel
def dropout(x_ND: Tensor, drop: Drop) -> Tensor:
    """x (N, D) without what is dropped."""
    return drop.of(x_ND)


@_one_kernel
def product_dropped(low_NR: Tensor, a_RD: Tensor, drop: Drop) -> Tensor:
    """The product (N, D) without what is dropped: dropout's backward pass on the gradient of its output."""
    return drop.of(low_NR @ a_RD)


# ---------------------------------------------------------------------------------------------------------------------
# Norms: of rows, with the branch that a residual stream takes up first.


@_one_kernel
def norm(
    x_ND: Tensor,
    branch_ND: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    kind: torch.dtype,
    drop: Drop | None = None,
    *,
    plain: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + branch, its norm, and that without what is dropped): LayerNorm (Ba et al. 2016) with a bias, RMSNorm (Zhang
    and Sennrich 2019) without.

    Args:
        branch_ND: None leaves x as it is.
        kind: dtype of the norm; the sum has that of x.
        drop: None drops nothing: the last two are one tensor.
        plain: where False and something is dropped, the norm itself is not wanted, and stands for what is left of it.
    """
    total = x_ND if branch_ND is None else (wide(x_ND) + wide(branch_ND)).to(x_ND.dtype)
    scaled, _ = _standardised(total, eps, centred=bias_D is not None)
    out = scaled * weight_D.to(scaled.dtype)
    if bias_D is not None:
        out = out + bias_D.to(scaled.dtype)
    return total, *_both(out.to(kind), drop, plain=plain)


def _both(out: Tensor, drop: Drop | None, *, plain: bool) -> tuple[Tensor, Tensor]:
    dropped = out if drop is None else drop.of(out)
    return out if plain else dropped, dropped


def _standardised(x: Tensor, eps: float, *, centred: bool) -> tuple[Tensor, Tensor]:
    x = wide(x)
    if centred:
        x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


@_one_kernel
def norm_backward(
    d_out_ND: Tensor,
    x_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    d_more_ND: Tensor | None,
    *,
    trains: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias); that of x has `d_more` added, what reaches x on other ways.

    Args:
        trains: the gradients of weight and bias are wanted; otherwise they are None.
    """
    centred = bias_D is not None
    scaled, scale = _standardised(x_ND, eps, centred=centred)
    d_out = d_out_ND.to(scaled.dtype)
    d = d_out * weight_D.to(scaled.dtype)
    d_x = d - scaled * (d * scaled).mean(-1, keepdim=True)
    if centred:
        d_x = d_x - d.mean(-1, keepdim=True)
    d_x = d_x * scale
    if d_more_ND is not None:
        d_x = d_x + d_more_ND.to(d_x.dtype)
    d_weight = (d_out * scaled).sum(0) if trains else None
    d_bias = d_out.sum(0) if trains and centred else None
    return d_x.to(x_ND.dtype), d_weight, d_bias


# ---------------------------------------------------------------------------------------------------------------------
# Queries and keys, turned by their positions


def _turned(x: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout (Su et al. 2021; the layout of GPT-NeoX)."""
    cos, sin = cos_Nd.to(x.dtype).unsqueeze(1), sin_Nd.to(x.dtype).unsqueeze(1)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _turned_back(d_y: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
    """The transpose of `_turned`, for any cos and sin."""
    cos, sin = cos_Nd.to(d_y.dtype).unsqueeze(1), sin_Nd.to(d_y.dtype).unsqueeze(1)
    low, high = (d_y * sin).chunk(2, dim=-1)
    return d_y * cos + torch.cat((high, -low), dim=-1)


@_one_kernel
def rotate(
    qkv_NCd: Tensor,
    cos_Nd: Tensor,
    sin_Nd: Tensor,
    heads: int,
    kv_heads: int,
    q_weight_d: Tensor | None,
    k_weight_d: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised head by head (where they have weights for it) and rotated; values as they are.

    Returns:
        (N, H, d), (N, K, d), (N, K, d), each in memory of its own, as attention wants them.
    """
    keys = heads + kv_heads
    x = wide(qkv_NCd[:, :keys])
    if q_weight_d is not None and k_weight_d is not None:
        x, _ = _standardised(x, eps, centred=False)
        x = x * _per_head(q_weight_d, k_weight_d, heads, kv_heads).to(x.dtype)
    turned = _turned(x, cos_Nd, sin_Nd).to(qkv_NCd.dtype)
    return turned[:, :heads].contiguous(), turned[:, heads:].contiguous(), qkv_NCd[:, keys:].contiguous()


@_one_kernel
def rotate_backward(
    d_q_NHd: Tensor,
    d_k_NKd: Tensor,
    d_v_NKd: Tensor,
    cos_Nd: Tensor,
    sin_Nd: Tensor,
    qkv_NCd: Tensor | None,
    q_weight_d: Tensor | None,
    k_weight_d: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (qkv (N, C, d), the norms' weights).

    Args:
        qkv_NCd: what `rotate` got, where it has norms.
    """
    heads, kv_heads = d_q_NHd.shape[1], d_k_NKd.shape[1]
    d = _turned_back(wide(torch.cat((d_q_NHd, d_k_NKd), dim=1)), cos_Nd, sin_Nd)
    d_q_weight = d_k_weight = None
    if q_weight_d is not None and k_weight_d is not None:
        assert qkv_NCd is not None
        scaled, scale = _standardised(qkv_NCd[:, : heads + kv_heads], eps, centred=False)
        each = (d * scaled).sum(0)
        d_q_weight, d_k_weight = each[:heads].sum(0), each[heads:].sum(0)
        d = d * _per_head(q_weight_d, k_weight_d, heads, kv_heads).to(d.dtype)
        d = (d - scaled * (d * scaled).mean(-1, keepdim=True)) * scale
    return torch.cat((d.to(d_v_NKd.dtype), d_v_NKd), dim=1), d_q_weight, d_k_weight


def _per_head(q_weight_d: Tensor, k_weight_d: Tensor, heads: int, kv_heads: int) -> Tensor:
    return torch.cat((q_weight_d.expand(heads, -1), k_weight_d.expand(kv_heads, -1)))


# ---------------------------------------------------------------------------------------------------------------------
# Inside the MLP


@_one_kernel
def activate(inner_NI: Tensor, kind: Activation, drop: Drop | None = None) -> tuple[Tensor, Tensor]:
    """The activation of a token's inner values (N, I), and that without what is dropped. Zero where they are zero.

    Args:
        inner_NI: (N, 2 * I) gates, then values, for "silu_gated" (SwiGLU, Shazeer 2020); else (N, I).
    """
    if kind == "silu_gated":
        gate, up = wide(inner_NI).chunk(2, dim=-1)
        out = F.silu(gate) * up
    else:
        out = _PLAIN[kind](wide(inner_NI))
    return _both(out.to(inner_NI.dtype), drop, plain=True)


@_one_kernel
def activate_backward(
    inner_NI: Tensor,
    d_out_NI: Tensor,
    kind: Activation,
    drop: Drop | None = None,
    *,
    plain: bool = True,
    sums: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(The gradient of `inner`, its activation, and that without what is dropped), the first two in the places of
    `inner` and `d_out`, which nothing needs any more; and `column_sums` of the first in the dtype `sums`, if asked for.
    `drop` and `plain` as `norm` has them."""
    x, d = wide(inner_NI), wide(d_out_NI)
    if kind == "silu_gated":
        gate, up = x.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        d_gate, d_up = d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid
        out = gate * sigmoid * up
        slope = torch.cat((d_gate, d_up), dim=-1)
    else:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = _PLAIN[kind](x)
            (slope,) = torch.autograd.grad(out, x, d)
    active, dropped = _both(out.detach().to(d_out_NI.dtype), drop, plain=plain)
    active, d_inner = d_out_NI.copy_(active), inner_NI.copy_(slope)
    summed = None if sums is None else column_sums(d_inner, sums)
    return d_inner, active, dropped if plain and drop is not None else active, summed


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of biases


@_one_kernel
def column_sums(x_NO: Tensor, kind: torch.dtype) -> Tensor:
    """(O,) in `kind`, added up in no fewer digits than fp32's."""
    return x_NO.sum(0, dtype=torch.promote_types(kind, wide(x_NO[:0]).dtype)).to(kind)


# ---------------------------------------------------------------------------------------------------------------------
# Cross entropy

LOGITS_AT_ONCE = 1 << 24
"""In fp32: all of them would take twice what the logits do, and as much again for what is between."""


@_one_kernel
def cross_entropy(logits_SV: Tensor, labels_S: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) losses, and the logs of the sums of exponents, in fp32 (fp64)."""
    sums = [torch.logsumexp(wide(piece), 1) for piece in torch.split(logits_SV, _rows(logits_SV))]
    sums_S = torch.cat(sums)
    return sums_S - wide(logits_SV.gather(1, labels_S.unsqueeze(1))).squeeze(1), sums_S


@_one_kernel
def cross_entropy_backward(logits_SV: Tensor, labels_S: Tensor, sums_S: Tensor, d_losses_S: Tensor) -> Tensor:
    """The gradient of the logits, in their place, which nothing needs any more. `sums_S`: from the forward."""
    rows = _rows(logits_SV)
    columns = (x.unsqueeze(1) for x in (labels_S, sums_S, d_losses_S))
    pieces = (torch.split(x, rows) for x in (logits_SV, *columns))
    for logits, labels, sums, d_losses in zip(*pieces, strict=True):
        d = torch.exp(wide(logits) - sums)
        d.scatter_add_(1, labels, -torch.ones_like(d[:, :1]))
        logits.copy_(d * d_losses)
    return logits_SV


def _rows(logits_SV: Tensor) -> int:
    """That are in fp32 at once."""
    return max(1, LOGITS_AT_ONCE // max(1, logits_SV.shape[1]))
