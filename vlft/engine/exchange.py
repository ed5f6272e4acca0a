"""Sums over the ranks of a unit's gradients, for FSDP2: sent in the dtype that they have, added in fp32.

A collective that sums has one dtype. Of bf16 gradients it would lose digits, or be told to take fp32: twice the bytes,
which are first written and then sent. Here each rank sends the others their shares as they are, and adds what it got in
fp32: the same sums, in the order of the ranks, for half of that. (NCCL's ring sends as many numbers.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def adds_up(unit: FSDPModule) -> None:
    """This unit's gradients become the ranks' sums, not their mean: a row's share of the loss is of all ranks."""
    unit.set_custom_reduce_scatter(Exchange())  # type: ignore[arg-type]  # the class that it asks for is private
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


class Exchange:
    """A reduce-scatter, as `FSDPModule.set_custom_reduce_scatter` wants one; one object serves one unit."""

    def __init__(self) -> None:
        self._receives = False
        """The next that FSDP allocates is what comes out."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What goes in, then what comes out, in turn: both are asked for in the dtype of the gradients."""
        wide = torch.promote_types(dtype, torch.float32) if self._receives else dtype
        self._receives = not self._receives
        return torch.empty(math.prod(size), dtype=wide, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """
        Args:
            output_tensor: (N / ranks,), wide.
            input_tensor: (N,): the shares of all ranks, one after the other.
            op: a sum; that it is one is said to FSDP, too.
        """
        assert op == torch.distributed.ReduceOp.SUM
        assert not async_op
        # Did another PyTorch allocate in another order, sums would lose their digits in silence.
        assert output_tensor.dtype == torch.promote_types(input_tensor.dtype, torch.float32)
        received = torch.empty_like(input_tensor)
        torch.distributed.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), 0, dtype=output_tensor.dtype, out=output_tensor)
