"""PyTorch's allocator on a GPU, set up before it is first asked.

Rows differ in size, and the usual segments of fixed size cannot serve a larger row with what smaller ones left: on an
80 GiB GPU 78 were held where 61 to 67 were given out, and the next larger row was out of memory. Segments that expand
hold about what is given out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""All that PyTorch reads; the first one that is set is the only one that counts."""


def prepare_allocator(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let segments expand, unless the user has set the allocator up in any way.

    PyTorch reads it once, when CUDA starts: later it changes nothing. Only Linux has such segments; elsewhere PyTorch
    would warn of them.
    """
    if sys.platform == "linux" and not any(name in environment for name in NAMES):
        environment[NAMES[0]] = "expandable_segments:True"
