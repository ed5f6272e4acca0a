"""Attention in short segments, rotation included, as one Triton kernel each way: the windows of Qwen2.5-VL's vision
tower.

A segment of at most 64 patches is one tile: queries, keys and values are read once, as the product before left them,
turned on the way, and nothing but the output is written. The backward pass works everything out again and writes one
gradient, already turned back. A general flash kernel takes four launches for that, keeps the log-sum-exp, and has its
queries and keys turned by passes of their own.

Half a head lies in two pieces: Triton's tiles are powers of two, and a head of 80 as two halves of 64 would hold 128
columns in registers, which then go to memory and back. As 32 + 16 twice it is 96 (an H100's compiler: 168 registers
where it was 255 and 284 bytes beside them).

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
def _halves(ptr, place, inside, HALF: tl.constexpr):
    return tl.load(ptr + place, mask=inside, other=0.0), tl.load(ptr + place + HALF, mask=inside, other=0.0)


@triton.jit
def _put(ptr, place, low, high, inside, HALF: tl.constexpr):
    tl.store(ptr + place, low.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + place + HALF, high.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turn(cos_ptr, sin_ptr, place, inside):
    """Cosine and sine of a piece: of the lower half alone, since the upper one's are the same."""
    return tl.load(cos_ptr + place, mask=inside, other=0.0), tl.load(sin_ptr + place, mask=inside, other=0.0)


@triton.jit
def _turned(x, turn):
    """The halves of queries or keys, rotated as `pointwise.rotate` does."""
    kind = x[0].dtype
    low, high = x[0].to(tl.float32), x[1].to(tl.float32)
    return (low * turn[0] - high * turn[1]).to(kind), (high * turn[0] + low * turn[1]).to(kind)


@triton.jit
def _put_turned_back(ptr, place, low, high, turn, inside, HALF: tl.constexpr):
    _put(ptr, place, low * turn[0] + high * turn[1], high * turn[0] - low * turn[1], inside, HALF)


@triton.jit
def _products(x, y, x_rest, y_rest, REST: tl.constexpr):
    """Of every row of x with every row of y, over both pieces of both halves."""
    found = tl.dot(x[0], tl.trans(y[0]))
    found = tl.dot(x[1], tl.trans(y[1]), found)
    if REST:
        found = tl.dot(x_rest[0], tl.trans(y_rest[0]), found)
        found = tl.dot(x_rest[1], tl.trans(y_rest[1]), found)
    return found


