"""Launches of Triton kernels without Triton's search for the compiled form, which costs the host more than the launch.

A row launches some thousand kernels. For each, Triton binds arguments, asks every one how it specialises, joins the
answers into a string and looks that up: 12 microseconds of an AMD EPYC, where a short key takes 5. A layer asks for the
same few forms again and again, so that such a key serves.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache, reduce
from operator import attrgetter, methodcaller, or_
from typing import Any

import triton
from torch import Tensor

_dtype = attrgetter("dtype")
_address = methodcaller("data_ptr")


@lru_cache(maxsize=1)
def _knows_launcher() -> bool:
    """Whether this Triton's compiled kernels are called as here; another one's are left to its own call.

    For AMD's GPUs it also compiles by whether a tensor's storage is within 2 GB, which is not part of the key here.
    """
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    backend = triton.runtime.driver.active.get_current_target().backend
    return backend == "cuda" and (3, 6) <= (major, minor) < (3, 10)


class Launch:
    """A Triton kernel whose arguments are pointers, then numbers that change from call to call, then others, then
    constants.

    The kernel must not be specialised on the values of those that change (`do_not_specialize`); all others are part of
    the key.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        """
        Args:
            kernel: under `triton.jit`.
            options: of its compilation.
        """
        self.kernel, self.options = kernel, options
        self._known: dict[Hashable, tuple[Any, Any, Any]] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        pointers: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        constants: tuple[Hashable, ...],
        num_warps: int,
        changing: tuple[int, ...] = (),
    ) -> None:
        """Launch it on the device of the first pointer, which must be the current one.

        Args:
            constants: in the order of the kernel's signature.
        """
        place = pointers[0].get_device()
        key = (place, num_warps, numbers, constants, *map(_dtype, pointers))
        found = self._known.get(key)
        # Compiled forms differ by whether addresses are multiples of 16 and whether a number needs 64 bits. Those in
        # `_known` are of the usual case; any other goes the long way.
        usual = not reduce(or_, map(_address, pointers)) & 15 and max(changing, default=0) < 2**31
        if found is None or not usual:
            compiled = self.kernel[grid](
                *pointers, *changing, *numbers, *constants, num_warps=num_warps, **self.options
            )
            if usual and compiled is not None and _knows_launcher():
                self._known[key] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, function, packed = found
        stream = triton.runtime.driver.active.get_current_stream(place)
        run(
            *grid, 1, stream, function, packed, None, None, None, *pointers, *changing, *numbers, *constants
        )  # fmt: skip
