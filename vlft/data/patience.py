"""Waiting out a network file system that is away for a moment, rather than losing the samples that lie on it."""

from __future__ import annotations

import errno
import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "ENETDOWN", "ENETUNREACH", "ENETRESET",
        "EHOSTDOWN", "EHOSTUNREACH", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN", "ESHUTDOWN", "EPIPE",
    )
    if hasattr(errno, name)
)  # fmt: skip
"""Errors that NFS, SMB, FUSE and cloud disks give while they are away. A missing file is not among them."""
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try."""


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    return isinstance(error, OSError) and error.errno in PASSING


def patient(function: Callable[P, T]) -> Callable[P, T]:
    """Call again, ever later, while the error is one that passes; the last such error is the caller's."""

    @functools.wraps(function)
    def trying(*args: P.args, **kwargs: P.kwargs) -> T:
        for delay in DELAYS:
            try:
                return function(*args, **kwargs)
            except OSError as error:
                if not passes(error):
                    raise
            time.sleep(delay)
        return function(*args, **kwargs)

    return trying
