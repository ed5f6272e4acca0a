"""An all-reduce over all GPUs of this machine, each in a process of its own, before a training hangs in its first one.

A hang cannot be caught inside a process: so these are others, which are ended when their time is over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlft.doctor.findings import Finding

_ELEMENTS = 1 << 24
"""fp32 numbers of the tensor: 64 MiB."""
_REPEATS = 5


@dataclass(frozen=True)
class Reduced:
    """What became of the try."""

    problem: str = ""
    """Empty: the sums were right on every rank."""
    gib_per_second: float = 0.0
    """Bytes of the tensor over the time of one all-reduce."""


def _command(rank: int, world: int, backend: str, store: Path) -> list[str]:
    return [sys.executable, "-m", "vlft.doctor.collective", str(rank), str(world), backend, str(store)]


def all_reduce(
    backend: str, world: int, *, seconds: float = 120.0,
    command: Callable[[int, int, str, Path], list[str]] = _command,
) -> Reduced:  # fmt: skip
    """Start `world` processes, let them sum one tensor, and see what they say.

    Args:
        backend: nccl or gloo.
        seconds: after which all are ended.
        command: words of one rank's process.
    """
    # Ours are the only ranks: what a launcher left in the environment would be taken for theirs.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    with tempfile.TemporaryDirectory(prefix="vlft-doctor-") as folder:
        store, started, logs = Path(folder) / "store", [], []
        try:
            for rank in range(world):
                log = (Path(folder) / f"{rank}.log").open("w+")
                logs.append(log)
                words = command(rank, world, backend, store)
                started.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=env))
            end = time.monotonic() + seconds
            while any(p.poll() is None for p in started) and time.monotonic() < end:
                if any(p.poll() not in (None, 0) for p in started):
                    break  # the others wait for one that is gone
                time.sleep(0.1)
            late = [rank for rank, p in enumerate(started) if p.poll() is None]
            failed = [(rank, p.returncode) for rank, p in enumerate(started) if p.poll() not in (None, 0)]
        finally:
            for p in started:
                p.kill()
                p.wait()
            texts = []
            for log in logs:
                log.seek(0)
                texts.append(log.read())
                log.close()
    if failed:
        rank, code = failed[0]
        last = (texts[rank].strip().splitlines() or [f"exit {code}"])[-1]
        return Reduced(f"the process of GPU {rank} failed: {last[:300].rstrip('.')}")
    if late:
        return Reduced(f"it did not end within {seconds:.0f} s (GPU {', '.join(map(str, late))})")
    said = json.loads(texts[0].strip().splitlines()[-1])
    return Reduced("", float(said["gib_per_second"]))


def check(gpus: int, reduced: Reduced) -> list[Finding]:
    """What an all-reduce over `gpus` GPUs means for a training."""
    if reduced.problem:
        text = (
            f"an all-reduce over the {gpus} GPUs went wrong: {reduced.problem}; look at it with NCCL_DEBUG=INFO, and "
            "try NCCL_P2P_DISABLE=1 (an IOMMU or ACS in the way) and a larger /dev/shm."
        )
        source = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html"
        return [Finding("error", "environment", "collective", text, source)]
    text = (
        f"an all-reduce of 64 MiB over the {gpus} GPUs is right and runs at {reduced.gib_per_second:.1f} GiB/s; "
        "nothing to do."
    )
    return [Finding("note", "environment", "collective", text)]


def _rank(rank: int, world: int, backend: str, store: str) -> None:
    """One process: sum, check, and let rank 0 say how fast."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    numbers = torch.full((_ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    wanted = world * (world + 1) / 2
    if not bool((numbers == wanted).all()):
        raise SystemExit(f"the sum is {float(numbers[0])} where it should be {wanted}")
    numbers.zero_()
    began = time.monotonic()
    for _ in range(_REPEATS):
        dist.all_reduce(numbers)
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = (time.monotonic() - began) / _REPEATS
    if rank == 0:
        print(json.dumps({"gib_per_second": _ELEMENTS * 4 / 2**30 / took}))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
