"""AdamW as one kernel, and for weights in bf16 without fp32 masters: what does not fit is rounded stochastically.

An update at rate 2e-5 is smaller than half a digit of most bf16 weights, so that rounding to nearest would lose it; up
or down with the chances that keep the mean, it arrives on average (Gupta et al. 2015). The same holds for moments: what
a step adds to the second one is a thousandth of it, below half a digit of eight bits and of bf16 alike.

States of eight bits are logarithms, in blocks of 256 with one scale each (blocks: Dettmers et al. 2022): eight values
to a doubling, so that a small weight's moments are as exact as its large neighbour's. Linear ones would be all noise
there, and Adam divides one moment by the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from vlft import compiler
from vlft.optim.remainder import join, remainder_of, split

BLOCK = 256
DOUBLING = 8
"""Codes to a factor of two."""
SMALLEST = 2e-38
"""That a block's scale is taken for where all of it is zero: above the smallest normal number of fp32.

A constant below is one of fp64 to Triton 3.6, which then computes all that follows in fp64, logarithms too."""
M_CODES, V_CODES = 127, 255
"""The largest code of |m|, whose sign takes a bit, and of v. m: a range of 2^16, below which zero; v: of 2^32."""

States = Literal["fp32", "bf16", "8bit"]
"""fp32 ones are of fp32 weights, in one piece or with a remainder; nothing is rounded then."""


class KernelAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019), on a GPU by one kernel, which moves memory 1.3 times as fast as torch's own.

    The random digits are a function of the step and of the parameter's place, so that a resume draws the same.
    """

    def __init__(
        self,
        params: Iterable[Any],
        states: States,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.states = states
        # As torch's fused AdamW has them. To clip here saves a pass over all gradients.
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._counts = torch.zeros(0)
        """Steps of each parameter, of which each state has its own as a view: to count them one by one takes the host
        4 ms of a model with 824, in which the device may wait."""
        self._counted = torch.zeros(0, dtype=torch.int64)
        """Places of those that the last step counted."""

    def state_bytes(self, p: Tensor) -> int:
        """Of one parameter's moments."""
        if self.states == "8bit":
            return 2 * p.numel() + 8 * math.ceil(p.numel() / BLOCK)
        return (8 if self.states == "fp32" else 4) * p.numel()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Of all parameters that have a gradient, which is divided by `grad_scale` on its way where that is set.

        Where `found_inf` is set and is not zero, all but the count of steps stays as it is: to look at it would wait
        for the device. Whoever set it calls `uncount` then.
        """
        assert closure is None
        places = self._places()
        steps, known = self._counts.tolist(), dict[tuple[int, float], dict[str, float]]()
        jobs = []
        for place, group, p in places:
            step = steps[place] + 1
            if (key := (id(group), step)) not in known:
                known[key] = facts(group, step)
            seed = (place + 1) * 0x9E3779B1 + int(step)
            jobs.append(Job(p, p.grad, self.state[p], known[key], seed, remainder_of(p)))
        self._counted = torch.tensor([place for place, _, _ in places], dtype=torch.int64)
        if not jobs:
            return
        if all(job.p.is_cuda for job in jobs) and (fast := _on_gpu()) is not None:
            fast.update(jobs, self.grad_scale, self.found_inf)
        elif self.found_inf is None or not self.found_inf:
            for job in jobs:
                update(job, self.grad_scale)
        self._counts[self._counted] += 1

    def uncount(self) -> None:
        """The last step was none."""
        self._counts[self._counted] -= 1
        self._counted = self._counted[:0]

    def _places(self) -> list[tuple[int, dict[str, Any], Any]]:
        """(place among all, group, parameter) of those that have a gradient; each has its state afterwards."""
        every = [(group, p) for group in self.param_groups for p in group["params"]]
        if len(self._counts) != len(every):
            self._counts = torch.zeros(len(every))
        found = [(place, group, p) for place, (group, p) in enumerate(every) if p.grad is not None]
        for place, _, p in found:
            state = self.state[p]
            if not state:
                state |= self._fresh(p)
            if state["step"]._base is not self._counts:  # fresh, or of a checkpoint
                self._counts[place] = state["step"]
                state["step"] = self._counts[place]
        return found

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        step = torch.tensor(0.0)
        if self.states != "8bit":
            kind = torch.float32 if self.states == "fp32" else torch.bfloat16
            m, v = (torch.zeros_like(p, dtype=kind) for _ in range(2))
            return {"step": step, "exp_avg": m, "exp_avg_sq": v}
        blocks = math.ceil(p.numel() / BLOCK)
        codes = (torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=p.device) for _ in range(2))
        scales = (torch.zeros(blocks, device=p.device) for _ in range(2))
        names = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
        return {"step": step, **dict(zip(names, (*codes, *scales), strict=True))}


@dataclass(frozen=True)
class Job:
    """One parameter's step."""

    p: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    facts: dict[str, float]
    seed: int
    remainder: Tensor | None = None
    """of an fp32 weight, where `p` is its upper half (`vlft.optim.remainder`)"""


def facts(group: Mapping[str, Any], step: float) -> dict[str, float]:
    """The numbers of one step, by a group's options."""
    one, two = group["betas"]
    return {
        "lr": group["lr"] / (1 - one**step), "decay": group["lr"] * group["weight_decay"], "one": one, "two": two,
        "new_one": 1 - one, "new_two": 1 - two,  # in fp32, 1 - 0.999 is 1e-5 off
        "correction": 1 / math.sqrt(1 - two**step), "eps": group["eps"],
    }  # fmt: skip


def update(job: Job, grad_scale: Tensor | None = None) -> None:
    """One parameter's step, in place: weight and moments."""
    p, state, number = job.p, job.state, job.facts
    generator = torch.Generator(p.device).manual_seed(job.seed)

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, device=like.device)

    eight = "exp_avg_scale" in state
    g = _blocks(job.gradient) if eight else job.gradient.float()
    if grad_scale is not None:
        g = g / grad_scale.to(g.device)
    whole = p if job.remainder is None else join(p, job.remainder)
    w = _blocks(whole) if eight else whole.float()
    m = decode_m(state["exp_avg"], state["exp_avg_scale"]) if eight else state["exp_avg"].float()
    v = decode_v(state["exp_avg_sq"], state["exp_avg_sq_scale"]) if eight else state["exp_avg_sq"].float()
    m = number["one"] * m + number["new_one"] * g
    v = number["two"] * v + number["new_two"] * g.square()
    # One difference: 1 - rate * decay, rounded by itself in fp32, is a tenth off at a rate of 2e-5.
    w = w - (number["lr"] * m / (v.sqrt() * number["correction"] + number["eps"]) + number["decay"] * w)
    if eight:
        for moment, encode, new in (("exp_avg", encode_m, m), ("exp_avg_sq", encode_v, v)):
            codes, scale = encode(new, draw(new))
            state[moment].copy_(codes)
            state[f"{moment}_scale"].copy_(scale)
        w = w.flatten()[: p.numel()].view_as(p)
    else:
        for moment, new in (("exp_avg", m), ("exp_avg_sq", v)):
            state[moment].copy_(rounded(new, draw(new)) if state[moment].dtype == torch.bfloat16 else new)
    if job.remainder is not None:
        upper, lower = split(w)
        p.copy_(upper)
        job.remainder.copy_(lower)
        return
    p.copy_(rounded(w, draw(w)) if p.dtype == torch.bfloat16 else w)


