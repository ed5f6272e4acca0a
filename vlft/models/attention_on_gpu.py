"""Attention in short segments, rotation included, as one Triton kernel each way: the windows of Qwen2.5-VL's vision
tower.

A segment of at most 64 patches is one tile: queries, keys and values are read once, as the product before left them,
turned on the way, and nothing but the output is written. The backward pass works everything out again and writes one
gradient, already turned back. A general flash kernel takes four launches for that, keeps the log-sum-exp, and has its
queries and keys turned by passes of their own.

What decides is how often a program waits: all that it reads is asked for first, and it has few products. Triton's
tiles are powers of two, and rotation wants the halves of a head apart, so that a head of 80 would be twice 64 columns,
or four tiles, and five times as many products. Queries and keys are turned by halves of 32 + 8 columns, which are then
woven into tiles of 64 and 16 (a column of the lower half, that of the upper, the next): their products do not mind the
order of columns. Values and gradients are tiles of 64 and 16 in their own order. (An H200: 224 us for the backward of a
row of 26,944 patches, 395 with halves of 32 + 16 in tiles of their own.)

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
def _tile(ptr, row, stride, there, START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    """Of these rows the columns from `START` on, before `END`."""
    column = START + tl.arange(0, WIDTH)[None, :]
    if START + WIDTH > END:
        there = there & (column < END)
    return tl.load(ptr + row * stride + column, mask=there, other=0.0)


@triton.jit
def _put(ptr, row, stride, x, there, START: tl.constexpr, END: tl.constexpr):
    column = START + tl.arange(0, x.shape[1])[None, :]
    if START + x.shape[1] > END:
        there = there & (column < END)
    tl.store(ptr + row * stride + column, x.to(ptr.dtype.element_ty), mask=there)


@triton.jit
def _halves(ptr, row, stride, there, START: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    low = _tile(ptr, row, stride, there, START, WIDTH, HALF)
    return low, _tile(ptr + HALF, row, stride, there, START, WIDTH, HALF)


@triton.jit
def _turn(cos_ptr, sin_ptr, row, there, START: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Cosine and sine, of the lower half alone, since the upper one's are the same."""
    cos = _tile(cos_ptr, row, 2 * HALF, there, START, WIDTH, HALF)
    return cos, _tile(sin_ptr, row, 2 * HALF, there, START, WIDTH, HALF)


@triton.jit
def _woven(low, high):
    return tl.reshape(tl.join(low, high), (low.shape[0], 2 * low.shape[1]))


@triton.jit
def _turned(x, turn):
    """The halves of keys, rotated as `pointwise.rotate` does, and woven."""
    kind = x[0].dtype
    low, high = x[0].to(tl.float32), x[1].to(tl.float32)
    return _woven((low * turn[0] - high * turn[1]).to(kind), (high * turn[0] + low * turn[1]).to(kind))


@triton.jit
def _turned_once(x, turn):
    """The same of queries. A product takes them from registers, to which Triton would bring all that they are made of,
    and turn it there once more: it does not look behind a sum."""
    kind = x[0].dtype
    low, high = x[0].to(tl.float32), x[1].to(tl.float32)
    first = tl.sum(tl.join(low * turn[0], -(high * turn[1])), 2)
    return _woven(first.to(kind), tl.sum(tl.join(high * turn[0], low * turn[1]), 2).to(kind))


