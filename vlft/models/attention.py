"""Attention over padding-free rows, for both towers, as one function registered with transformers.

Its name contains "flash" on purpose: the vision towers take their variable-length branch only then, and transformers
builds no mask for a name that it has no mask function for. What runs behind the name:

* bf16/fp16 on CUDA (Ampere or newer): `torch.nn.attention.varlen.varlen_attn`, one kernel for the whole row. The faster
  layers (`vlft.models.kernels`) call `attend`, on Hopper by `attention_by_cudnn` where segments are not short,
  and `attend_windows`, rotation included, where windows are;
* elsewhere: scaled dot-product attention over the segments, those of equal length together. Never a T x T mask.

T tokens (or patches) of a row, H heads, K key-value heads, D head size, S segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlft import compiler
from vlft.models import attention_by_cudnn
from vlft.models.attention_by_cudnn import ByCudnn

NAME = "vlft_flash_varlen"
SHORT = 128
"""Tokens of a longest segment below which PyTorch's kernels are as fast as cuDNN's."""


@lru_cache(maxsize=1)
def _varlen_parameters() -> frozenset[str]:
    # The signature differs between torch versions (2.11 has no enable_gqa, yet runs grouped heads).
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own variable-length flash attention runs for this device and dtype."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in known:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out


def _equal(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float | None, causal: bool) -> Tensor:
    """(T, H, D) attention within segments that all have `length` tokens."""
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2).flatten(0, 1)


def _segments(q: Tensor, k: Tensor, v: Tensor, borders: list[int], scale: float | None, causal: bool) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    starts_of: dict[int, list[int]] = {}
    for start, end in pairwise(borders):
        if end > start:
            starts_of.setdefault(end - start, []).append(start)
    if len(starts_of) == 1 and borders[0] == 0 and borders[-1] == q.shape[0]:
        length = next(iter(starts_of))
        return _equal(q, k, v, length, scale, causal)
    out = torch.zeros_like(q)
    for length, starts in starts_of.items():
        index = (torch.tensor(starts).unsqueeze(1) + torch.arange(length)).flatten().to(q.device)
        out = out.index_copy(0, index, _equal(q[index], k[index], v[index], length, scale, causal))
    return out


def packed_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    borders: Tensor,
    longest: int | None,
    scale: float | None,
    *,
    causal: bool,
) -> Tensor:
    """(T, H, D) attention within the segments of a row, by the best kernel there is.

    Args:
        borders: (S + 1,) int32.
        longest: an upper bound of the segments' lengths (flash only).
    """
    # Under autocast the rotary embedding may leave q and k in fp32 while v is already in the compute dtype.
    q, k = q_THD.to(v_TKD.dtype), k_TKD.to(v_TKD.dtype)
    if varlen_available(q.device, q.dtype):
        assert longest is not None
        cu = borders.to(q.device, non_blocking=True)
        return _flash(q.contiguous(), k.contiguous(), v_TKD.contiguous(), cu, longest, scale, causal)
    return _segments(q, k, v_TKD, borders.tolist(), scale, causal)


@dataclass
class Attended:
    """(T, H, D), and what its backward needs."""

    out: Tensor
    qkv: tuple[Tensor, Tensor, Tensor] | None
    """Queries, keys and values, rotated; what can be had again need not stay (`drop_qkv`)"""
    flash: tuple[Any, ...] | None = None
    """(log-sum-exp, generator's state, unused, borders, longest, scale, causal) of the flash kernel"""
    cudnn: ByCudnn | None = None
    """of cuDNN's kernel"""
    graph: Tensor | None = None
    """Elsewhere: the output with a graph of the attention alone"""
    windows: bool = False
    """Of `attend_windows`, whose backward takes what that got instead"""

    def drop_qkv(self) -> None:
        """Until `attend_again`."""
        self.qkv = self.graph = None


def attend(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    borders: Tensor,
    longest: int | None,
    scale: float,
    *,
    causal: bool,
    learns: bool,
) -> Attended:
    """`packed_attention` outside of autograd, to be followed by `attend_backward`.

    The flash kernel is called as PyTorch's own varlen_attn calls it, without the graph around it, which costs the host
    more time than a window of the vision tower costs the GPU.
    """
    if varlen_available(q_THD.device, q_THD.dtype):
        assert longest is not None
        cu = borders.to(q_THD.device, non_blocking=True)
        found = _by_cudnn(q_THD, k_TKD, v_TKD, cu, longest, scale, causal=causal, learns=learns)
        if found is not None:
            return found
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q_THD, k_TKD, v_TKD, cu, cu, longest, longest, 0.0, causal, False, scale=scale
        )
        flash = (lse, state, unused, cu, longest, scale, causal)
        return Attended(out, (q_THD, k_TKD, v_TKD), flash) if learns else Attended(out, None)
    with torch.set_grad_enabled(learns):
        q, k, v = (x.detach().requires_grad_(learns) for x in (q_THD, k_TKD, v_TKD))
        graph = packed_attention(q, k, v, borders, longest, scale, causal=causal)
    return Attended(graph.detach(), (q, k, v), graph=graph) if learns else Attended(graph, None)