PIECE = 1 << 24
"""Numbers that are added up at once where no kernel does it: an embedding's copies in fp32 would be gigabytes."""


@torch.no_grad()
def add_up(total: Tensor, more: Tensor, seed: int) -> None:
    """`total` += `more`, both bf16, rounded stochastically.

    To the nearest, a row's gradient that is smaller than half a digit of the sum before is lost, and with hundreds of
    rows a step the sum stands still. Up or down with the chances that keep the mean, it arrives, without the buffer
    in fp32 (33 GB for 8.3 billion weights) or for what was cut off (17 GB) that would be exact: 7B in one card has
    neither. An addition's error is 0.16% of the sum in the mean square and falls to either side, below what the
    products in bf16 err by in each row's gradient.
    """
    assert total.dtype == torch.bfloat16
    if total.is_cuda and total.is_contiguous() and more.is_contiguous() and (fast := _on_gpu()) is not None:
        fast.add_up(total, more, seed)
        return
    generator = torch.Generator(total.device).manual_seed(seed)
    flat = total.view(-1) if total.is_contiguous() else total.flatten()
    for piece, other in zip(torch.split(flat, PIECE), torch.split(more.flatten(), PIECE), strict=True):
        x = piece.float() + other.float()
        up_or_down = rounded(x, torch.rand(x.shape, generator=generator, device=x.device))
        # The digits that are added could turn a NaN, which must be found, into a number.
        piece.copy_(torch.where(x.isfinite(), up_or_down, x.to(torch.bfloat16)))
    if not total.is_contiguous():
        total.copy_(flat.view(total.shape))