@triton.jit
def _put_turned_back(ptr, row, stride, x, turn, there, START: tl.constexpr, HALF: tl.constexpr):
    low, high = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    kind = ptr.dtype.element_ty
    both = tl.join((low * turn[0] + high * turn[1]).to(kind), (high * turn[0] - low * turn[1]).to(kind))
    column = START + tl.arange(0, x.shape[1] // 2)[None, None, :]
    there = there[:, :, None]
    if START + x.shape[1] // 2 > HALF:
        there = there & (column < HALF)
    place = row[:, :, None] * stride + tl.arange(0, 2)[None, :, None] * HALF + column
    tl.store(ptr + place, tl.permute(both, (0, 2, 1)), mask=there)


@triton.jit
def _softmax(scores, known, scale):
    """Over the keys of a segment, in fp32. Queries behind its end have weights too, which nothing reads."""
    scores = tl.where(known[None, :], scores, float("-inf"))
    factor = scale * 1.4426950408889634  # of powers of two, which are what the hardware knows
    weights = tl.exp2(scores * factor - (tl.max(scores, 1) * factor)[:, None])
    return weights * (1.0 / tl.sum(weights, 1))[:, None]


@triton.jit
def _segment(borders_ptr, LONGEST: tl.constexpr):
    """The program's: (its first patch, rows of a tile, which of them are there).

    Heads come first in the grid, since those of a segment read pieces of the same rows.
    """
    start = tl.load(borders_ptr + tl.program_id(1))
    row = tl.arange(0, LONGEST)[:, None]
    length = tl.load(borders_ptr + tl.program_id(1) + 1) - start
    # The segment's own place is a number, and places in it are short: pointers for a whole tile would fill registers.
    return start.to(tl.int64), row, row < length, tl.arange(0, LONGEST) < length


@triton.jit
def _windows_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, borders_ptr, scale, heads,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = SIZE // 2
    start, row, there, known = _segment(borders_ptr, LONGEST)
    width = heads * SIZE
    wide = 3 * width
    qkv_ptr += (start * 3 * heads + tl.program_id(0)) * SIZE
    out_ptr += (start * heads + tl.program_id(0)) * SIZE
    cos_ptr += start * SIZE
    sin_ptr += start * SIZE
    turn = _turn(cos_ptr, sin_ptr, row, there, 0, MAIN, HALF)
    q = _halves(qkv_ptr, row, wide, there, 0, MAIN, HALF)
    k = _halves(qkv_ptr + width, row, wide, there, 0, MAIN, HALF)
    v = _tile(qkv_ptr + 2 * width, row, wide, there, 0, 2 * MAIN, SIZE)
    if REST:
        turn_rest = _turn(cos_ptr, sin_ptr, row, there, MAIN, REST, HALF)
        q_rest = _halves(qkv_ptr, row, wide, there, MAIN, REST, HALF)
        k_rest = _halves(qkv_ptr + width, row, wide, there, MAIN, REST, HALF)
        v_rest = _tile(qkv_ptr + 2 * width, row, wide, there, 2 * MAIN, 2 * REST, SIZE)
    q, k = _turned_once(q, turn), _turned(k, turn)
    scores = tl.dot(q, tl.trans(k))
    if REST:
        q_rest, k_rest = _turned_once(q_rest, turn_rest), _turned(k_rest, turn_rest)
        scores = tl.dot(q_rest, tl.trans(k_rest), scores)
    weights = _softmax(scores, known, scale).to(q.dtype)
    _put(out_ptr, row, width, tl.dot(weights, v), there, 0, SIZE)
    if REST:
        _put(out_ptr, row, width, tl.dot(weights, v_rest), there, 2 * MAIN, SIZE)


@triton.jit
def _windows_backward_kernel(
    d_out_ptr, qkv_ptr, cos_ptr, sin_ptr, d_qkv_ptr, borders_ptr, scale, heads,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = SIZE // 2
    start, row, there, known = _segment(borders_ptr, LONGEST)
    width = heads * SIZE
    wide = 3 * width
    qkv_ptr += (start * 3 * heads + tl.program_id(0)) * SIZE
    d_qkv_ptr += (start * 3 * heads + tl.program_id(0)) * SIZE
    d_out_ptr += (start * heads + tl.program_id(0)) * SIZE
    cos_ptr += start * SIZE
    sin_ptr += start * SIZE
    # All that is read comes first: behind a barrier of the program a load waits for those before.
    turn = _turn(cos_ptr, sin_ptr, row, there, 0, MAIN, HALF)
    q = _halves(qkv_ptr, row, wide, there, 0, MAIN, HALF)
    k = _halves(qkv_ptr + width, row, wide, there, 0, MAIN, HALF)
    v = _tile(qkv_ptr + 2 * width, row, wide, there, 0, 2 * MAIN, SIZE)
    d = _tile(d_out_ptr, row, width, there, 0, 2 * MAIN, SIZE)
    if REST:
        turn_rest = _turn(cos_ptr, sin_ptr, row, there, MAIN, REST, HALF)
        q_rest = _halves(qkv_ptr, row, wide, there, MAIN, REST, HALF)
        k_rest = _halves(qkv_ptr + width, row, wide, there, MAIN, REST, HALF)
        v_rest = _tile(qkv_ptr + 2 * width, row, wide, there, 2 * MAIN, 2 * REST, SIZE)
        d_rest = _tile(d_out_ptr, row, width, there, 2 * MAIN, 2 * REST, SIZE)
    q, k = _turned_once(q, turn), _turned(k, turn)
    scores, d_weights = tl.dot(q, tl.trans(k)), tl.dot(d, tl.trans(v))
    if REST:
        q_rest, k_rest = _turned_once(q_rest, turn_rest), _turned(k_rest, turn_rest)
        scores = tl.dot(q_rest, tl.trans(k_rest), scores)
        d_weights = tl.dot(d_rest, tl.trans(v_rest), d_weights)
    weights = _softmax(scores, known, scale)
    # Queries behind the end have no gradient: that of their output is zero.
    d_scores = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None]) * scale
    d_scores = d_scores.to(q.dtype)
    back, weights = tl.trans(d_scores), tl.trans(weights.to(d.dtype))
    _put(d_qkv_ptr + 2 * width, row, wide, tl.dot(weights, d), there, 0, SIZE)
    # Read again, since registers are dearer than the cache is.
    turn = _turn(cos_ptr, sin_ptr, row, there, 0, MAIN, HALF)
    if REST:
        _put(d_qkv_ptr + 2 * width, row, wide, tl.dot(weights, d_rest), there, 2 * MAIN, SIZE)
        turn_rest = _turn(cos_ptr, sin_ptr, row, there, MAIN, REST, HALF)
    _put_turned_back(d_qkv_ptr, row, wide, tl.dot(d_scores, k), turn, there, 0, HALF)
    _put_turned_back(d_qkv_ptr + width, row, wide, tl.dot(back, q), turn, there, 0, HALF)
    if REST:
        _put_turned_back(d_qkv_ptr, row, wide, tl.dot(d_scores, k_rest), turn_rest, there, MAIN, HALF)
        _put_turned_back(d_qkv_ptr + width, row, wide, tl.dot(back, q_rest), turn_rest, there, MAIN, HALF)