def attend_again(
    attended: Attended,
    qkv: tuple[Tensor, Tensor, Tensor],
    borders: Tensor,
    longest: int | None,
    scale: float,
    *,
    causal: bool,
) -> Attended:
    """What `attend` gave, with its queries, keys and values, which it had dropped. A graph holds them, so that it went
    with them; what a kernel left is of use still."""
    if attended.flash is None and attended.cudnn is None:
        return attend(*qkv, borders, longest, scale, causal=causal, learns=True)
    attended.qkv = qkv
    return attended


def _by_cudnn(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, *, causal: bool, learns: bool
) -> Attended | None:
    if longest < SHORT or not attention_by_cudnn.available(q.device) or not attention_by_cudnn.takes(q, k, v):
        return None
    found = attention_by_cudnn.attend(q, k, v, cu, longest, scale, causal=causal, learns=learns)
    if found is None:
        return None
    out, kept = found
    return Attended(out, (q, k, v), cudnn=kept) if learns else Attended(out, None)


def attend_backward(attended: Attended, d_out_THD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, H, D), k and v (T, K, D)."""
    assert attended.qkv is not None
    if attended.cudnn is not None:
        return attention_by_cudnn.attend_backward(attended.cudnn, attended.qkv, attended.out, d_out_THD)
    if attended.graph is not None:
        d_q, d_k, d_v = torch.autograd.grad(attended.graph, attended.qkv, d_out_THD)
        return d_q, d_k, d_v
    assert attended.flash is not None
    lse, state, unused, cu, longest, scale, causal = attended.flash
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        d_out_THD, *attended.qkv, attended.out, lse, cu, cu, longest, longest, 0.0, causal, state, unused, scale=scale
    )
    return d_q, d_k, d_v


@lru_cache(maxsize=1)
def _short() -> Any:
    if compiler.trouble():
        return None
    from vlft.models import attention_on_gpu

    return attention_on_gpu


def has_windows(qkv_TCD: Tensor, heads: int, borders: Tensor, longest: int | None, *, causal: bool) -> bool:
    """Whether `attend_windows` takes queries, keys and values (T, C, D) of a row as the product before left them."""
    if causal or longest is None or not varlen_available(qkv_TCD.device, qkv_TCD.dtype):
        return False
    if len(borders) > 2**16:  # a GPU's grid is no wider in its second dimension
        return False
    short = _short()
    return short is not None and longest <= short.LONGEST and qkv_TCD.shape[1] == 3 * heads and qkv_TCD.shape[2] <= 128


def attend_windows(qkv_TCD: Tensor, cos_TD: Tensor, sin_TD: Tensor, borders: Tensor, scale: float) -> Tensor:
    """`pointwise.rotate`, then `attend`, where `has_windows`: (T, H, D).

    Args:
        cos_TD, sin_TD: whose upper halves are as the lower ones.
    """
    found: Tensor = _short().windows(qkv_TCD, cos_TD, sin_TD, borders.to(qkv_TCD.device, non_blocking=True), scale)
    return found


def attend_windows_backward(
    d_out_THD: Tensor, qkv_TCD: Tensor, cos_TD: Tensor, sin_TD: Tensor, borders: Tensor, scale: float
) -> Tensor:
    """The gradient of what `attend_windows` got (T, C, D)."""
    borders = borders.to(qkv_TCD.device, non_blocking=True)
    found: Tensor = _short().windows_backward(d_out_THD, qkv_TCD, cos_TD, sin_TD, borders, scale)
    return found


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within the segments of a row; transformers calls it by `NAME`.

    Args:
        query: (1, H, T, D); key, value: (1, K, T, D).
        cu_seq_lens_q: (S + 1,) int32 borders of the segments.
        max_length_q: an upper bound of the segments' lengths (flash only).
    Returns:
        (1, T, H, D) and None for the attention weights.
    Raises:
        ValueError: a mask, dropout or sliding window was asked for, which packed rows do not support.
    """
    if attention_mask is not None or dropout or sliding_window or cu_seq_lens_q is None:
        raise ValueError(
            "Packed rows take no attention mask, attention dropout or sliding window, and need cu_seq_lens_q; "
            "generate under `vlft.models.attention.plain_attention(model)`."
        )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling, causal=causal).unsqueeze(0), None


def _configs(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and id(config) not in seen:
            seen.add(id(config))
            yield config


def use_packed_attention(model: nn.Module) -> None:
    """Make every attention of `model` run `attention`. `set_attn_implementation` would look for a hub kernel."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    for config in _configs(model):
        config._attn_implementation = NAME


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """SDPA for the time of the block: generation pads, and packed attention knows no mask."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = "sdpa"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
