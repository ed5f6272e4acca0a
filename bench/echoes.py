"""Ranks that are not there: collectives of one process with others that always say what it says.

For what one rank's host and GPU do: bench/one_rank.py. What is gathered from the others is a copy of what this rank
has, and sums are this rank's times their number. On a GPU a collective first keeps its stream waiting, on one of the
processors, for as long as the bytes take that go to this rank or from it: on the stream that NCCL would take. `meet` is
for a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future

CLOCK_GHZ = 1.7
"""Of an H200's processors at work."""


class Echoes(dist.ProcessGroup):
    """Rank 0 of `ranks`."""

    def __init__(self, ranks: int, wire: float) -> None:
        """
        Args:
            wire: 10^9 bytes a second, to and from a rank; 0: no time.
        """
        super().__init__(0, ranks)
        self._ranks, self._wire = ranks, wire
        self._own: torch.cuda.Stream | None = None

    def size(self) -> int:
        return self._ranks

    def getBackendName(self) -> str:
        return "echo"

    @property
    def group_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[self])

    def _carry(self, size: float, opts: Any, like: Tensor, work: Callable[[], None]) -> Any:
        """`work` behind a wait for `size` bytes."""
        if like.device.type != "cuda":
            work()
            return _done(like)
        current = torch.cuda.current_stream(like.device)
        stream = current
        if getattr(opts, "asyncOp", True):
            stream = self._own = self._own or torch.cuda.Stream(like.device)
            stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if self._wire:
                torch.cuda._sleep(int(size / self._wire * CLOCK_GHZ))
            work()
            return _done(like)

    def _add_up(self, tensors: Sequence[Tensor], opts: Any) -> None:
        if opts.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.mul_(self._ranks)

    def _fill(self, output: Tensor, part: Tensor) -> None:
        for place in output.view(-1).chunk(self._ranks):
            if place.data_ptr() != part.data_ptr():
                place.copy_(part.view(-1))

    @property
    def _of_others(self) -> float:
        return (self._ranks - 1) / self._ranks

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._carry(
            2 * self._of_others * bytes_of(tensors), opts, tensors[0], lambda: self._add_up(tensors, opts)
        )

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._carry(bytes_of(tensors), opts, tensors[0], lambda: self._add_up(tensors, opts))

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._carry(bytes_of(tensors), opts, tensors[0], lambda: None)

    def barrier(self, opts: Any = None) -> Any:  # noqa: ARG002  (PyTorch gives it)
        return _done(torch.zeros(1))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        def copy() -> None:
            for output in outputs[0]:
                output.copy_(inputs[0])

        return self._carry((self._ranks - 1) * bytes_of(inputs), opts, inputs[0], copy)

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        return self.all_gather_single_coalesced([output], [given], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        def copy() -> None:
            for output, given in zip(outputs, inputs, strict=True):
                self._fill(output, given)

        return self._carry((self._ranks - 1) * bytes_of(inputs), opts, inputs[0], copy)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        def scatter() -> None:
            for output, given in zip(outputs, inputs, strict=True):
                output.view(-1).copy_(given.view(-1).chunk(self._ranks)[0])
            self._add_up(outputs, opts)

        return self._carry(self._of_others * bytes_of(inputs), opts, inputs[0], scatter)

    def all_to_all_single(
        self, output: Tensor, given: Tensor, output_sizes: Any = None, input_sizes: Any = None, opts: Any = None
    ) -> Any:
        if output_sizes or input_sizes:
            raise NotImplementedError("parts of unequal sizes")
        mine = given.view(-1).chunk(self._ranks)[0]
        return self._carry(self._of_others * bytes_of([given]), opts, given, lambda: self._fill(output, mine))

    # Their names in torch 2.11.
    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _done(tensor: Tensor) -> Any:
    cuda = tensor.device.type == "cuda"
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future(devices=[tensor.device] if cuda else None)
    future.set_result([tensor])
    return _create_work_from_future(future)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def meet(ranks: int, wire: float) -> None:
    """Be the first of so many; groups that are made later are of echoes, too."""
    dist.Backend.register_backend(
        "echo", lambda _store, _rank, size, _timeout: Echoes(size, wire), devices=["cpu", "cuda"]
    )
    new_group = dist.new_group

    def of_echoes(ranks: Sequence[int] | None = None, **options: Any) -> Any:
        return new_group(ranks, **options | {"backend": "echo"})

    dist.new_group = of_echoes
    dist.init_process_group("echo", store=dist.HashStore(), rank=0, world_size=ranks)
