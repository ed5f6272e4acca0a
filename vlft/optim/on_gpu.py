"""`rounded.update` as one Triton kernel a parameter: each value is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlft.optim.rounded import BLOCK

_BLOCKS = 4
"""Of one program."""


@triton.jit
def _bits_rounded(x, digits):
    """fp32 to bf16 by the lowest 16 of `digits`."""
    bits = x.to(tl.int32, bitcast=True) + (digits & 0xFFFF).to(tl.int32)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(digits):
    return (digits & 0xFFFFFF).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _code(share, random, largest):
    above = tl.minimum(tl.maximum(tl.floor(-8.0 * tl.log2(share)), 0.0), largest)
    high = tl.exp2(-above / 8.0)
    low = tl.exp2(-(above + 1.0) / 8.0)
    keeps = tl.minimum(tl.maximum((share - low) / (high - low), 0.0), 1.0)
    return tl.minimum(above + tl.where(random > keeps, 1.0, 0.0), largest)


@triton.jit(do_not_specialize=["seed"])
def _update_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, size, lr, decay, one, two, correction, eps, seed,
    EIGHT: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = place < size
    first = row * WIDTH < size
    g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(p_ptr + place, mask=inside, other=0.0).to(tl.float32)
    digits_m, digits_v, digits_w, _ = tl.randint4x(seed, place.to(tl.int32))
    if EIGHT:
        # The codes fill whole blocks, also behind the parameter's end.
        codes = tl.load(m_ptr + place, mask=first[:, None], other=127).to(tl.int32)
        code = (codes & 127).to(tl.float32)
        m = tl.where(code == 127.0, 0.0, tl.exp2(-code / 8.0))
        m = tl.where(codes >= 128, -m, m) * tl.load(m_scale_ptr + row, mask=first, other=0.0)[:, None]
        v = tl.exp2(-tl.load(v_ptr + place, mask=first[:, None], other=0).to(tl.float32) / 8.0)
        v *= tl.load(v_scale_ptr + row, mask=first, other=0.0)[:, None]
        m = tl.where(inside, m, 0.0)
        v = tl.where(inside, v, 0.0)
    else:
        m = tl.load(m_ptr + place, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + place, mask=inside, other=0.0).to(tl.float32)
    m = one * m + (1.0 - one) * g
    v = two * v + (1.0 - two) * g * g
    w = w - (lr * m / (tl.sqrt(v) * correction + eps) + decay * w)
    if ROUNDS:
        w = _bits_rounded(w, digits_w)
    tl.store(p_ptr + place, w.to(p_ptr.dtype.element_ty), mask=inside)
    if EIGHT:
        size_m = tl.abs(m)
        scale = tl.max(size_m, 1)
        tl.store(m_scale_ptr + row, scale, mask=first)
        share = size_m / tl.maximum(scale, 1e-38)[:, None]
        random = _uniform(digits_m)
        smallest = 1.814586052e-05  # 2^(-126 / 8)
        code = _code(tl.maximum(share, smallest), random, 126.0)
        code = tl.where((share < smallest) & (random * smallest >= share), 127.0, code)
        tl.store(m_ptr + place, (code + tl.where(m < 0, 128.0, 0.0)).to(tl.uint8), mask=first[:, None])
        scale = tl.max(v, 1)
        tl.store(v_scale_ptr + row, scale, mask=first)
        share = tl.maximum(v / tl.maximum(scale, 1e-38)[:, None], 2.539036173e-10)  # 2^(-255 / 8)
        tl.store(v_ptr + place, _code(share, _uniform(digits_v), 255.0).to(tl.uint8), mask=first[:, None])
    else:
        tl.store(m_ptr + place, _bits_rounded(m, digits_m).to(m_ptr.dtype.element_ty), mask=inside)
        tl.store(v_ptr + place, _bits_rounded(v, digits_v).to(v_ptr.dtype.element_ty), mask=inside)


def update(p: Tensor, gradient: Tensor, state: dict[str, Tensor], facts: dict[str, float], seed: int) -> None:
    eight = "exp_avg_scale" in state
    m, v = state["exp_avg"], state["exp_avg_sq"]
    scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"]) if eight else (m, v)
    assert p.is_contiguous()
    programs = triton.cdiv(p.numel(), BLOCK * _BLOCKS)
    _update_kernel[(programs,)](
        p, gradient.contiguous(), m, v, *scales, p.numel(), facts["lr"], facts["decay"], facts["one"], facts["two"],
        facts["correction"], facts["eps"], seed % 2**31, EIGHT=eight, ROUNDS=p.dtype.itemsize == 2, ROWS=_BLOCKS,
        WIDTH=BLOCK, num_warps=4,
    )  # fmt: skip
