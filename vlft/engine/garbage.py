"""Python's search for garbage during a run: without what was there before it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """Inside, what is there now is not looked through again.

    Modules, models and compiled kernels are half a million objects that stay. Python looks through all of them each
    time that a quarter as many have outlived its smaller searches, which takes a fifth of a second or more; on several
    GPUs every rank waits for whichever does. What is made inside is collected as always.
    """
    gc.collect()  # what is frozen as garbage would stay
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