@lru_cache(maxsize=1)
def _on_gpu() -> Any:
    if compiler.trouble():
        return None
    from vlft.optim import on_gpu

    return on_gpu


def _blocks(x: Tensor) -> Tensor:
    flat = x.float().flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def rounded(x: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16, up or down with the chances that keep the mean. `random`: uniform in [0, 1)."""
    digits = (random * 65536).to(torch.int32)
    return ((x.contiguous().view(torch.int32) + digits) & -65536).view(torch.float32).to(torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# Eight bits: a value is its block's largest times 2^(-code / 8)


def _code(share: Tensor, random: Tensor, largest: int) -> Tensor:
    """The code of a share in (0, 1], of the two beside it that one which keeps the mean."""
    exact = -DOUBLING * torch.log2(share)
    above = exact.floor().clamp(0, largest)  # the smaller code is the larger value
    high, low = torch.exp2(-above / DOUBLING), torch.exp2(-(above + 1) / DOUBLING)
    down = random > ((share - low) / (high - low)).clamp(0, 1)
    return (above + down).clamp(max=largest)


def encode_m(m: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """(N, BLOCK) first moments to codes (sign in the highest bit) and (N,) scales."""
    scale = m.abs().amax(1)
    share = m.abs() / scale.clamp(min=SMALLEST).unsqueeze(1)
    # The last code is zero. A share below the smallest is that one or zero, by chance.
    smallest = 2.0 ** (-(M_CODES - 1) / DOUBLING)
    small = share < smallest
    code = _code(share.clamp(min=smallest), random, M_CODES - 1)
    code = torch.where(small & (random * smallest >= share), torch.full_like(code, M_CODES), code)
    return (code + 128 * (m < 0)).to(torch.uint8), scale


def decode_m(codes: Tensor, scale: Tensor) -> Tensor:
    code = (codes & 127).float()
    size = torch.where(code == M_CODES, torch.zeros_like(code), torch.exp2(-code / DOUBLING))
    return torch.where(codes >= 128, -size, size) * scale.unsqueeze(1)


def encode_v(v: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """(N, BLOCK) second moments to codes and (N,) scales. None becomes zero: Adam divides by its root."""
    scale = v.amax(1)
    share = (v / scale.clamp(min=SMALLEST).unsqueeze(1)).clamp(min=2.0 ** (-V_CODES / DOUBLING))
    return _code(share, random, V_CODES).to(torch.uint8), scale


def decode_v(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.exp2(-codes.float() / DOUBLING) * scale.unsqueeze(1)
