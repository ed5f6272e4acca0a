"""A GPU that is not there: Triton compiles for it as for an H100, and launches go nowhere but into a list.

For what the host does, not for what is computed: tests of how kernels are launched, and bench/host.py. `install` is for
a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

LAUNCHES: list[tuple[str, tuple[Any, ...]]] = []
"""(kernel's compiled form, what it was launched with), in order"""


class Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.form = f"{metadata.name} {sorted(src.signature.items())} {sorted(src.attrs.items())} {src.constants}"

    def __call__(self, *args: Any) -> None:
        # Past the stream, the function, what is packed for it, and hooks.
        grid, given = args[:3], args[9:]
        LAUNCHES.append((self.form, (*grid, *(g.data_ptr() if isinstance(g, torch.Tensor) else g for g in given))))


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, *_: Any) -> None:
        """There is none."""

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def install() -> None:
    driver.set_active(Driver())
