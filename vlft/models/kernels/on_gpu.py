"""The functions of `pointwise.py` as Triton kernels, one launch each: same names, same arguments, same results."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlft.compiler.launch import Launch
from vlft.models.kernels.pointwise import Activation


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


@lru_cache(maxsize=64)
def _heads_block(heads: int, size: int) -> tuple[int, int, int]:
    """Heads and halves of a program that has all heads of a token, and its warps."""
    block = triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
    return *block, _warps(block[0] * block[1])


# ---------------------------------------------------------------------------------------------------------------------
# Norms: one program for one row at a time


@triton.jit
def _norm_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, eps, width,
    ADDS: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr,
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
    tl.store(out_ptr + row + columns, x.to(out_ptr.dtype.element_ty), mask=inside)


_norm = Launch(_norm_kernel)


def norm(
    x_ND: Tensor, branch_ND: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows, width = x_ND.shape
    x_ND = x_ND.contiguous()
    total = x_ND if branch_ND is None else torch.empty_like(x_ND)
    out = torch.empty_like(x_ND, dtype=kind)
    branch = x_ND if branch_ND is None else branch_ND.contiguous()
    block, warps = _block(width)
    _norm(
        (rows, 1), (x_ND, branch, weight_D, weight_D if bias_D is None else bias_D, total, out), (eps, width),
        (branch_ND is not None, bias_D is not None, block), warps,
    )  # fmt: skip
    return total, out


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
    for row in range(program, rows, tl.num_programs(0)):
        start = row * width
        x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
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
            d_x += tl.load(d_more_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
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
    d_weights = summed.sum(1)
    return d_x, d_weights[0], d_weights[1] if centred else None


# ---------------------------------------------------------------------------------------------------------------------
# Rotation: one program for all heads of a token, the two halves of each apart


@triton.jit
def _halves(ptr, place, half, inside):
    """The lower and the upper half of a head at `place`, in fp32."""
    low = tl.load(ptr + place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(ptr + place + half, mask=inside, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _rotate_kernel(
    x_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps, heads, kv_heads, size,
    NORMS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    half = size // 2
    keys = heads + kv_heads
    column = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = column < half
    is_q = inside & (head < heads)
    is_k = inside & (head >= heads) & (head < keys)
    is_v = inside & (head >= keys) & (head < keys + kv_heads)
    cos_low, cos_high = _halves(cos_ptr, token * size + column, half, inside)
    sin_low, sin_high = _halves(sin_ptr, token * size + column, half, inside)
    place = (token * (keys + kv_heads) + head) * size + column
    low, high = _halves(x_ptr, place, half, is_q | is_k | is_v)
    v_place = (token * kv_heads + head - keys) * size + column
    tl.store(v_ptr + v_place, low.to(v_ptr.dtype.element_ty), mask=is_v)
    tl.store(v_ptr + v_place + half, high.to(v_ptr.dtype.element_ty), mask=is_v)
    if NORMS:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / size + eps)[:, None]
        q_low, q_high = _halves(q_weight_ptr, column, half, inside)
        k_low, k_high = _halves(k_weight_ptr, column, half, inside)
        low *= scale * tl.where(is_q, q_low, k_low)
        high *= scale * tl.where(is_q, q_high, k_high)
    new_low = low * cos_low - high * sin_low
    new_high = high * cos_high + low * sin_high
    q_place = (token * heads + head) * size + column
    tl.store(q_ptr + q_place, new_low.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(q_ptr + q_place + half, new_high.to(q_ptr.dtype.element_ty), mask=is_q)
    k_place = (token * kv_heads + head - heads) * size + column
    tl.store(k_ptr + k_place, new_low.to(k_ptr.dtype.element_ty), mask=is_k)
    tl.store(k_ptr + k_place + half, new_high.to(k_ptr.dtype.element_ty), mask=is_k)


_rotate = Launch(_rotate_kernel)


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
    tokens, all_heads, size = qkv_NCd.shape
    q, k, v = (qkv_NCd.new_empty(tokens, n, size) for n in (heads, kv_heads, kv_heads))
    norms = q_weight_d is not None
    weights: Any = (q_weight_d, k_weight_d) if norms else (cos_Nd, cos_Nd)
    *block, warps = _heads_block(all_heads, size)
    _rotate(
        (tokens, 1), (qkv_NCd.contiguous(), q, k, v, cos_Nd.contiguous(), sin_Nd.contiguous(), *weights),
        (eps, heads, kv_heads, size), (norms, *block), warps,
    )  # fmt: skip
    return q, k, v


@triton.jit(do_not_specialize=["tokens"])
def _rotate_backward_kernel(
    d_q_ptr, d_k_ptr, d_v_ptr, out_ptr, cos_ptr, sin_ptr, x_ptr, q_weight_ptr, k_weight_ptr, d_weight_ptr,
    tokens, eps, heads, kv_heads, size, NORMS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    half = size // 2
    keys = heads + kv_heads
    column = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = column < half
    is_q = inside & (head < heads)
    is_k = inside & (head >= heads) & (head < keys)
    is_v = inside & (head >= keys) & (head < keys + kv_heads)
    d_q_low = tl.zeros((HALF,), tl.float32)
    d_q_high = tl.zeros((HALF,), tl.float32)
    d_k_low = tl.zeros((HALF,), tl.float32)
    d_k_high = tl.zeros((HALF,), tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        cos_low, cos_high = _halves(cos_ptr, token * size + column, half, inside)
        sin_low, sin_high = _halves(sin_ptr, token * size + column, half, inside)
        q_place = (token * heads + head) * size + column
        k_place = (token * kv_heads + head - heads) * size + column
        v_place = (token * kv_heads + head - keys) * size + column
        # Each head is one of the three, and zero in the others.
        q_low_d, q_high_d = _halves(d_q_ptr, q_place, half, is_q)
        k_low_d, k_high_d = _halves(d_k_ptr, k_place, half, is_k)
        v_low_d, v_high_d = _halves(d_v_ptr, v_place, half, is_v)
        d_low = q_low_d + k_low_d + v_low_d
        d_high = q_high_d + k_high_d + v_high_d
        new_low = d_low * cos_low + d_high * sin_high
        new_high = d_high * cos_high - d_low * sin_low
        place = (token * (keys + kv_heads) + head) * size + column
        if NORMS:
            low, high = _halves(x_ptr, place, half, is_q | is_k)
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / size + eps)[:, None]
            low *= scale
            high *= scale
            d_q_low += tl.sum(tl.where(is_q, new_low * low, 0.0), 0)
            d_q_high += tl.sum(tl.where(is_q, new_high * high, 0.0), 0)
            d_k_low += tl.sum(tl.where(is_k, new_low * low, 0.0), 0)
            d_k_high += tl.sum(tl.where(is_k, new_high * high, 0.0), 0)
            q_low, q_high = _halves(q_weight_ptr, column, half, inside)
            k_low, k_high = _halves(k_weight_ptr, column, half, inside)
            new_low *= tl.where(is_q, q_low, k_low)
            new_high *= tl.where(is_q, q_high, k_high)
            mean = ((tl.sum(new_low * low, 1) + tl.sum(new_high * high, 1)) / size)[:, None]
            new_low = (new_low - low * mean) * scale
            new_high = (new_high - high * mean) * scale
        new_low = tl.where(is_v, d_low, new_low)
        new_high = tl.where(is_v, d_high, new_high)
        tl.store(out_ptr + place, new_low.to(out_ptr.dtype.element_ty), mask=is_q | is_k | is_v)
        tl.store(out_ptr + place + half, new_high.to(out_ptr.dtype.element_ty), mask=is_q | is_k | is_v)
    if NORMS:
        share = d_weight_ptr + program * 2 * size + tl.arange(0, HALF)
        known = tl.arange(0, HALF) < half
        tl.store(share, d_q_low, mask=known)
        tl.store(share + half, d_q_high, mask=known)
        tl.store(share + size, d_k_low, mask=known)
        tl.store(share + size + half, d_k_high, mask=known)


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
    programs = min(tokens, 16 * _processors(out.device)) if norms else tokens
    shares = torch.empty(programs, 2, size, dtype=torch.float32, device=out.device) if norms else out
    saved: Any = (qkv_NCd, q_weight_d, k_weight_d) if norms else (out, cos_Nd, cos_Nd)
    *block, warps = _heads_block(heads + 2 * kv_heads, size)
    _rotate_backward(
        (programs, 1),
        (d_q_NHd.contiguous(), d_k_NKd.contiguous(), d_v_NKd.contiguous(), out, cos_Nd.contiguous(),
         sin_Nd.contiguous(), *saved, shares),
        (eps, heads, kv_heads, size), (norms, *block), warps, changing=(tokens,),
    )  # fmt: skip
    if not norms:
        return out, None, None
    d_weights = shares.sum(0)
    return out, d_weights[0], d_weights[1]


# ---------------------------------------------------------------------------------------------------------------------
# Activations: one program for a piece of one row

_KINDS: dict[Activation, int] = {"silu_gated": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "quick_gelu": 3}
_PIECE = 1024


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _activate_kernel(x_ptr, out_ptr, columns, KIND: tl.constexpr, BLOCK: tl.constexpr):
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
    tl.store(out_ptr + row * columns + column, x.to(out_ptr.dtype.element_ty), mask=inside)


_activate = Launch(_activate_kernel)


def activate(inner_NI: Tensor, kind: Activation) -> Tensor:
    rows, columns = inner_NI.shape
    if kind == "silu_gated":
        columns //= 2
    out = inner_NI.new_empty(rows, columns)
    block = min(_PIECE, _block(columns)[0])
    _activate((rows, -(-columns // block)), (inner_NI, out), (columns,), (_KINDS[kind], block), 4)
    return out


@triton.jit
def _activate_backward_kernel(x_ptr, d_ptr, columns, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x_row = x_ptr + row * columns * (2 if KIND == 0 else 1)
    d_place = d_ptr + row * columns + column
    x = tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_place, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        up = tl.load(x_row + columns + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(x)
        out = x * sigmoid * up
        slope = up * sigmoid * (1.0 + x * (1.0 - sigmoid))
        tl.store(x_row + columns + column, (d * x * sigmoid).to(x_ptr.dtype.element_ty), mask=inside)
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
    tl.store(x_row + column, (d * slope).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(d_place, out.to(d_ptr.dtype.element_ty), mask=inside)


_activate_backward = Launch(_activate_backward_kernel)


def activate_backward(inner_NI: Tensor, d_out_NI: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    rows, columns = d_out_NI.shape
    block = min(_PIECE, _block(columns)[0])
    _activate_backward((rows, -(-columns // block)), (inner_NI, d_out_NI), (columns,), (_KINDS[kind], block), 4)
    return inner_NI, d_out_NI


# ---------------------------------------------------------------------------------------------------------------------
# Dropout: one call of the generator for eight values, which lie a stride apart so that each load is of neighbours

_STRIDE = 1024


@triton.jit
def _drop(x_ptr, out_ptr, place, size, digits, least, factor):
    inside = place < size
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x = tl.where((digits & 0xFFFF).to(tl.int32) >= least, x * factor, 0.0)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["units", "seed_low", "seed_high"])
def _dropout_kernel(
    x_ptr, out_ptr, units, seed_low, seed_high, least, factor, UNIT: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    size = units.to(tl.int64) * UNIT  # a multiple of a vector's, as the compiler sees, so that it loads vectors
    program = tl.program_id(0)
    column = tl.arange(0, STRIDE)
    # Philox of 7 rounds passes BigCrush (Salmon et al. 2011); each of its four words gives two values of 16 bits.
    counter = program * STRIDE + column
    zero = counter * 0
    seed = seed_low.to(tl.uint64) | (seed_high.to(tl.uint64) << 32)
    one, two, three, four = tl.philox(seed, counter, zero, zero, zero, 7)
    place = program.to(tl.int64) * (8 * STRIDE) + column
    _drop(x_ptr, out_ptr, place, size, one, least, factor)
    _drop(x_ptr, out_ptr, place + STRIDE, size, one >> 16, least, factor)
    _drop(x_ptr, out_ptr, place + 2 * STRIDE, size, two, least, factor)
    _drop(x_ptr, out_ptr, place + 3 * STRIDE, size, two >> 16, least, factor)
    _drop(x_ptr, out_ptr, place + 4 * STRIDE, size, three, least, factor)
    _drop(x_ptr, out_ptr, place + 5 * STRIDE, size, three >> 16, least, factor)
    _drop(x_ptr, out_ptr, place + 6 * STRIDE, size, four, least, factor)
    _drop(x_ptr, out_ptr, place + 7 * STRIDE, size, four >> 16, least, factor)


_dropout = Launch(_dropout_kernel)


def dropout(x_ND: Tensor, probability: float, seed: int, *, in_place: bool = False) -> Tensor:
    x_ND = x_ND.contiguous()
    out = x_ND if in_place else torch.empty_like(x_ND)
    least = round(probability * 65536)
    size = x_ND.numel()
    unit = 1 if size % 16 else 16
    _dropout(
        (-(-size // (8 * _STRIDE)), 1), (x_ND, out), (least, 65536 / (65536 - least)), (unit, _STRIDE), 4,
        changing=(size // unit, seed & 0x7FFFFFFF, (seed >> 31) & 0x7FFFFFFF),
    )  # fmt: skip
    return out
