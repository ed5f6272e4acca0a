"""How ZeRO-2's gradients are summed over the ranks while the backward pass goes on: where they lie.

DeepSpeed gathers gradients in buckets. Each bucket it divides by the ranks, copies and sends whole to all of them,
casts it, adds it to its owner's fp32 sums and copies it back: some 19 bytes of memory a gradient where 5 would do,
beside the backward pass's own. Here each slice of a bucket is reduced to the rank that owns it, and is added there as
it is. Nor does the host wait for the last sums: what comes after them on the GPU does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def can_reduce_slices(zero: Any, config: dict[str, Any]) -> bool:
    """Whether `SliceReduction` does what this DeepSpeed file asks for: ZeRO-2 with buckets, sums in fp32 and no mean.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of any stage.
        config: the file's `zero_optimization`. One that asks for all-reduces itself gets them.
    """
    return (
        bool(getattr(zero, "bit16_groups", None))
        and zero.partition_gradients
        and zero.contiguous_gradients
        and zero.reduce_scatter
        and not zero.gradient_average
        and not (zero.cpu_offload or zero.zenflow or zero.has_moe_layers)
        and zero.sequence_parallel_size == 1
        and zero.communication_data_type == zero.dtype
        and all(zero._use_compact_grad_partition_buffer(group) for group in range(len(zero.bit16_groups)))
        and config.get("use_multi_rank_bucket_allreduce") is not True
    )


class SliceReduction:
    """Puts its own functions in the place of DeepSpeed's."""

    def __init__(self, zero: Any) -> None:
        """
        Args:
            zero: one that `can_reduce_slices`.
        """
        self._zero = zero
        self._rank = torch.distributed.get_rank(zero.dp_process_group)
        self._slices: dict[int, list[tuple[int, int]]] = {}
        """By DeepSpeed's number of the weight."""
        self._epilogue = zero.independent_gradient_partition_epilogue
        zero.average_tensor = self._sum
        zero.independent_gradient_partition_epilogue = self._finish

    @property
    def _stream(self) -> Any:
        """On which gradients are summed beside the backward pass; None: on the backward pass's own, or on a CPU."""
        return self._zero.reduction_stream if self._zero.overlap_comm else None

    def _sum(self, bucket_N: Tensor, communication_data_type: torch.dtype) -> None:
        """
        Args:
            bucket_N: gradients behind each other, in the order of DeepSpeed's list of them; or the only one of a weight
                that is larger than a bucket.
        """
        from deepspeed.accelerator import get_accelerator

        zero, stream = self._zero, self._stream
        bucket = zero.ipg_buckets[communication_data_type]
        if stream is None:
            self._reduce_and_add(bucket_N, bucket.params)
            return
        current = get_accelerator().current_stream()
        for producer in bucket.copy_streams or {current}:
            stream.wait_stream(producer)
        current.wait_stream(stream)  # the bucket before this one is filled again from now on
        if communication_data_type in zero.extra_large_param_to_reduce:
            bucket_N.record_stream(stream)  # DeepSpeed lets go of it as soon as it is on its way
        with get_accelerator().stream(stream):
            self._reduce_and_add(bucket_N, bucket.params)

    def _reduce_and_add(self, bucket_N: Tensor, params: list[tuple[int, int, int]]) -> None:
        """
        Args:
            params: of each gradient, the group, its place in that, and DeepSpeed's number of the weight.
        """
        zero, at = self._zero, 0
        bounds: list[tuple[int, int, int]] = []  # owner, begin, end; neighbours of one owner are one
        sums, sources = [], []
        for group, index, param_id in params:
            for owner, size in self._slices_of(group, index, param_id):
                begin, end = at, at + size
                if owner == self._rank:
                    sums.append(zero._get_compact_grad_partition_slice(group, owner, param_id, size))
                    sources.append(bucket_N[begin:end])
                if bounds and bounds[-1][0] == owner:
                    begin = bounds.pop()[1]
                bounds.append((owner, begin, end))
                at = end
        assert at == len(bucket_N)
        for owner, begin, end in bounds:
            torch.distributed.reduce(bucket_N[begin:end], group=zero.dp_process_group, group_dst=owner)
        if sums:
            torch._foreach_add_(sums, sources)

    def _slices_of(self, group: int, index: int, param_id: int) -> list[tuple[int, int]]:
        """(owner, size) of the slices of a gradient, in their order."""
        if param_id not in self._slices:
            zero = self._zero
            starts = zero.grad_start_offset[group]
            owners = sorted(zero.param_to_partition_ids[group][param_id], key=lambda owner: starts[owner][param_id])
            begins = [int(starts[owner][param_id]) for owner in owners]
            ends = [*begins[1:], zero.bit16_groups[group][index].numel()]
            self._slices[param_id] = [
                (owner, end - begin) for owner, begin, end in zip(owners, begins, ends, strict=True)
            ]
        return self._slices[param_id]

    def _finish(self) -> None:
        """DeepSpeed's, whose host would wait for all of the GPU's work where sums have a stream of their own."""
        from deepspeed.accelerator import get_accelerator

        zero, stream = self._zero, self._stream
        zero.reduce_ipg_grads()
        if stream is not None:
            get_accelerator().current_stream().wait_stream(stream)
        overlap, zero.overlap_comm = zero.overlap_comm, False
        try:
            self._epilogue()
        finally:
            zero.overlap_comm = overlap
