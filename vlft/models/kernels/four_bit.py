"""Weights of four bits as matrices to multiply with: bitsandbytes' NF4 (QLoRA, Dettmers et al. 2023).

Blocks of 64 values share a scale, and the scales of 256 blocks, of eight bits each, another. bitsandbytes makes the
scales, adds their mean and makes the weight in three launches and two trips through PyTorch's registry, for every
weight of every layer of every row, twice: a quarter of all launches of `qlora`. On a GPU one kernel does it here, the
same bits. bitsandbytes itself is the reference, and runs wherever that kernel does not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlft.models.kernels import pointwise


def dequantize(packed: Tensor, state: Any, out_OD: Tensor) -> None:
    """
    Args:
        packed: two values a byte, in any dtype.
        state: bitsandbytes' `QuantState` of it.
        out_OD: where the weight goes, in its dtype.
    """
    from bitsandbytes import functional as bnb

    if not (out_OD.is_cuda and state.dtype == out_OD.dtype and out_OD.is_contiguous()):
        out_OD.copy_(bnb.dequantize_4bit(packed, state))
    elif (kernels := pointwise.kernels()) is not None and _has_kernel(packed, state, out_OD):
        scales = state.state2
        kernels.dequantize_4bit(
            packed, state.absmax, scales.code, scales.absmax, state.offset, state.code, out_OD, state.blocksize,
            scales.blocksize,
        )  # fmt: skip
    else:
        bnb.dequantize_4bit(packed, state, out=out_OD)


def _has_kernel(packed: Tensor, state: Any, out_OD: Tensor) -> bool:
    if state.quant_type != "nf4" or not state.nested or 2 * packed.nbytes != out_OD.numel():
        return False
    # It reads words of four bytes; a sharding engine's views may begin anywhere.
    return packed.is_contiguous() and (packed.nbytes | packed.data_ptr()) % 4 == 0
