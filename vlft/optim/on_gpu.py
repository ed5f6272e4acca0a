"""`rounded.update` of all parameters in one Triton kernel: each value is read once and written once.

A table of addresses says where each parameter's values lie, as in PyTorch's multi-tensor kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vlft.compiler.launch import Launch
from vlft.optim.rounded import BLOCK, Job

_ROWS, _TURNS = 4, 2
"""Blocks that a program works on at once, and how often it does, twice each time."""
_VECTOR = 16
_FACTS = ("lr", "decay", "one", "two", "new_one", "new_two", "correction", "eps")


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
    low = high * 0.9170040432046712  # 2^(-1 / 8)
    keeps = tl.minimum(tl.maximum((share - low) / (high - low), 0.0), 1.0)
    return tl.minimum(above + tl.where(random > keeps, 1.0, 0.0), largest)


@triton.jit
def _values(table_ptr, column: tl.constexpr, kind: tl.constexpr):
    """The pointer in the table. Its values are aligned, which the compiler cannot see."""
    return tl.multiple_of(tl.load(table_ptr + column).to(tl.pointer_type(kind)), 16)


@triton.jit
def _update_kernel(
    table_ptr, facts_ptr, tensor_ptr, first_ptr, divisor_ptr, found_inf_ptr,
    EIGHT: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, MOMENT: tl.constexpr, UNIT: tl.constexpr,
    ROUNDS: tl.constexpr, HALVES: tl.constexpr, SCALES: tl.constexpr, CHECKS: tl.constexpr,
    ROWS: tl.constexpr, TURNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(tensor_ptr + tl.program_id(0))
    table_ptr += tensor * 8
    facts_ptr += tensor * 8
    p_ptr = _values(table_ptr, 0, WEIGHT)
    g_ptr = _values(table_ptr, 1, GRADIENT)
    m_ptr = _values(table_ptr, 2, MOMENT)
    v_ptr = _values(table_ptr, 3, MOMENT)
    rest_ptr = _values(table_ptr, 4, tl.int16)
    m_scale_ptr = _values(table_ptr, 4, tl.float32)
    v_scale_ptr = _values(table_ptr, 5, tl.float32)
    size = tl.load(table_ptr + 6) * UNIT
    seed = tl.load(table_ptr + 7).to(tl.int32)
    lr = tl.load(facts_ptr)
    decay = tl.load(facts_ptr + 1)
    one = tl.load(facts_ptr + 2)
    two = tl.load(facts_ptr + 3)
    new_one = tl.load(facts_ptr + 4)
    new_two = tl.load(facts_ptr + 5)
    correction = tl.load(facts_ptr + 6)
    eps = tl.load(facts_ptr + 7)
    factor = 1.0
    if SCALES:
        factor = 1.0 / tl.load(divisor_ptr)
    if CHECKS:
        size = tl.where(tl.load(found_inf_ptr) == 0.0, size, 0)
    start = tl.load(first_ptr + tl.program_id(0))
    column = tl.arange(0, WIDTH)[None, :]
    for turn in range(TURNS):
        row = start + 2 * turn * ROWS + tl.arange(0, ROWS)
        # One call of the generator for two values, 64 bits each: ten rounds for one would be as much arithmetic as an
        # H100 does while the memory moves (reckoned, not measured).
        one_a, two_a, one_b, two_b = tl.randint4x(seed, (row[:, None] * WIDTH + column).to(tl.int32), n_rounds=7)
        _update_rows(
            p_ptr, rest_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, row, size, lr, decay, one, two, new_one,
            new_two, correction, eps, factor, one_a, two_a, EIGHT, ROUNDS, HALVES, WIDTH,
        )  # fmt: skip
        _update_rows(
            p_ptr, rest_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, row + ROWS, size, lr, decay, one, two,
            new_one, new_two, correction, eps, factor, one_b, two_b, EIGHT, ROUNDS, HALVES, WIDTH,
        )  # fmt: skip


@triton.jit
def _update_rows(
    p_ptr, rest_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, row, size, lr, decay, one, two, new_one, new_two,
    correction, eps, factor, digits_m, digits_v,
    EIGHT: tl.constexpr, ROUNDS: tl.constexpr, HALVES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`digits_m`, `digits_v`: 32 random bits each, of which the moments take the lower 24 and the weight the others."""
    place = row.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = place < size
    first = row.to(tl.int64) * WIDTH < size
    g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32) * factor
    if HALVES:  # as `remainder.join`
        bits = tl.load(p_ptr + place, mask=inside, other=0).to(tl.int32) << 16
        bits += tl.load(rest_ptr + place, mask=inside, other=0).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(p_ptr + place, mask=inside, other=0.0).to(tl.float32)
    digits_w = ((digits_m >> 24) & 0xFF) | ((digits_v >> 16) & 0xFF00)
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
    m = one * m + new_one * g
    v = two * v + new_two * g * g
    w = w - (lr * m / (tl.sqrt(v) * correction + eps) + decay * w)
    if ROUNDS:
        w = _bits_rounded(w, digits_w)
    if HALVES:  # as `remainder.split`
        bits = w.to(tl.int32, bitcast=True)
        upper = tl.where(w == w, (bits + 0x8000) >> 16, 0x7FFF)
        tl.store(p_ptr + place, upper.to(tl.int16), mask=inside)
        tl.store(rest_ptr + place, (bits - (upper << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(p_ptr + place, w.to(p_ptr.dtype.element_ty), mask=inside)
    if EIGHT:
        size_m = tl.abs(m)
        scale = tl.max(size_m, 1)
        tl.store(m_scale_ptr + row, scale, mask=first)
        # rounded.SMALLEST, as a constant must stand here.
        share = size_m / tl.maximum(scale, 2e-38)[:, None]
        random = _uniform(digits_m)
        smallest = 1.814586052e-05  # 2^(-126 / 8)
        code = _code(tl.maximum(share, smallest), random, 126.0)
        code = tl.where((share < smallest) & (random * smallest >= share), 127.0, code)
        tl.store(m_ptr + place, (code + tl.where(m < 0, 128.0, 0.0)).to(tl.uint8), mask=first[:, None])
        scale = tl.max(v, 1)
        tl.store(v_scale_ptr + row, scale, mask=first)
        share = tl.maximum(v / tl.maximum(scale, 2e-38)[:, None], 2.539036173e-10)  # 2^(-255 / 8)
        tl.store(v_ptr + place, _code(share, _uniform(digits_v), 255.0).to(tl.uint8), mask=first[:, None])
    else:
        if m_ptr.dtype.element_ty != tl.float32:
            m = _bits_rounded(m, digits_m)
            v = _bits_rounded(v, digits_v)
        tl.store(m_ptr + place, m.to(m_ptr.dtype.element_ty), mask=inside)
        tl.store(v_ptr + place, v.to(v_ptr.dtype.element_ty), mask=inside)


@lru_cache(maxsize=8)
def _map(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each program: which tensor, and the first of its blocks."""
    step = 2 * _ROWS * _TURNS
    programs = [triton.cdiv(triton.cdiv(size, BLOCK), step) for size in sizes]
    tensor = np.repeat(np.arange(len(sizes), dtype=np.int32), programs)
    first = np.concatenate([np.arange(n, dtype=np.int32) * step for n in programs])
    return torch.from_numpy(tensor).to(device), torch.from_numpy(first).to(device)


_KINDS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
}


def update(jobs: Sequence[Job], grad_scale: Tensor | None, found_inf: Tensor | None = None) -> None:
    """Of parameters of one device, and of one kind of states."""
    by_kind: dict[tuple[torch.dtype, torch.dtype, bool, int], list[Job]] = {}
    for job in jobs:
        # Told that sizes are multiples of a vector's, the compiler loads vectors behind the mask.
        unit = 1 if job.p.numel() % _VECTOR else _VECTOR
        by_kind.setdefault((job.p.dtype, job.gradient.dtype, job.remainder is not None, unit), []).append(job)
    for (weight, gradient, halves, unit), some in by_kind.items():
        _update(some, torch.int16 if halves else weight, gradient, unit, grad_scale, found_inf)


def _update(
    jobs: Sequence[Job],
    weight: torch.dtype,
    gradient: torch.dtype,
    unit: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """`weight`: int16 for bits of bf16 with a remainder."""
    device = jobs[0].p.device
    halves = weight == torch.int16
    eight = "exp_avg_scale" in jobs[0].state
    kept = [_aligned(job.gradient) for job in jobs]  # copies must outlive the launch
    moments = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    columns = [[job.p.data_ptr() for job in jobs], [g.data_ptr() for g in kept]]
    columns += [[job.state[name].data_ptr() for job in jobs] for name in moments[: 4 if eight else 2]]
    if halves:
        columns.append([job.remainder.data_ptr() for job in jobs if job.remainder is not None])
    rows = np.zeros((len(jobs), 8), np.int64)
    rows[:, : len(columns)] = np.array(columns).T
    rows[:, 6] = [job.p.numel() // unit for job in jobs]
    rows[:, 7] = [job.seed % 2**31 for job in jobs]
    assert all(job.p.is_contiguous() for job in jobs)
    assert not (rows[:, : 5 if halves else 4] % 16).any()
    table = torch.from_numpy(rows)
    # Parameters of one group and step share theirs.
    shared = {id(job.facts): job.facts for job in jobs}
    known = {key: [facts[name] for name in _FACTS] for key, facts in shared.items()}
    numbers = torch.tensor([known[id(job.facts)] for job in jobs], dtype=torch.float32)
    if device.type == "cuda":
        table, numbers = (
            table.pin_memory().to(device, non_blocking=True),
            numbers.pin_memory().to(device, non_blocking=True),
        )
    tensor, first = _map(tuple(job.p.numel() for job in jobs), device)
    _update_kernel[(len(tensor),)](
        table, numbers, tensor, first, numbers if grad_scale is None else grad_scale,
        numbers if found_inf is None else found_inf, EIGHT=eight,
        WEIGHT=_KINDS[weight], GRADIENT=_KINDS[gradient], MOMENT=_KINDS[jobs[0].state["exp_avg"].dtype],
        UNIT=unit, ROUNDS=weight.itemsize == 2 and not halves, HALVES=halves, SCALES=grad_scale is not None,
        CHECKS=found_inf is not None, ROWS=_ROWS, TURNS=_TURNS, WIDTH=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def _add_up_kernel(total_ptr, more_ptr, seed, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    x = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(more_ptr + place, mask=inside, other=0.0).to(tl.float32)
    exact = (x - x) == 0.0  # neither infinite nor NaN, which other digits could turn into a number
    x = tl.where(exact, _bits_rounded(x, tl.randint(seed, place.to(tl.int32), n_rounds=7)), x)
    tl.store(total_ptr + place, x.to(total_ptr.dtype.element_ty), mask=inside)


_add_up = Launch(_add_up_kernel)


def add_up(total: Tensor, more: Tensor, seed: int) -> None:
    size, block = total.numel(), 1024
    _add_up((-(-size // block), 1), (total, more), (size,), (block,), 4, changing=(seed % 2**31,))


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
