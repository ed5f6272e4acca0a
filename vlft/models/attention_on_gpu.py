"""The backward pass of attention in short segments as one Triton kernel: the windows of Qwen2.5-VL's vision tower.

A general flash kernel spends three launches on it, keeps the log-sum-exp, reads the output and adds up gradients of the
queries by atomics. A segment of at most 64 patches is one tile: everything is worked out again from q, k, v and the
gradient, each of which is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlft.compiler.launch import Launch

LONGEST = 64
"""Patches of a segment."""


@triton.jit
def _backward_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, d_q_ptr, d_k_ptr, d_v_ptr, borders_ptr, scale, heads, size,
    LONGEST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(borders_ptr + segment)
    length = tl.load(borders_ptr + segment + 1) - start
    row = tl.arange(0, LONGEST)
    column = tl.arange(0, SIZE)
    place = ((start + row).to(tl.int64)[:, None] * heads + head) * size + column[None, :]
    inside = (row < length)[:, None] & (column < size)[None, :]
    q = tl.load(q_ptr + place, mask=inside, other=0.0)
    k = tl.load(k_ptr + place, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k)) * scale
    scores = tl.where((row < length)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    # Rows behind the end have weights too, but their gradient is zero.
    d_out = tl.load(d_out_ptr + place, mask=inside, other=0.0)
    d_v = tl.dot(tl.trans(weights.to(d_out.dtype)), d_out)
    tl.store(d_v_ptr + place, d_v.to(d_v_ptr.dtype.element_ty), mask=inside)
    v = tl.load(v_ptr + place, mask=inside, other=0.0)
    d_weights = tl.dot(d_out, tl.trans(v))
    d_scores = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None]) * scale
    d_scores = d_scores.to(q.dtype)
    d_k = tl.dot(tl.trans(d_scores), q)
    tl.store(d_k_ptr + place, d_k.to(d_k_ptr.dtype.element_ty), mask=inside)
    d_q = tl.dot(d_scores, k)
    tl.store(d_q_ptr + place, d_q.to(d_q_ptr.dtype.element_ty), mask=inside)


_backward = Launch(_backward_kernel)


def short_backward(
    d_out_THD: Tensor, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, borders: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of attention without a causal mask.

    Args:
        borders: (S + 1,) int32 of segments of at most `LONGEST`.
    """
    _, heads, size = q_THD.shape
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q_THD, k_THD, v_THD))
    _backward(
        (borders.shape[0] - 1, heads), (d_out_THD.contiguous(), q_THD, k_THD, v_THD, d_q, d_k, d_v, borders),
        (scale, heads, size), (LONGEST, max(16, triton.next_power_of_2(size))), 4,
    )  # fmt: skip
    return d_q, d_k, d_v