@triton.jit
def _softmax(scores, known):
    """Over the keys of a segment, in fp32. Queries behind its end have weights too, which nothing reads."""
    scores = tl.where(known[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


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
def _read(qkv_ptr, row, column, there, width, HALF: tl.constexpr):
    """These columns of both halves: (places in qkv, which are there, queries, keys, values)."""
    place, inside = row * 3 * width + column, there & (column < HALF)
    q, k = _halves(qkv_ptr, place, inside, HALF), _halves(qkv_ptr, place + width, inside, HALF)
    return place, inside, q, k, _halves(qkv_ptr, place + 2 * width, inside, HALF)


@triton.jit
def _windows_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, borders_ptr, scale, heads,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = SIZE // 2
    start, row, there, known = _segment(borders_ptr, LONGEST)
    qkv_ptr += (start * 3 * heads + tl.program_id(0)) * SIZE
    out_ptr += (start * heads + tl.program_id(0)) * SIZE
    cos_ptr += start * SIZE
    sin_ptr += start * SIZE
    width = heads * SIZE
    column = tl.arange(0, MAIN)[None, :]
    _, inside, q, k, v = _read(qkv_ptr, row, column, there, width, HALF)
    turn = _turn(cos_ptr, sin_ptr, row * SIZE + column, inside)
    q, k = _turned(q, turn), _turned(k, turn)
    q_rest, k_rest = q, k
    if REST:
        rest = MAIN + tl.arange(0, REST)[None, :]
        _, in_rest, q_rest, k_rest, v_rest = _read(qkv_ptr, row, rest, there, width, HALF)
        turn = _turn(cos_ptr, sin_ptr, row * SIZE + rest, in_rest)
        q_rest, k_rest = _turned(q_rest, turn), _turned(k_rest, turn)
    weights = _softmax(_products(q, k, q_rest, k_rest, REST) * scale, known).to(q[0].dtype)
    _put(out_ptr, row * width + column, tl.dot(weights, v[0]), tl.dot(weights, v[1]), inside, HALF)
    if REST:
        _put(out_ptr, row * width + rest, tl.dot(weights, v_rest[0]), tl.dot(weights, v_rest[1]), in_rest, HALF)


@triton.jit
def _windows_backward_kernel(
    d_out_ptr, qkv_ptr, cos_ptr, sin_ptr, d_qkv_ptr, borders_ptr, scale, heads,
    SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = SIZE // 2
    start, row, there, known = _segment(borders_ptr, LONGEST)
    qkv_ptr += (start * 3 * heads + tl.program_id(0)) * SIZE
    d_qkv_ptr += (start * 3 * heads + tl.program_id(0)) * SIZE
    d_out_ptr += (start * heads + tl.program_id(0)) * SIZE
    cos_ptr += start * SIZE
    sin_ptr += start * SIZE
    width = heads * SIZE
    column = tl.arange(0, MAIN)[None, :]
    place, inside, q, k, v = _read(qkv_ptr, row, column, there, width, HALF)
    d = _halves(d_out_ptr, row * width + column, inside, HALF)
    turn = _turn(cos_ptr, sin_ptr, row * SIZE + column, inside)
    q, k = _turned(q, turn), _turned(k, turn)
    q_rest, k_rest, v_rest, d_rest = q, k, v, d
    if REST:
        rest = MAIN + tl.arange(0, REST)[None, :]
        at_rest, in_rest, q_rest, k_rest, v_rest = _read(qkv_ptr, row, rest, there, width, HALF)
        d_rest = _halves(d_out_ptr, row * width + rest, in_rest, HALF)
        turn = _turn(cos_ptr, sin_ptr, row * SIZE + rest, in_rest)
        q_rest, k_rest = _turned(q_rest, turn), _turned(k_rest, turn)
    weights = _softmax(_products(q, k, q_rest, k_rest, REST) * scale, known)
    d_weights = _products(d, v, d_rest, v_rest, REST)
    # Queries behind the end have no gradient: that of their output is zero.
    d_scores = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None]) * scale
    d_scores = d_scores.to(q[0].dtype)
    back, weights = tl.trans(d_scores), tl.trans(weights.to(d[0].dtype))
    _put(d_qkv_ptr, place + 2 * width, tl.dot(weights, d[0]), tl.dot(weights, d[1]), inside, HALF)
    # Read again, since registers are dearer than the cache is.
    turn = _turn(cos_ptr, sin_ptr, row * SIZE + column, inside)
    _put_turned_back(d_qkv_ptr, place, tl.dot(d_scores, k[0]), tl.dot(d_scores, k[1]), turn, inside, HALF)
    _put_turned_back(d_qkv_ptr, place + width, tl.dot(back, q[0]), tl.dot(back, q[1]), turn, inside, HALF)
    if REST:
        _put(d_qkv_ptr, at_rest + 2 * width, tl.dot(weights, d_rest[0]), tl.dot(weights, d_rest[1]), in_rest, HALF)
        turn = _turn(cos_ptr, sin_ptr, row * SIZE + rest, in_rest)
        low, high = tl.dot(d_scores, k_rest[0]), tl.dot(d_scores, k_rest[1])
        _put_turned_back(d_qkv_ptr, at_rest, low, high, turn, in_rest, HALF)
        low, high = tl.dot(back, q_rest[0]), tl.dot(back, q_rest[1])
        _put_turned_back(d_qkv_ptr, at_rest + width, low, high, turn, in_rest, HALF)


_windows = Launch(_windows_kernel)
_windows_backward = Launch(_windows_backward_kernel)


@lru_cache(maxsize=16)
def _pieces(size: int) -> tuple[int, int]:
    """Columns of the tiles for half a head; the second has 0 where one tile serves."""
    half = size // 2
    whole: int = max(16, triton.next_power_of_2(half))
    main = whole // 2
    rest: int = max(16, triton.next_power_of_2(half - main)) if half > main >= 16 else whole
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
