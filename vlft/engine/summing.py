"""The sum of the ranks' gradients: after the backward pass, or, of large ones, while it still runs.

What is summed beside a backward pass takes processors from its products, which are laid out for all of them. Over
NVLink the products lose more time by it than the sums take afterwards; a slow connection would make the step wait for
them. How fast it is, is measured once, before the first step.

Not by DistributedDataParallel: a rank without pictures, or one that ran out of memory, would leave the others waiting
in the middle of its buckets, and a second copy of the gradients would lie in them. Here the ranks agree on what is
summed ahead: what had a gradient on any of them in the step before. All sum these, in one order, whatever becomes of
the row: a rank that has none gives zeros, and one that ran out of memory does so, too, before all drop the step and try
again.

What each rank has, and whether it had memory enough, its host knows long before its device has done the work. The
hosts of one machine tell each other, so that they can ask for the sums and the update while the devices are still busy
with the backward pass. Between machines the devices carry it: gloo would have to be told which network joins them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlft.optim import gradient_dtype

LARGE = 1 << 20
"""Elements of a gradient that is summed by itself; smaller ones are joined."""
_BUCKET = 64 << 20
"""Elements of what is joined."""
QUICK = 60e9
"""Bytes of gradients that are summed in a second, from which on all are summed after the backward pass. PCIe gives up
to 25e9. Two H200s over NVLink gave 175e9: 2.7 GB in 0.015 s; beside the backward pass the step took 0.005 s longer
(bench/scaling.py, 3B-lora-ddp)."""
_TRIED = 16 << 20
"""Elements of the tensor whose sum is timed."""


class Summing:
    """Of the gradients of `parameters`, over the ranks."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device, hosts: Any = None) -> None:
        """`hosts`: the group in which ranks tell each other what they have; None: that of their devices."""
        self._parameters = parameters
        self._hosts = hosts
        self._told_on = torch.device("cpu") if self._hosts is not None else device
        # NCCL takes no other as it lies; a gradient has the strides of its parameter.
        self._large = [p for p in parameters if p.numel() >= LARGE and p.is_contiguous()]
        self._ahead: list[nn.Parameter] = []
        """Whose sums begin during the backward pass, in this order; the same on all ranks."""
        self._arrived: dict[nn.Parameter, int] = {}
        """In the last backward pass of this step, and as which."""
        self._running: list[Any] = []
        self._open = False
        self.rate = self._measured(device)
        """Bytes of gradients that are summed in a second; None: not measured, as on a CPU, whose cores do both."""
        self.during = self.rate is None or self.rate < QUICK
        """Large sums begin during the backward pass."""
        for p in self._large if self.during else ():
            p.register_post_accumulate_grad_hook(self._arrive)  # type: ignore[no-untyped-call]

    def _measured(self, device: torch.device) -> float | None:
        if device.type == "cpu":
            return None
        tried = torch.zeros(_TRIED, device=device)
        each = []
        for _ in range(4):  # the first connects, and something may come in between
            torch.accelerator.synchronize(device)
            began = time.perf_counter()
            torch.distributed.all_reduce(tried)
            torch.accelerator.synchronize(device)
            each.append(time.perf_counter() - began)
        took = torch.tensor(min(each), device=self._told_on)
        # All ranks must come to the same choice.
        torch.distributed.all_reduce(took, torch.distributed.ReduceOp.MAX, group=self._hosts)
        return tried.numel() * tried.element_size() / float(took)

    @contextmanager
    def begins(self) -> Iterator[None]:
        """Inside is the last backward pass of a step: what arrives is final."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _arrive(self, p: nn.Parameter) -> None:
        if not self._open:
            return
        if p in self._arrived and any(p is summed for summed in self._ahead[: len(self._running)]):
            raise RuntimeError("a gradient came again in one backward pass, after it was summed over the ranks.")
        self._arrived[p] = len(self._arrived)
        # Autograd may have taken for it the very memory of a gradient that is still on its way to others.
        p.grad = p.grad.clone() if p.grad is not None else None
        for following in self._ahead[len(self._running) :]:
            if following not in self._arrived:
                break
            self._sum_ahead(following.grad)

    def _sum_ahead(self, gradient: Tensor | None) -> None:
        assert gradient is not None
        self._running.append(torch.distributed.all_reduce(gradient, async_op=True))

    def finish(self, fits: bool) -> bool:
        """After the last row of a step. Every rank's gradients are the sums; None where no rank has one.

        Args:
            fits: this rank had memory enough.
        Returns:
            Whether all had; if not, the gradients are of no use.
        """
        zeros: dict[nn.Parameter, Tensor] = {}
        for p in self._ahead[len(self._running) :]:
            if not fits:  # nobody reads them: one at a time, where memory is short
                torch.distributed.all_reduce(_none(p) if p.grad is None else p.grad)
            elif p.grad is None:
                zeros[p] = _none(p)
                self._sum_ahead(zeros[p])
            else:
                self._sum_ahead(p.grad)
        facts = [not fits, *(p.grad is not None for p in self._parameters)]
        has = torch.tensor(facts, dtype=torch.int32, device=self._told_on)
        torch.distributed.all_reduce(has, group=self._hosts)
        for work in self._running:
            work.wait()
        done, self._running = {*self._ahead}, []
        arrived, self._arrived = self._arrived, {}
        short, *somewhere = has.tolist()
        if short:
            return False
        having = [p for p, anywhere in zip(self._parameters, somewhere, strict=True) if anywhere]
        for p in having:
            if p.grad is None:
                p.grad = zeros[p] if p in done else _none(p)
        self._sum([p for p in having if p not in done])
        there = {*having}
        if self.during and (large := {p for p in self._large if p in there}) != done:
            self._ahead = self._in_order(large, arrived)
        return True

    def _in_order(self, large: set[nn.Parameter], arrived: dict[nn.Parameter, int]) -> list[nn.Parameter]:
        """In which they came on the first rank; what did not come there, last."""
        places = torch.tensor([arrived.get(p, len(self._large)) for p in self._large], device=self._told_on)
        torch.distributed.broadcast(places, 0, group=self._hosts)
        place = dict(zip(self._large, places.tolist(), strict=True))
        return sorted([p for p in self._large if p in large], key=lambda p: place[p])  # the same on all ranks

    def _sum(self, parameters: Sequence[nn.Parameter]) -> None:
        alone = {*self._large}
        joined = []
        for p in parameters:
            assert p.grad is not None
            # By itself now too, since the order in which ranks are added may depend on what is joined: a resume begins
            # with nothing ahead, or measures another rate, and must come to the same digits.
            if p in alone:
                torch.distributed.all_reduce(p.grad)
            else:
                joined.append(p.grad)
        for bucket in _buckets(joined):
            flat = torch.cat([g.flatten() for g in bucket])
            torch.distributed.all_reduce(flat)
            parts = torch.split(flat, [g.numel() for g in bucket])
            # All in one launch: one for each would take the host longer than the device.
            torch._foreach_copy_(bucket, [part.view_as(g) for g, part in zip(bucket, parts, strict=True)])


def _none(p: nn.Parameter) -> Tensor:
    """A gradient of zeros, in the dtype of those that others have."""
    return torch.zeros_like(p, dtype=gradient_dtype(p))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, of about `_BUCKET` elements."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
