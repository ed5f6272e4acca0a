"""Stand-in for the flash-attn package: peers that ask for FlashAttention-2 run on the same kernel inside PyTorch.

Only what transformers calls. With this folder on PYTHONPATH (its dist-info beside it makes transformers believe that
flash-attn is installed) and `attn_implementation="flash_attention_2"`, a comparison is fair where flash-attn cannot be
installed.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

__version__ = "2.8.3"
_KNOWN = inspect.signature(varlen_attn).parameters
"""The signature differs between versions of torch."""


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), **_: Any,
) -> Tensor:  # fmt: skip
    """(T, heads, width) queries; keys and values may have fewer heads."""
    if dropout_p:
        raise NotImplementedError("no dropout here")
    window = (window_size[0], 0) if causal else tuple(window_size)
    wanted: dict[str, Any] = {"scale": softmax_scale, "window_size": window}
    options = {name: value for name, value in wanted.items() if name in _KNOWN}
    if "window_size" not in _KNOWN:
        options["is_causal"] = causal
    if "enable_gqa" in _KNOWN:  # where there is no such flag, grouped heads work as they are
        options["enable_gqa"] = q.shape[-2] != k.shape[-2]
    borders = (cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k))
    out: Tensor = varlen_attn(q, k, v, *borders, **options)
    return out


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    **_: Any,
) -> Tensor:  # fmt: skip
    """(B, T, heads, width), all of one length."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def flash_attn_with_kvcache(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError("for generation, which no bench does")
