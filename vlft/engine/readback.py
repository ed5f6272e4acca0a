"""Numbers from the device, without a wait for what it is asked to do after them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def readback(x: Tensor) -> Callable[[], Tensor]:
    """Ask for a copy of `x` on the CPU, now; what is returned waits for it, and gives it.

    `x.cpu()` waits until the device has done all that it was asked for before. A norm that is read by it behind the
    optimizer's step costs the time until the next step's first launches, in which the device has nothing to do.
    """
    if x.device.type != "cuda":
        return x.cpu
    here = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    here.copy_(x, non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record(torch.cuda.current_stream(x.device))

    def read() -> Tensor:
        there.synchronize()
        return here

    return read
