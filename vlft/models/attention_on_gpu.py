"""Attention in short segments, rotation included, as one Triton kernel each way: the windows of Qwen2.5-VL's vision
tower.

A segment of at most 64 patches is one tile: queries, keys and values are read once, as the product before left them,
turned on the way, and nothing but the output is written. The backward pass works everything out again and writes one
gradient, already turned back. A general flash kernel takes four launches for that, keeps the log-sum-exp, and has its
queries and keys turned by passes of their own.

N patches, H heads, C = 3 H heads of queries, keys and values, d head size.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from vlft.compiler.launch import Launch

LONGEST = 64
"""Patches of a segment."""


@triton.jit
def _halves(ptr, place, inside, HALF_SIZE: tl.constexpr):
    return tl.load(ptr + place, mask=inside, other=0.0), tl.load(ptr + place + HALF_SIZE, mask=inside, other=0.0)


@triton.jit
def _put(ptr, place, low, high, inside, HALF_SIZE: tl.constexpr):
    tl.store(ptr + place, low.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + place + HALF_SIZE, high.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turned(ptr, place, turn_ptrs, turn, inside, HALF_SIZE: tl.constexpr):
    """The halves of queries or keys, rotated as `pointwise.rotate` does."""
    low, high = _halves(ptr, place, inside, HALF_SIZE)
    cos_low, cos_high = _halves(turn_ptrs[0], turn, inside, HALF_SIZE)
    sin_low, sin_high = _halves(turn_ptrs[1], turn, inside, HALF_SIZE)
    kind = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    return (low * cos_low - high * sin_low).to(kind), (high * cos_high + low * sin_high).to(kind)


@triton.jit
def _put_turned_back(ptr, place, turn_ptrs, turn, low, high, inside, HALF_SIZE: tl.constexpr):
    cos_low, cos_high = _halves(turn_ptrs[0], turn, inside, HALF_SIZE)
    sin_low, sin_high = _halves(turn_ptrs[1], turn, inside, HALF_SIZE)
    _put(ptr, place, low * cos_low + high * sin_high, high * cos_high - low * sin_low, inside, HALF_SIZE)


@triton.jit
def _weights(q_low, q_high, k_low, k_high, known, scale):
    """Softmax over the keys of a segment, in fp32. Queries behind its end have weights too, which nothing reads."""
    scores = (tl.dot(q_low, tl.trans(k_low)) + tl.dot(q_high, tl.trans(k_high))) * scale
    scores = tl.where(known[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _tile(borders_ptr, SIZE: tl.constexpr, HALF: tl.constexpr, LONGEST: tl.constexpr):
    """The program's segment: (its first patch, rows and columns of half a head, which rows and which values are there).

    Heads come first in the grid, since those of a segment read pieces of the same rows.
    """
    start = tl.load(borders_ptr + tl.program_id(1))
    length = tl.load(borders_ptr + tl.program_id(1) + 1) - start
    row, column = tl.arange(0, LONGEST), tl.arange(0, HALF)[None, :]
    known = row < length
    return start, row, column, known, known[:, None] & (column < SIZE // 2)


@triton.jit
def _windows_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, borders_ptr, scale, heads,
    SIZE: tl.constexpr, HALF: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    start, row, column, known, inside = _tile(borders_ptr, SIZE, HALF, LONGEST)
    # The segment's own place is a number, and places in it are short: pointers for a whole tile would fill registers.
    qkv_ptr += (start.to(tl.int64) * 3 * heads + head) * SIZE
    out_ptr += (start.to(tl.int64) * heads + head) * SIZE
    cos_ptr += start.to(tl.int64) * SIZE
    sin_ptr += start.to(tl.int64) * SIZE
    place = row[:, None] * (3 * heads * SIZE) + column
    turn = row[:, None] * SIZE + column
    q_low, q_high = _turned(qkv_ptr, place, (cos_ptr, sin_ptr), turn, inside, SIZE // 2)
    k_low, k_high = _turned(qkv_ptr, place + heads * SIZE, (cos_ptr, sin_ptr), turn, inside, SIZE // 2)
    weights = _weights(q_low, q_high, k_low, k_high, known, scale).to(q_low.dtype)
    v_low, v_high = _halves(qkv_ptr, place + 2 * heads * SIZE, inside, SIZE // 2)
    out_place = row[:, None] * (heads * SIZE) + column
    _put(out_ptr, out_place, tl.dot(weights, v_low), tl.dot(weights, v_high), inside, SIZE // 2)


@triton.jit
def _windows_backward_kernel(
    d_out_ptr, qkv_ptr, cos_ptr, sin_ptr, d_qkv_ptr, borders_ptr, scale, heads,
    SIZE: tl.constexpr, HALF: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    start, row, column, known, inside = _tile(borders_ptr, SIZE, HALF, LONGEST)
    qkv_ptr += (start.to(tl.int64) * 3 * heads + head) * SIZE
    d_qkv_ptr += (start.to(tl.int64) * 3 * heads + head) * SIZE
    d_out_ptr += (start.to(tl.int64) * heads + head) * SIZE
    cos_ptr += start.to(tl.int64) * SIZE
    sin_ptr += start.to(tl.int64) * SIZE
    q_place = row[:, None] * (3 * heads * SIZE) + column
    k_place, v_place = q_place + heads * SIZE, q_place + 2 * heads * SIZE
    turn = row[:, None] * SIZE + column
    q_low, q_high = _turned(qkv_ptr, q_place, (cos_ptr, sin_ptr), turn, inside, SIZE // 2)
    k_low, k_high = _turned(qkv_ptr, k_place, (cos_ptr, sin_ptr), turn, inside, SIZE // 2)
    weights = _weights(q_low, q_high, k_low, k_high, known, scale)
    d_low, d_high = _halves(d_out_ptr, row[:, None] * (heads * SIZE) + column, inside, SIZE // 2)
    turned = tl.trans(weights.to(d_low.dtype))
    _put(d_qkv_ptr, v_place, tl.dot(turned, d_low), tl.dot(turned, d_high), inside, SIZE // 2)
    v_low, v_high = _halves(qkv_ptr, v_place, inside, SIZE // 2)
    d_weights = tl.dot(d_low, tl.trans(v_low)) + tl.dot(d_high, tl.trans(v_high))
    # Queries behind the end have no gradient: that of their output is zero.
    d_scores = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None]) * scale
    d_scores = d_scores.to(q_low.dtype)
    _put_turned_back(
        d_qkv_ptr, q_place, (cos_ptr, sin_ptr), turn, tl.dot(d_scores, k_low), tl.dot(d_scores, k_high), inside,
        SIZE // 2,
    )  # fmt: skip
    d_scores = tl.trans(d_scores)
    _put_turned_back(
        d_qkv_ptr, k_place, (cos_ptr, sin_ptr), turn, tl.dot(d_scores, q_low), tl.dot(d_scores, q_high), inside,
        SIZE // 2,
    )  # fmt: skip


_windows = Launch(_windows_kernel)
_windows_backward = Launch(_windows_backward_kernel)


@lru_cache(maxsize=16)
def _half(size: int) -> int:
    """Columns of a tile for half a head."""
    half: int = triton.next_power_of_2(size // 2)
    return max(16, half)


def windows(qkv_NCd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor, borders: Tensor, scale: float) -> Tensor:
    """(N, H, d) attention within segments of at most `LONGEST` patches, of queries and keys that are rotated here.

    Args:
        borders: (S + 1,) int32.
    """
    patches, all_heads, size = qkv_NCd.shape
    heads = all_heads // 3
    out = qkv_NCd.new_empty(patches, heads, size)
    _windows(
        (heads, borders.shape[0] - 1), (qkv_NCd.contiguous(), cos_Nd.contiguous(), sin_Nd.contiguous(), out, borders),
        (scale, heads), (size, _half(size), LONGEST), 4,
    )  # fmt: skip
    return out


def windows_backward(
    d_out_NHd: Tensor, qkv_NCd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor, borders: Tensor, scale: float
) -> Tensor:
    """The gradient of qkv (N, C, d)."""
    _, heads, size = d_out_NHd.shape
    d_qkv = qkv_NCd.new_empty(qkv_NCd.shape)
    _windows_backward(
        (heads, borders.shape[0] - 1),
        (d_out_NHd.contiguous(), qkv_NCd.contiguous(), cos_Nd.contiguous(), sin_Nd.contiguous(), d_qkv, borders),
        (scale, heads), (size, _half(size), LONGEST), 4,
    )  # fmt: skip
    return d_qkv
