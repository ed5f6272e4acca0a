"""PyTorch's allocator on a GPU: set up before it is first asked, and what there is to say when it has no more.

Rows differ in size, and the usual segments of fixed size cannot serve a larger row with what smaller ones left: on an
80 GiB GPU 78 were held where 61 to 67 were given out, and the next larger row was out of memory. Segments that expand
hold about what is given out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it must not be there before the environment is
    import torch

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""All that PyTorch reads; the first one that is set is the only one that counts."""
CONTEXT = int(0.81e9)
"""Bytes of a process on a GPU outside the allocator: the driver's context, libraries' workspaces, kernels. On an H200
0.79e9 to 0.80e9 in 30 runs (bench/planning.py)."""
_OWN = 2**30, 0.05
"""Bytes, and a share of the GPU: so much more than that may be this process's own, NCCL's buffers or modules, say."""


def prepare_allocator(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let segments expand, unless the user has set the allocator up in any way.

    PyTorch reads it once, when CUDA starts: later it changes nothing. Only Linux has such segments; elsewhere PyTorch
    would warn of them.
    """
    if sys.platform == "linux" and not any(name in environment for name in NAMES):
        environment[NAMES[0]] = "expandable_segments:True"


def held_by_others() -> str:
    """Why this process's GPU has less than its size, as part of a sentence; empty where other processes hold nothing.

    A run that a kill left behind, or somebody else's: PyTorch's error has it somewhere in its fifth sentence.
    """
    import torch

    if not torch.cuda.is_available():
        return ""
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # where this is to explain an error, it must not be another one
        return ""
    others = total - free - torch.cuda.memory_reserved() - CONTEXT
    if others <= _OWN[0] + _OWN[1] * total:
        return ""
    return f"other processes hold {others / 2**30:.1f} of its {total / 2**30:.1f} GiB, nvidia-smi names them"


def shortage(error: torch.OutOfMemoryError) -> str:
    """What the allocator said, in short, and what it cannot say in short."""
    said = str(error).split(". ")[0]
    return "; ".join(part for part in (said, held_by_others()) if part)
