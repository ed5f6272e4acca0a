"""What lies between the products of a transformer layer, forward and backward as plain functions.

Each function here is the reference: PyTorch alone, any device, any float dtype. On a GPU with Triton the same signature
runs as one kernel instead of five to twelve (`on_gpu.py`), which is what these functions are for: they move memory and
hardly compute. Arithmetic is in fp32 (fp64 for fp64), results in the dtype asked for.

N tokens or patches, D width, C = H + 2K heads of queries, keys and values, d head size, I inner width of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlft import compiler

Activation = Literal["silu_gated", "gelu", "gelu_pytorch_tanh", "quick_gelu"]

Function = TypeVar("Function", bound=Callable[..., Any])


@lru_cache(maxsize=1)
def _on_gpu() -> Any:
    if compiler.trouble():
        return None
    from vlft.models.kernels import on_gpu

    return on_gpu


def _one_kernel(function: Function) -> Function:
    """Run the kernel of the same name where the first argument lies on a GPU."""

    @wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.is_cuda and first.dtype != torch.float64 and (fast := _on_gpu()) is not None:
            return getattr(fast, function.__name__)(first, *args, **kwargs)
        return function(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Norms: of rows, with the branch that a residual stream takes up first.


@_one_kernel
def norm(
    x_ND: Tensor, branch_ND: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x + branch, its norm): LayerNorm (Ba et al. 2016) with a bias, RMSNorm (Zhang and Sennrich 2019) without.

    Args:
        branch_ND: None leaves x as it is.
        kind: dtype of the norm; the sum has that of x.
    """
    total = x_ND if branch_ND is None else (wide(x_ND) + wide(branch_ND)).to(x_ND.dtype)
    scaled, _ = _standardised(total, eps, centred=bias_D is not None)
    out = scaled * weight_D.to(scaled.dtype)
    if bias_D is not None:
        out = out + bias_D.to(scaled.dtype)
    return total, out.to(kind)


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
def activate(inner_NI: Tensor, kind: Activation) -> Tensor:
    """The activation of a token's inner values: (N, I). Zero where they are zero.

    Args:
        inner_NI: (N, 2 * I) gates, then values, for "silu_gated" (SwiGLU, Shazeer 2020); else (N, I).
    """
    if kind == "silu_gated":
        gate, up = wide(inner_NI).chunk(2, dim=-1)
        return (F.silu(gate) * up).to(inner_NI.dtype)
    return _PLAIN[kind](wide(inner_NI)).to(inner_NI.dtype)


@_one_kernel
def activate_backward(inner_NI: Tensor, d_out_NI: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    """(The gradient of `inner`, its activation), in the places of `inner` and `d_out`, which nothing needs any more."""
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
    return inner_NI.copy_(slope), d_out_NI.copy_(out.detach())


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


# ---------------------------------------------------------------------------------------------------------------------
# Dropout before adapters


@_one_kernel
def dropout(x_ND: Tensor, probability: float, seed: int, *, in_place: bool = False) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014) whose mask is a function of the seed and the shape.

    The same seed gives the same mask on the same device, so that a backward pass needs no mask kept.
    """
    keep = 1.0 - probability
    generator = _generator(x_ND.device).manual_seed(seed)
    mask = torch.empty_like(x_ND).bernoulli_(keep, generator=generator).div_(keep)
    return x_ND.mul_(mask) if in_place else x_ND * mask


@lru_cache(maxsize=8)
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)
