"""Padded rows to one long row and back, as flash-attn's module of this name does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def index_first_axis(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


def unpad_input(
    x: Tensor, mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(B, T, ...) and its mask -> the tokens, where they were, borders, the longest, all lengths."""
    if unused_mask is not None:
        raise NotImplementedError("no unused tokens here")
    lengths = mask.sum(-1, dtype=torch.int32)
    index = mask.flatten().nonzero().flatten()
    borders = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[index], index, borders, int(lengths.max()), lengths


def pad_input(x: Tensor, index: Tensor, batch: int, length: int) -> Tensor:
    out = x.new_zeros(batch * length, *x.shape[1:])
    out[index] = x
    return out.view(batch, length, *x.shape[1:])
