"""Whether Triton's kernels can run on this machine's GPU: found out once, by one that adds 1.

Triton builds a small driver in C at its first launch, and calls ptxas for every kernel. Where one of these is missing
(slim containers have no C compiler) the first launch of a step would end the training. Whoever has kernels asks here,
and runs plain PyTorch functions where there is trouble: norms, activations and dropout, attention in short windows,
the optimizers without fp32 masters; for 4-bit weights bitsandbytes' kernels.

`launch.py` launches those kernels of which a row needs thousands.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

# a * b + c in one rounding, as ever. Unset, Triton 3.9 warns in every run that it means to change that.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@lru_cache(maxsize=1)
def trouble() -> str:
    """Why Triton's kernels cannot run here; empty where they can."""
    try:
        with _as_compiled_here():
            found = try_one()
    except Exception as error:  # compilers, linkers, drivers: each has errors of its own
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].rstrip(": .")
    return "" if found == 2.0 else f"a kernel that adds 1 to 1 gave {found}"


def try_one() -> float:
    """1 + 1, by a kernel."""
    from vlft.compiler.on_gpu import one_and_one

    return one_and_one()


@contextmanager
def _as_compiled_here() -> Iterator[None]:
    """Without a C compiler, an empty cache: one that a richer machine has filled (a home that both mount) would serve
    the kernel above, and fail at the first that it does not hold."""
    named = os.environ.get("CC")
    if any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"])):  # as Triton looks for one
        yield
        return
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


def said(why: str) -> str:
    """One line for the start of a run."""
    return (
        f"Triton cannot compile kernels here ({why}): norms, activations, dropout, attention in short windows and "
        "--optim adamw_bf16 and adamw_8bit run as plain PyTorch functions, 4-bit weights by bitsandbytes' kernels, "
        "which takes longer; a C compiler mends it."
    )
