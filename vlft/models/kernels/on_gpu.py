"""The functions of `pointwise.py` as Triton kernels, one launch each: same names, same arguments, same results.

Behind them what `four_bit.py` asks for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlft.compiler.launch import Launch
from vlft.models.kernels.pointwise import Activation, Drop


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 4096 else 16


@lru_cache(maxsize=64)
def _block(width: int) -> tuple[int, int]:
    """Columns of a program that has a whole row, and its warps."""
    block = triton.next_power_of_2(width)
    return block, _warps(block)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout: whether a value stays is a function of its place, which each kernel that has the value works out by itself


def _how(drop: Drop | None) -> tuple[tuple[int, float], tuple[int, int]]:
    """Its scale and keys; those of a kernel that drops nothing are not read."""
    return ((0, 1.0), (0, 0)) if drop is None else (drop.scale, drop.keys)


@triton.jit
def _stays(place, one, two, least):
    """As `pointwise.Drop`."""
    mixed = place.to(tl.uint32) + one.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * 0x21F0AAAD
    mixed = (mixed ^ (mixed >> 15) ^ two.to(tl.uint32)) * 0xD35A2D97
    mixed = mixed ^ (mixed >> 15)
    return (mixed >> 16).to(tl.int32) >= least


@triton.jit(do_not_specialize=["units", "one", "two"])
def _dropout_kernel(x_ptr, out_ptr, units, one, two, least, factor, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # A multiple of a vector's size, as the compiler sees, so that it loads vectors.
    inside = place < units.to(tl.int64) * UNIT
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(_stays(place, one, two, least), x * factor, 0.0)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)


_dropout = Launch(_dropout_kernel)


def dropout(x_ND: Tensor, drop: Drop) -> Tensor:
    x_ND = x_ND.contiguous()
    out = torch.empty_like(x_ND)
    size = x_ND.numel()
    unit = 1 if size % 16 else 16
    _dropout((-(-size // 2048), 1), (x_ND, out), drop.scale, (unit, 2048), 4, changing=(size // unit, *drop.keys))
    return out


@triton.jit(do_not_specialize=["rows", "one", "two"])
def _product_dropped_kernel(
    low_ptr, a_ptr, out_ptr, rows, one, two, ranks, width, least, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, ranks, RANKS):
        rank = first + tl.arange(0, RANKS)
        low = tl.load(low_ptr + row * ranks + rank[None, :], mask=(row < rows) & (rank < ranks)[None, :], other=0.0)
        inside = (rank < ranks)[:, None] & (column < width)
        a = tl.load(a_ptr + rank[:, None] * width + column, mask=inside, other=0.0)
        out += tl.dot(low, a, input_precision="ieee")
    place = row * width + column
    out = tl.where(_stays(place, one, two, least), out * factor, 0.0)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=(row < rows) & (column < width))


_product_dropped = Launch(_product_dropped_kernel)


def product_dropped(low_NR: Tensor, a_RD: Tensor, drop: Drop) -> Tensor:
    (rows, ranks), width = low_NR.shape, a_RD.shape[1]
    out = low_NR.new_empty(rows, width)
    side = 128 if low_NR.dtype != torch.float32 else 64
    piece = min(64, max(16, triton.next_power_of_2(ranks)))
    _product_dropped(
        (-(-rows // side), -(-width // side)), (low_NR.contiguous(), a_RD.contiguous(), out),
        (ranks, width, *drop.scale), (side, side, piece), 8, changing=(rows, *drop.keys),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Norms: one program for one row at a time


@triton.jit(do_not_specialize=["one", "two"])
def _norm_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, dropped_ptr, one, two, eps, width, least, factor,
    ADDS: tl.constexpr, CENTRED: tl.constexpr, PLAIN: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(branch_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        x = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row + columns, x, mask=inside)
        x = x.to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    x *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x = x.to(out_ptr.dtype.element_ty)
    if PLAIN:
        tl.store(out_ptr + row + columns, x, mask=inside)
    if DROPS:
        x = tl.where(_stays(row + columns, one, two, least), x.to(tl.float32) * factor, 0.0)
        tl.store(dropped_ptr + row + columns, x.to(dropped_ptr.dtype.element_ty), mask=inside)


_norm = Launch(_norm_kernel)


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
    rows, width = x_ND.shape
    x_ND = x_ND.contiguous()
    total = x_ND if branch_ND is None else torch.empty_like(x_ND)
    out = torch.empty_like(x_ND, dtype=kind)
    plain = plain or drop is None
    dropped = torch.empty_like(out) if plain and drop is not None else out
    branch = x_ND if branch_ND is None else branch_ND.contiguous()
    block, warps = _block(width)
    scale, keys = _how(drop)
    _norm(
        (rows, 1), (x_ND, branch, weight_D, weight_D if bias_D is None else bias_D, total, out, dropped),
        (eps, width, *scale), (branch_ND is not None, bias_D is not None, plain, drop is not None, block), warps,
        changing=keys,
    )  # fmt: skip
    return total, out, dropped


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    d_out_ptr, x_ptr, weight_ptr, d_more_ptr, d_x_ptr, d_weight_ptr, d_bias_ptr, rows, eps, width,
    ADDS: tl.constexpr, CENTRED: tl.constexpr, TRAINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    d_bias = tl.zeros((BLOCK,), tl.float32)
    # The next row is on its way while this one is worked out, whose two sums all warps wait for.
    is_there = columns < tl.where(program < rows, width, 0)  # a row without samples has none
    next_x = tl.load(x_ptr + program * width + columns, mask=is_there, other=0.0)
    next_d_out = tl.load(d_out_ptr + program * width + columns, mask=is_there, other=0.0)
    for row in range(program, rows, tl.num_programs(0)):
        start = row * width
        x = next_x.to(tl.float32)
        d_out = next_d_out.to(tl.float32)
        if ADDS:
            d_more = tl.load(d_more_ptr + start + columns, mask=inside, other=0.0)
        follows = start + tl.num_programs(0) * width
        is_there = columns < tl.where(row + tl.num_programs(0) < rows, width, 0)
        next_x = tl.load(x_ptr + follows + columns, mask=is_there, other=0.0)
        next_d_out = tl.load(d_out_ptr + follows + columns, mask=is_there, other=0.0)
        if CENTRED:
            x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
        scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        x *= scale
        d = d_out * weight
        d_x = d - x * (tl.sum(d * x, 0) / width)
        if CENTRED:
            d_x -= tl.sum(d, 0) / width
        d_x *= scale
        if ADDS:
            d_x += d_more.to(tl.float32)
        tl.store(d_x_ptr + start + columns, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
        if TRAINS:
            d_weight += d_out * x
            d_bias += d_out
    if TRAINS:
        tl.store(d_weight_ptr + program * width + columns, d_weight, mask=inside)
        if CENTRED:
            tl.store(d_bias_ptr + program * width + columns, d_bias, mask=inside)


_norm_backward = Launch(_norm_backward_kernel)


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
    rows, width = x_ND.shape
    d_out_ND, x_ND = d_out_ND.contiguous(), x_ND.contiguous()
    d_x = torch.empty_like(x_ND)
    # Each program sums its rows' share of the weight's gradient in registers, so that no atomics order the sum anew.
    programs = min(rows, 4 * _processors(x_ND.device)) or 1
    centred = bias_D is not None
    summed = torch.empty(1 + centred, programs, width, dtype=torch.float32, device=x_ND.device) if trains else None
    of_weight = d_x if summed is None else summed[0]
    of_bias = summed[1] if summed is not None and centred else of_weight
    block, warps = _block(width)
    _norm_backward(
        (programs, 1),
        (d_out_ND, x_ND, weight_D, d_out_ND if d_more_ND is None else d_more_ND.contiguous(), d_x, of_weight, of_bias),
        (eps, width), (d_more_ND is not None, centred, trains, block), warps, changing=(rows,),
    )  # fmt: skip
    if summed is None:
        return d_x, None, None
    d_weight = _sums(summed[0], weight_D.dtype)
    return d_x, d_weight, _sums(summed[1], weight_D.dtype) if centred else None


# ---------------------------------------------------------------------------------------------------------------------
# Rotation: a program has some heads of the queries, of the keys or of the values, token after token, the halves apart


@triton.jit
def _halves(ptr, place, half, inside):
    """The lower and the upper half of a head at `place`, in fp32."""
    low = tl.load(ptr + place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(ptr + place + half, mask=inside, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _put(ptr, place, half, low, high, inside):
    tl.store(ptr + place, low.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + place + half, high.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _places(block, tokens, own, first, all_heads, SIZE: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """Of pairs of a token and one of `own` heads: (the token's place in cos and sin, the head's among all heads, its
    place among its own, which are there)."""
    pair = block * PAIRS + tl.arange(0, PAIRS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    token = pair // own
    head = first + pair - token * own
    inside = (token < tokens) & (column < SIZE // 2)
    among_all = (token.to(tl.int64) * all_heads + head) * SIZE + column
    return token.to(tl.int64) * SIZE + column, among_all, pair.to(tl.int64) * SIZE + column, inside


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, cos_ptr, sin_ptr, weight_ptr, tokens, eps, own, first, all_heads,
    NORMS: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    half = SIZE // 2
    token, place, own_place, inside = _places(tl.program_id(0), tokens, own, first, all_heads, SIZE, PAIRS, HALF)
    low, high = _halves(x_ptr, place, half, inside)
    if NORMS:
        column = tl.arange(0, HALF)[None, :]
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / SIZE + eps)[:, None]
        weight_low, weight_high = _halves(weight_ptr, column, half, column < half)
        low *= scale * weight_low
        high *= scale * weight_high
    cos_low, cos_high = _halves(cos_ptr, token, half, inside)
    sin_low, sin_high = _halves(sin_ptr, token, half, inside)
    _put(out_ptr, own_place, half, low * cos_low - high * sin_low, high * cos_high + low * sin_high, inside)


@triton.jit(do_not_specialize=["tokens"])
def _rotate_kernel(
    x_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, tokens, eps, heads, kv_heads,
    NORMS: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    all_heads = heads + 2 * kv_heads
    part = tl.program_id(1)
    if part == 0:
        _rotate_heads(
            x_ptr, q_ptr, cos_ptr, sin_ptr, q_weight_ptr, tokens, eps, heads, 0, all_heads, NORMS, SIZE, PAIRS, HALF
        )  # fmt: skip
    elif part == 1:
        _rotate_heads(
            x_ptr, k_ptr, cos_ptr, sin_ptr, k_weight_ptr, tokens, eps, kv_heads, heads, all_heads, NORMS, SIZE, PAIRS,
            HALF,
        )  # fmt: skip
    else:
        _, place, own_place, inside = _places(
            tl.program_id(0), tokens, kv_heads, heads + kv_heads, all_heads, SIZE, PAIRS, HALF
        )
        low, high = _halves(x_ptr, place, SIZE // 2, inside)
        _put(v_ptr, own_place, SIZE // 2, low, high, inside)


_rotate = Launch(_rotate_kernel)


@lru_cache(maxsize=64)
def _pairs_block(size: int) -> tuple[int, int]:
    """Heads of a program, and columns of their halves."""
    half = triton.next_power_of_2(size // 2)
    return max(1, 2048 // half), half


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
    tokens, _, size = qkv_NCd.shape
    q, k, v = (qkv_NCd.new_empty(tokens, n, size) for n in (heads, kv_heads, kv_heads))
    norms = q_weight_d is not None
    weights: Any = (q_weight_d, k_weight_d) if norms else (cos_Nd, cos_Nd)
    block = _pairs_block(size)
    _rotate(
        (-(-tokens * max(heads, kv_heads) // block[0]), 3),
        (qkv_NCd.contiguous(), q, k, v, cos_Nd.contiguous(), sin_Nd.contiguous(), *weights),
        (eps, heads, kv_heads), (norms, size, *block), 4, changing=(tokens,),
    )  # fmt: skip
    return q, k, v


@triton.jit
def _rotate_heads_back(
    d_ptr, out_ptr, cos_ptr, sin_ptr, x_ptr, weight_ptr, share_ptr, tokens, eps, own, first, all_heads,
    NORMS: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    half = SIZE // 2
    column = tl.arange(0, HALF)
    share_low = tl.zeros((HALF,), tl.float32)
    share_high = tl.zeros((HALF,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens * own, PAIRS), tl.num_programs(0)):
        token, place, own_place, inside = _places(block, tokens, own, first, all_heads, SIZE, PAIRS, HALF)
        d_low, d_high = _halves(d_ptr, own_place, half, inside)
        cos_low, cos_high = _halves(cos_ptr, token, half, inside)
        sin_low, sin_high = _halves(sin_ptr, token, half, inside)
        new_low = d_low * cos_low + d_high * sin_high
        new_high = d_high * cos_high - d_low * sin_low
        if NORMS:
            low, high = _halves(x_ptr, place, half, inside)
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / SIZE + eps)[:, None]
            low *= scale
            high *= scale
            share_low += tl.sum(new_low * low, 0)
            share_high += tl.sum(new_high * high, 0)
            weight_low, weight_high = _halves(weight_ptr, column[None, :], half, (column < half)[None, :])
            new_low *= weight_low
            new_high *= weight_high
            mean = ((tl.sum(new_low * low, 1) + tl.sum(new_high * high, 1)) / SIZE)[:, None]
            new_low = (new_low - low * mean) * scale
            new_high = (new_high - high * mean) * scale
        _put(out_ptr, place, half, new_low, new_high, inside)
    if NORMS:
        _put(share_ptr, tl.program_id(0) * SIZE + column, half, share_low, share_high, column < half)


@triton.jit(do_not_specialize=["tokens"])
def _rotate_backward_kernel(
    d_q_ptr, d_k_ptr, d_v_ptr, out_ptr, cos_ptr, sin_ptr, x_ptr, q_weight_ptr, k_weight_ptr, shares_ptr,
    tokens, eps, heads, kv_heads, NORMS: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    all_heads = heads + 2 * kv_heads
    part = tl.program_id(1)
    if part == 0:
        _rotate_heads_back(
            d_q_ptr, out_ptr, cos_ptr, sin_ptr, x_ptr, q_weight_ptr, shares_ptr, tokens, eps, heads, 0, all_heads,
            NORMS, SIZE, PAIRS, HALF,
        )  # fmt: skip
    elif part == 1:
        _rotate_heads_back(
            d_k_ptr, out_ptr, cos_ptr, sin_ptr, x_ptr, k_weight_ptr, shares_ptr + tl.num_programs(0) * SIZE, tokens,
            eps, kv_heads, heads, all_heads, NORMS, SIZE, PAIRS, HALF,
        )  # fmt: skip
    else:
        for block in range(tl.program_id(0), tl.cdiv(tokens * kv_heads, PAIRS), tl.num_programs(0)):
            _, place, own_place, inside = _places(
                block, tokens, kv_heads, heads + kv_heads, all_heads, SIZE, PAIRS, HALF
            )
            low, high = _halves(d_v_ptr, own_place, SIZE // 2, inside)
            _put(out_ptr, place, SIZE // 2, low, high, inside)


_rotate_backward = Launch(_rotate_backward_kernel)


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
    tokens, heads, size = d_q_NHd.shape
    kv_heads = d_k_NKd.shape[1]
    norms = qkv_NCd is not None
    out = d_v_NKd.new_empty(tokens, heads + 2 * kv_heads, size)
    block = _pairs_block(size)
    programs = -(-tokens * max(heads, kv_heads) // block[0])
    # Each program sums its share of the norms' gradient in registers, so that no atomics order the sum anew.
    programs = min(programs, 8 * _processors(out.device)) if norms else programs
    shares = torch.empty(2, programs, size, dtype=torch.float32, device=out.device) if norms else out
    saved: Any = (qkv_NCd, q_weight_d, k_weight_d) if norms else (out, cos_Nd, cos_Nd)
    _rotate_backward(
        (programs, 3),
        (d_q_NHd.contiguous(), d_k_NKd.contiguous(), d_v_NKd.contiguous(), out, cos_Nd.contiguous(),
         sin_Nd.contiguous(), *saved, shares),
        (eps, heads, kv_heads), (norms, size, *block), 4, changing=(tokens,),
    )  # fmt: skip
    if not norms:
        return out, None, None
    d_weights = shares.sum(1)
    return out, d_weights[0], d_weights[1]


# ---------------------------------------------------------------------------------------------------------------------
# Activations: one program for a piece of one row

_KINDS: dict[Activation, int] = {"silu_gated": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "quick_gelu": 3}
_PIECE = 1024
_SHARE = 32
"""Rows whose columns a program sums."""


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _put_dropped(
    plain_ptr, dropped_ptr, place, x, inside, one, two, least, factor, PLAIN: tl.constexpr, DROPS: tl.constexpr
):  # fmt: skip
    x = x.to(plain_ptr.dtype.element_ty)
    if PLAIN:
        tl.store(plain_ptr + place, x, mask=inside)
    if DROPS:
        x = tl.where(_stays(place, one, two, least), x.to(tl.float32) * factor, 0.0)
        tl.store(dropped_ptr + place, x.to(dropped_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["one", "two"])
def _activate_kernel(
    x_ptr, out_ptr, dropped_ptr, one, two, columns, least, factor,
    KIND: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x_row = x_ptr + row * columns * (2 if KIND == 0 else 1)
    x = tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        x = x * tl.sigmoid(x) * tl.load(x_row + columns + column, mask=inside, other=0.0).to(tl.float32)
    elif KIND == 1:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        x = x * tl.sigmoid(1.702 * x)
    place = row * columns + column
    _put_dropped(out_ptr, dropped_ptr, place, x, inside, one, two, least, factor, True, DROPS)


_activate = Launch(_activate_kernel)


def activate(inner_NI: Tensor, kind: Activation, drop: Drop | None = None) -> tuple[Tensor, Tensor]:
    rows, columns = inner_NI.shape
    if kind == "silu_gated":
        columns //= 2
    out = inner_NI.new_empty(rows, columns)
    dropped = out if drop is None else torch.empty_like(out)
    block = min(_PIECE, _block(columns)[0])
    scale, keys = _how(drop)
    _activate(
        (rows, -(-columns // block)), (inner_NI, out, dropped), (columns, *scale),
        (_KINDS[kind], drop is not None, block), 4, changing=keys,
    )  # fmt: skip
    return out, dropped


@triton.jit
def _activate_row_back(
    x_ptr, d_ptr, dropped_ptr, row, column, inside, one, two, columns, least, factor,
    KIND: tl.constexpr, PLAIN: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """The gradients as they are stored, of the gate (or what is instead) and of what it lets pass."""
    x_row = x_ptr + row * columns * (2 if KIND == 0 else 1)
    place = row * columns + column
    x = tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        up = tl.load(x_row + columns + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(x)
        out = x * sigmoid * up
        slope = up * sigmoid * (1.0 + x * (1.0 - sigmoid))
        d_up = (d * x * sigmoid).to(x_ptr.dtype.element_ty)
        tl.store(x_row + columns + column, d_up, mask=inside)
    elif KIND == 1:
        normal = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        out = x * normal
        slope = normal + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 2:
        tanh = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        out = 0.5 * x * (1.0 + tanh)
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        sigmoid = tl.sigmoid(1.702 * x)
        out = x * sigmoid
        slope = sigmoid * (1.0 + 1.702 * x * (1.0 - sigmoid))
    d_x = (d * slope).to(x_ptr.dtype.element_ty)
    tl.store(x_row + column, d_x, mask=inside)
    _put_dropped(d_ptr, dropped_ptr, place, out, inside, one, two, least, factor, PLAIN, DROPS)
    if KIND != 0:
        d_up = d_x
    return d_x.to(tl.float32), d_up.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "one", "two"])
def _activate_backward_kernel(
    x_ptr, d_ptr, dropped_ptr, sums_ptr, rows, one, two, columns, least, factor,
    KIND: tl.constexpr, PLAIN: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if ROWS == 1:
        _activate_row_back(
            x_ptr, d_ptr, dropped_ptr, tl.program_id(0).to(tl.int64), column, column < columns, one, two, columns,
            least, factor, KIND, PLAIN, DROPS,
        )  # fmt: skip
    else:
        # Sums of the columns in passing: of these rows here, in registers, so that no atomics order them anew.
        first = tl.program_id(0).to(tl.int64) * ROWS
        total = tl.zeros((BLOCK,), tl.float32)
        total_up = tl.zeros((BLOCK,), tl.float32)
        for row in range(first, tl.minimum(first + ROWS, rows)):
            d_x, d_up = _activate_row_back(
                x_ptr, d_ptr, dropped_ptr, row, column, column < columns, one, two, columns, least, factor, KIND,
                PLAIN, DROPS,
            )  # fmt: skip
            total += d_x
            total_up += d_up
        sums_ptr += tl.program_id(0) * columns * (2 if KIND == 0 else 1)
        tl.store(sums_ptr + column, total, mask=column < columns)
        if KIND == 0:
            tl.store(sums_ptr + columns + column, total_up, mask=column < columns)


_activate_backward = Launch(_activate_backward_kernel)


def activate_backward(
    inner_NI: Tensor,
    d_out_NI: Tensor,
    kind: Activation,
    drop: Drop | None = None,
    *,
    plain: bool = True,
    sums: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows, columns = d_out_NI.shape
    plain = plain or drop is None
    dropped = torch.empty_like(d_out_NI) if plain and drop is not None else d_out_NI
    block = min(_PIECE, _block(columns)[0])
    scale, keys = _how(drop)
    share = 1 if sums is None else _SHARE
    programs = -(-rows // share)
    some = inner_NI if sums is None else inner_NI.new_empty(programs, inner_NI.shape[1], dtype=torch.float32)
    _activate_backward(
        (programs, -(-columns // block)), (inner_NI, d_out_NI, dropped, some), (columns, *scale),
        (_KINDS[kind], plain, drop is not None, share, block), 4, changing=(rows, *keys),
    )  # fmt: skip
    return inner_NI, d_out_NI, dropped, None if sums is None else column_sums(some, sums)


# ---------------------------------------------------------------------------------------------------------------------
# Sums of columns, in two launches: of pieces of the rows, and of those


@triton.jit(do_not_specialize=["rows", "share"])
def _column_sums_kernel(
    x_ptr, out_ptr, rows, share, stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, tl.minimum(first + share, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < columns)[None, :]
        total += tl.load(x_ptr + row * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.program_id(1) * columns + column, sums, mask=column < columns)


_column_sums = Launch(_column_sums_kernel)
_TILE, _SMALL_TILE = (16, 256), (64, 32)


def column_sums(x_NO: Tensor, kind: torch.dtype) -> Tensor:
    rows, columns = x_NO.shape
    if x_NO.stride(1) != 1:
        x_NO = x_NO.contiguous()
    tiles = -(-columns // _TILE[1])
    pieces = max(1, min(8 * _processors(x_NO.device) // tiles, rows // _TILE[0]))
    share = -(-rows // (pieces * _TILE[0])) * _TILE[0]
    pieces = -(-rows // share) if rows else 1
    some = torch.empty(pieces, columns, dtype=torch.float32, device=x_NO.device)
    _column_sums((tiles, pieces), (x_NO, some), (x_NO.stride(0), columns), _TILE, 4, changing=(rows, share))
    return _sums(some, kind)


def _sums(some_PO: Tensor, kind: torch.dtype) -> Tensor:
    """Of few rows that lie close."""
    rows, columns = some_PO.shape
    out = torch.empty(columns, dtype=kind, device=some_PO.device)
    tiles = -(-columns // _SMALL_TILE[1])
    _column_sums((tiles, 1), (some_PO, out), (columns, columns), _SMALL_TILE, 4, changing=(rows, rows))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Cross entropy: one program has a token's logits, piece by piece; in the backward pass, one for each piece

_LOGITS, _LOGITS_BACK = 4096, 2048


@triton.jit
def _cross_entropy_kernel(logits_ptr, labels_ptr, losses_ptr, sums_ptr, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocabulary
    # Each lane has a maximum and a sum of its own: to join them for every piece would wait each time.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # Of a lane without numbers so far: minus infinity less itself is none.
        least = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - least) + tl.exp(x - least)
        top = higher
    highest = tl.max(top, 0)
    sum_ = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    label = tl.load(labels_ptr + row)
    tl.store(sums_ptr + row, sum_)
    tl.store(losses_ptr + row, sum_ - tl.load(logits_ptr + label).to(tl.float32))


_cross_entropy = Launch(_cross_entropy_kernel)


def cross_entropy(logits_SV: Tensor, labels_S: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits_SV.shape
    losses, sums = (torch.empty(rows, dtype=torch.float32, device=logits_SV.device) for _ in range(2))
    if rows:
        _cross_entropy((rows, 1), (logits_SV, labels_S, losses, sums), (vocabulary,), (_LOGITS,), 8)
    return losses, sums


@triton.jit
def _cross_entropy_backward_kernel(
    logits_ptr, labels_ptr, sums_ptr, d_losses_ptr, vocabulary, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    place = logits_ptr + row * vocabulary + column
    d = tl.exp(tl.load(place, mask=inside, other=0.0).to(tl.float32) - tl.load(sums_ptr + row))
    d -= tl.where(column == tl.load(labels_ptr + row), 1.0, 0.0)
    tl.store(place, (d * tl.load(d_losses_ptr + row)).to(logits_ptr.dtype.element_ty), mask=inside)


_cross_entropy_backward = Launch(_cross_entropy_backward_kernel)


def cross_entropy_backward(logits_SV: Tensor, labels_S: Tensor, sums_S: Tensor, d_losses_S: Tensor) -> Tensor:
    rows, vocabulary = logits_SV.shape
    if rows:
        _cross_entropy_backward(
            (rows, -(-vocabulary // _LOGITS_BACK)), (logits_SV, labels_S, sums_S, d_losses_S.contiguous()),
            (vocabulary,), (_LOGITS_BACK,), 4,
        )  # fmt: skip
    return logits_SV


# ---------------------------------------------------------------------------------------------------------------------
# Weights of four bits


@triton.jit(do_not_specialize=["words"])
def _dequantize_4bit_kernel(
    packed_ptr, absmax_ptr, map_ptr, scales_ptr, offset_ptr, code_ptr, out_ptr, words,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    eight = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word, mask=inside, other=0)
    block = word // BLOCK
    scale = tl.load(map_ptr + tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32))
    scale = scale * tl.load(scales_ptr + block // GROUP, mask=inside, other=0.0) + tl.load(offset_ptr)
    # Of a byte's two values the upper half is the first.
    value = tl.arange(0, 8)
    code = (eight[:, None] >> (4 * (value ^ 1))[None, :]) & 15
    out = tl.load(code_ptr + code) * scale[:, None]
    place = word.to(tl.int64)[:, None] * 8 + value[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


# bitsandbytes rounds the product before it adds the offset; joined, some weights would differ in their last bit.
_dequantize_4bit = Launch(_dequantize_4bit_kernel, enable_fp_fusion=False)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, map_256: Tensor, scales: Tensor, offset: Tensor, code_16: Tensor, out_OD: Tensor,
    block: int, group: int,
) -> None:  # fmt: skip
    """
    Args:
        packed: O D / 2 bytes, in any dtype and shape; read as words of four.
        absmax: of each block of `block` values a place in `map_256`, whose value times one of `scales` for each
            `group` of blocks, plus `offset`, is the scale of its values in `code_16`.
    """
    words = out_OD.numel() // 8
    _dequantize_4bit(
        (-(-words // 512), 1), (packed, absmax, map_256, scales, offset, code_16, out_OD), (), (block // 8, group, 512),
        4, changing=(words,),
    )  # fmt: skip
