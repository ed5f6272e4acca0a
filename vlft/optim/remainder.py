"""An fp32 weight in two halves of 16 bits: itself in bf16, which products take as it is, and what bf16 cuts off.

Beside masters in fp32, products in bf16 need casts of them: for every row, and twice where they are too large to be
kept. Together the halves are the same 32 bits, so that nothing is rounded in a step, and nothing is cast for a row.
(TransformerEngine's FusedAdam knows the idea as `store_param_remainders`.)

The upper half is the nearest bf16, of two that are equally near the one farther from zero: a tie to the even digit, as
a cast has it, would need a 17th bit for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NAME = "fp32_remainder"


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16, int16)."""
    bits = x.contiguous().view(torch.int32)
    # Of a NaN the sum would be another number, which products would take for a weight like any other.
    upper = torch.where(x.isnan(), 0x7FFF, (bits + 0x8000) >> 16)
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 numbers that `split` was given."""
    return ((upper.contiguous().view(torch.int16).to(torch.int32) << 16) + lower).view(torch.float32)


def keep_remainder(p: nn.Parameter) -> None:
    """Let an fp32 weight be in bf16, with its remainder beside it. Its gradients are in fp32 still."""
    assert p.dtype == torch.float32
    assert p.grad is None
    p.data, remainder = split(p.data)
    setattr(p, _NAME, remainder)
    p.grad_dtype = torch.float32


def remainder_of(p: Tensor) -> Tensor | None:
    return getattr(p, _NAME, None)


def master_of(p: Tensor) -> Tensor:
    """The whole weight: in fp32 where it has a remainder."""
    lower = remainder_of(p)
    return p.detach() if lower is None else join(p.detach(), lower)


def master_dtype(p: Tensor) -> torch.dtype:
    """Of `master_of`."""
    return p.dtype if remainder_of(p) is None else torch.float32