_windows = Launch(_windows_kernel)
_windows_backward = Launch(_windows_backward_kernel)


@lru_cache(maxsize=16)
def _pieces(size: int) -> tuple[int, int]:
    """Columns of the tiles for half a head, and half of those for a whole one; the second has 0 where one serves."""
    half = size // 2
    whole: int = max(8, triton.next_power_of_2(half))
    main = whole // 2
    rest: int = max(8, triton.next_power_of_2(half - main)) if half > main >= 8 else whole
    return (main, rest) if main + rest < whole else (whole, 0)


def windows(qkv_NCd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor, borders: Tensor, scale: float) -> Tensor:
    """(N, H, d) attention within segments of at most `LONGEST` patches, of queries and keys that are rotated here.

    Args:
        cos_Nd, sin_Nd: whose upper halves are as the lower ones; these are not read.
        borders: (S + 1,) int32.
    """
    patches, all_heads, size = qkv_NCd.shape
    heads = all_heads // 3
    out = qkv_NCd.new_empty(patches, heads, size)
    _windows(
        (heads, borders.shape[0] - 1), (qkv_NCd.contiguous(), cos_Nd.contiguous(), sin_Nd.contiguous(), out, borders),
        (scale, heads), (size, *_pieces(size), LONGEST), 4,
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
        (scale, heads), (size, *_pieces(size), LONGEST), 4,
    )  # fmt: skip
    return d_qkv
