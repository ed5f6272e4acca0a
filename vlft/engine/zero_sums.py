"""How ZeRO-2's gradients are summed over the ranks while the backward pass goes on: where they lie.

DeepSpeed gathers gradients in buckets. Each bucket it divides, copies, sends whole to all ranks, copies back, casts
and adds to the fp32 sums of its owner: four times the bytes that are needed, beside the backward pass's own. Here
every stretch of a bucket goes to the rank that owns it, and is added there as it is. Nor does the host wait for the
last sums: what comes after them on the GPU does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sums_stretches(zero: Any, config: dict[str, Any]) -> bool:
    """Whether these ways stand for what DeepSpeed does with this file: ZeRO-2 with buckets and sums in fp32.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of any stage.
        config: the DeepSpeed file's `zero_optimization`. One that asks for all-reduces itself gets them.
    """
    return (
        bool(getattr(zero, "bit16_groups", None))
        and zero.partition_gradients
        and zero.contiguous_gradients
        and zero.reduce_scatter
        and not (zero.cpu_offload or zero.zenflow or zero.has_moe_layers)
        and zero.sequence_parallel_size == 1
        and zero.communication_data_type == zero.dtype
        and all(zero._use_compact_grad_partition_buffer(group) for group in range(len(zero.bit16_groups)))
        and config.get("use_multi_rank_bucket_allreduce") is not True
    )


class StretchSums:
    """Puts its own functions in the place of DeepSpeed's."""

    def __init__(self, zero: Any) -> None:
        """
        Args:
            zero: one that `sums_stretches`.
        """
        self._zero = zero
        self._rank = torch.distributed.get_rank(zero.dp_process_group)
        self._stretches: dict[int, list[tuple[int, int]]] = {}
        self._epilogue = zero.independent_gradient_partition_epilogue
        zero.average_tensor = self._sum
        zero.independent_gradient_partition_epilogue = self._finish

    @property
    def _stream(self) -> Any:
        """On which gradients are summed beside the backward pass; None: on its own, or on a CPU, which has none."""
        return self._zero.reduction_stream if self._zero.overlap_comm else None

    def _sum(self, bucket_N: Tensor, communication_data_type: torch.dtype) -> None:
        """
        Args:
            bucket_N: gradients behind each other, in the order of DeepSpeed's list of them; or the only one of a weight
                that is larger than a bucket.
        """
        from deepspeed.accelerator import get_accelerator

        stream, bucket = self._stream, self._zero.ipg_buckets[communication_data_type]
        if stream is None:
            self._send_and_add(bucket_N, bucket.params)
            return
        here = get_accelerator().current_stream()
        for filling in bucket.copy_streams or {here}:
            stream.wait_stream(filling)
        here.wait_stream(stream)  # the bucket before this one is filled again from now on
        bucket_N.record_stream(stream)  # nobody holds a large gradient any longer than until it is on its way
        with get_accelerator().stream(stream):
            self._send_and_add(bucket_N, bucket.params)

    def _send_and_add(self, bucket_N: Tensor, params: list[tuple[int, int, int]]) -> None:
        zero, group = self._zero, self._zero.dp_process_group
        bounds: list[tuple[int, int, int]] = []  # owner, begin, end
        sums, sources, at = [], [], 0
        for group_index, position, number in params:
            for owner, size in self._stretches_of(group_index, position, number):
                begin, end = at, at + size
                if bounds and bounds[-1][0] == owner:
                    begin = bounds.pop()[1]
                bounds.append((owner, begin, end))
                if owner == self._rank:
                    sums.append(zero._get_compact_grad_partition_slice(group_index, owner, number, size))
                    sources.append(bucket_N[at:end])
                at = end
        for owner, begin, end in bounds:
            torch.distributed.reduce(bucket_N[begin:end], group=group, group_dst=owner)
        if sums:
            torch._foreach_add_(sums, sources)

    def _stretches_of(self, group: int, position: int, number: int) -> list[tuple[int, int]]:
        """(owner, size) of the stretches of a gradient, in their order."""
        if number not in self._stretches:
            zero = self._zero
            starts = zero.grad_start_offset[group]
            owners = sorted(zero.param_to_partition_ids[group][number], key=lambda owner: starts[owner][number])
            begins = [int(starts[owner][number]) for owner in owners]
            ends = [*begins[1:], zero.bit16_groups[group][position].numel()]
            self._stretches[number] = [
                (owner, end - begin) for owner, begin, end in zip(owners, begins, ends, strict=True)
            ]
        return self._stretches[number]

    def _finish(self) -> None:
        """DeepSpeed's, whose host would wait for all of the GPU's work where sums have a stream of their own."""
        from deepspeed.accelerator import get_accelerator

        zero, stream = self._zero, self._stream
        zero.reduce_ipg_grads()
        if stream is not None:
            get_accelerator().current_stream().wait_stream(stream)
        beside, zero.overlap_comm = zero.overlap_comm, False
        try:
            self._epilogue()
        finally:
            zero.overlap_comm = beside
