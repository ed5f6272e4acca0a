"""The machine: can it run what is asked for, and as fast as it should? Each check takes facts, so that a test can say
what a machine is like.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlft import compiler
from vlft.doctor import collective
from vlft.doctor.findings import Finding, Grade
from vlft.doctor.versions import installed, known_bad, out_of_range, requirement_names
from vlft.errors import ConfigError
from vlft.words import counted

GIB = 2**30
_SHM_FOR_NCCL = 1.0
"""GiB of shared memory that NCCL wants for several GPUs; Docker gives 64 MiB, and NCCL then fails in the middle of a
run (https://github.com/pytorch/torchtitan/issues/853).
"""
_PREFETCHED = 2
"""Steps that each worker keeps ready (the loader's prefetch_factor), one more being in its hands."""
_LEAST_DISK = 2.0
"""GiB for what every run writes: metrics, report, index, adapters."""
_IN_USE = 0.1
"""Share of a GPU's memory that others may hold before it is told."""


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    total: int
    """Bytes."""
    free: int


@dataclass(frozen=True)
class Disk:
    what: str
    """The option that the folder comes from."""
    path: Path
    free: int
    """Bytes."""
    files: int = 1
    """Files that may still be made; 0: none."""


@dataclass(frozen=True)
class Machine:
    """What was found. Sizes in bytes."""

    versions: dict[str, str] = field(default_factory=dict)
    torch_cuda: str | None = None
    """CUDA that torch was built for; None: a build for the CPU."""
    driver: bool = False
    """An NVIDIA driver is loaded."""
    cuda_error: str = ""
    """Why torch cannot use the GPUs that are there."""
    gpus: tuple[Gpu, ...] = ()
    architectures: tuple[str, ...] = ()
    """sm_80, compute_90 and so on: what torch was built for."""
    varlen: bool = True
    """PyTorch's variable-length flash attention is there."""
    bitsandbytes_error: str = ""
    triton_error: str = ""
    """Why Triton's kernels cannot run here."""
    precision: str = "no"
    precision_error: str = ""
    processors: int = 1
    memory: int = 0
    """Free main memory, inside the container's limit; 0: unknown."""
    shared: int = 0
    """Size of /dev/shm; 0: none."""
    shared_free: int = 0
    disks: tuple[Disk, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What the run wants of the machine."""

    workers: int = 0
    """Per process."""
    batch: int = 1
    """Samples of one forward."""
    accumulation: int = 1
    pixels: int = 0
    """Of all pictures of a usual sample."""
    weights: int = 0
    """Bytes of the model's weights; 0: unknown."""
    checkpoints: int = 0
    """Kept at a time."""
    deepspeed: str = ""
    """Stem of the DeepSpeed configuration; empty: none."""
    collectives: bool = True
    """Try an all-reduce where there are several GPUs."""


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def look(precision: str | None, folders: Sequence[tuple[str, Path]]) -> Machine:
    """What this machine is like.

    Args:
        precision: --mixed_precision.
        folders: (option, folder) whose disks matter; they need not exist.
    """
    import torch

    from vlft.engine.base import choose_precision

    gpus, error = _gpus()
    chosen, refused = "no", ""
    try:
        chosen = choose_precision(precision)
    except ConfigError as problem:
        refused = str(problem)
    shared = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    versions = installed([*requirement_names(), "vlft"])
    cudnn: Any = torch.backends.cudnn
    if cudnn.is_available() and (number := cudnn.version()):
        versions["cudnn"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    if gpus and torch.distributed.is_nccl_available():
        nccl: Any = torch.cuda.nccl
        versions["nccl"] = ".".join(map(str, nccl.version()))
    return Machine(
        versions, torch.version.cuda, Path("/proc/driver/nvidia/version").exists(), error, gpus,
        tuple(torch.cuda.get_arch_list()) if gpus else (), _has_varlen(), _bitsandbytes(bool(gpus)),
        compiler.trouble() if gpus else "", chosen, refused,
        os.cpu_count() or 1, free_memory(), shared.total if shared else 0, shared.free if shared else 0,
        tuple(disk(what, folder) for what, folder in folders),
    )  # fmt: skip


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    import torch

    try:
        found = []
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            found.append(Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), total, free))
        if not found and torch.version.cuda:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        return tuple(found), ""
    except (RuntimeError, AssertionError) as error:
        return (), " ".join(str(error).split())[:300].rstrip(".")


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return callable(varlen_attn)


def _bitsandbytes(gpu: bool) -> str:
    """Why its CUDA library is not there; empty where all is well, or it is not installed or not needed."""
    if not gpu or not installed(["bitsandbytes"]):
        return ""
    try:
        from bitsandbytes.cextension import lib
    except Exception as error:  # a library that cannot be loaded raises anything
        return f"{type(error).__name__}: {error}"[:300]
    return "" if getattr(lib, "compiled_with_cuda", True) else "its library was built without CUDA"


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that may still be used, within the container's limit; 0 where Linux does not say."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 0
    try:
        limit = int((root / "sys/fs/cgroup/memory.max").read_text())
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
        return max(0, min(free, limit - used))
    except (OSError, ValueError):  # "max": no limit
        return free


def disk(what: str, folder: Path) -> Disk:
    """The disk that `folder`, or the nearest folder above it that exists, lies on."""
    there = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir()), Path("/"))
    stat = os.statvfs(there)
    return Disk(what, there, stat.f_bavail * stat.f_frsize, stat.f_favail if stat.f_files else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def _warn(check: str, text: str, source: str = "") -> Finding:
    return Finding("warning", "environment", check, text, source)


def _error(check: str, text: str, source: str = "") -> Finding:
    return Finding("error", "environment", check, text, source)


def facts(machine: Machine, plan: Plan) -> set[str]:
    """Words for `versions.Known.needs`."""
    found = {
        "gpu": bool(machine.gpus), "several": len(machine.gpus) > 1, "bf16": machine.precision == "bf16",
        "zero2": plan.deepspeed.startswith("zero2"),
    }  # fmt: skip
    return {name for name, true in found.items() if true}


def check_versions(machine: Machine, plan: Plan) -> Iterator[Finding]:
    yield from out_of_range(machine.versions)
    yield from known_bad(machine.versions, facts(machine, plan))


def check_accelerator(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """GPUs that are there and cannot be used, and an old GPU under a new torch."""
    del plan
    if machine.precision_error:
        yield _error("precision", machine.precision_error)
    if not machine.gpus:
        if machine.driver and machine.torch_cuda is None:
            text = "this machine has an NVIDIA driver, but torch is a build for the CPU; install torch for CUDA."
            yield _error("torch_build", text, "https://pytorch.org/get-started/locally/")
        elif machine.driver and machine.torch_cuda:
            why = machine.cuda_error or "it finds no GPU"
            text = (
                f"torch {machine.torch_cuda and 'for CUDA ' + machine.torch_cuda} cannot use this machine's GPU "
                f"({why}); look at nvidia-smi and CUDA_VISIBLE_DEVICES, and update the driver if it is the older one."
            )
            yield _error("no_gpu", text)
        else:
            yield _warn("no_gpu", "there is no GPU here, so training runs on the CPU; only tiny models end that way.")
    for name, capability in dict.fromkeys((gpu.name, gpu.capability) for gpu in machine.gpus):
        if machine.architectures and not _built_for(capability, machine.architectures):
            text = (
                f"{name} has compute capability {capability[0]}.{capability[1]}, for which this "
                f"torch has no kernels ({', '.join(machine.architectures)}); install a torch that has them."
            )
            yield _error("architecture", text)
    names = {gpu.name for gpu in machine.gpus}
    if len(names) > 1:
        yield _warn(
            "mixed_gpus",
            f"the GPUs differ ({', '.join(sorted(names))}), so that all wait for the slowest; "
            "choose equal ones with CUDA_VISIBLE_DEVICES.",
        )


def _built_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Binaries run on the same major version from their minor on; PTX (compute_) on everything newer."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def check_kernels(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """What training falls back from, at a cost."""
    del plan
    old = [gpu for gpu in machine.gpus if gpu.capability < (8, 0)]
    if old:
        text = (
            f"{old[0].name} is older than Ampere, so that attention runs sample by sample instead of in one "
            "variable-length flash kernel; use a newer GPU where speed matters."
        )
        yield _warn("varlen", text)
    elif machine.gpus and machine.precision == "no":
        text = (
            "--mixed_precision no computes in fp32 on a GPU: no variable-length flash kernel, a fraction of the "
            "speed; leave the option out, or give bf16."
        )
        yield _warn("precision", text)
    if machine.gpus and not machine.varlen:
        yield _error("varlen", "torch.nn.attention.varlen is missing from this torch; install torch 2.11 or newer.")
    if machine.bitsandbytes_error:
        text = (
            f"bitsandbytes cannot use the GPU ({machine.bitsandbytes_error}), which 4-bit strategies need; "
            "install a version that was built for this CUDA, see python -m bitsandbytes."
        )
        yield _warn("bitsandbytes", text)
    if machine.triton_error:
        text = (
            f"Triton cannot compile kernels here ({machine.triton_error}), so that training runs plain PyTorch "
            "functions in their place and takes longer; install a C compiler (gcc, or name one in CC) and triton."
        )
        yield _warn("triton", text)


def check_gpu_memory(machine: Machine, plan: Plan) -> Iterator[Finding]:
    del plan
    for i, gpu in enumerate(machine.gpus):
        held = gpu.total - gpu.free
        if held > _IN_USE * gpu.total:
            text = (
                f"{held / GIB:.1f} of {gpu.total / GIB:.1f} GiB of GPU {i} are in use by others; end them (nvidia-smi "
                "names them), or choose another GPU with CUDA_VISIBLE_DEVICES."
            )
            yield _warn("gpu_memory", text)


def check_memory(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Every process reads the whole model once."""
    if machine.memory and plan.weights > machine.memory:
        text = (
            f"the weights are {plan.weights / GIB:.1f} GiB, the free main memory {machine.memory / GIB:.1f} GiB; "
            "loading reads them through it: free some, or raise the container's limit."
        )
        yield _warn("memory", text)


def check_shared_memory(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Workers hand their pictures over in /dev/shm; one that is too small kills them with a bus error."""
    processes = max(1, len(machine.gpus))
    step = 3 * plan.pixels * plan.batch * plan.accumulation
    need = step * plan.workers * (_PREFETCHED + 1) * processes
    docker = "start the container with --shm-size=8g (or --ipc=host), or give --num_workers 0"
    if plan.workers and not machine.shared:
        yield _error("shared_memory", f"there is no /dev/shm, through which workers hand over pictures; {docker}.")
    elif plan.workers and machine.shared_free < need:
        grade = _error if machine.shared_free < step else _warn
        text = (
            f"/dev/shm has {machine.shared_free / GIB:.2f} GiB free, and {plan.workers} workers of {processes} "
            f"process(es) may hold {need / GIB:.2f} GiB of pictures there; {docker}."
        )
        yield grade("shared_memory", text, "https://docs.pytorch.org/docs/stable/notes/multiprocessing.html")
    if len(machine.gpus) > 1 and machine.shared < _SHM_FOR_NCCL * GIB:
        size = machine.shared / GIB
        text = f"/dev/shm is {size:.2f} GiB, and NCCL wants {_SHM_FOR_NCCL:.0f} for several GPUs; {docker}."
        yield _warn("shared_memory", text, "https://github.com/pytorch/torchtitan/issues/853")


def check_disk(machine: Machine, plan: Plan) -> Iterator[Finding]:
    for one in machine.disks:
        free = one.free / GIB
        # The result and a merged copy; checkpoints of whole weights hold fp32 masters and Adam's two moments (12 bytes
        # a weight, six times the 2 of the model's files).
        most = (2 + 6 * plan.checkpoints) * plan.weights if one.what == "output_dir" else 0
        if one.files == 0:
            yield _error("disk", f"the disk of {one.path} ({one.what}) has no room for another file; delete some.")
        elif free < _LEAST_DISK:
            text = f"the disk of {one.path} ({one.what}) has {free:.1f} GiB free; free some, or choose another."
            yield _error("disk", text)
        elif one.free < most:
            text = (
                f"the disk of {one.path} ({one.what}) has {free:.0f} GiB free; the result with {plan.checkpoints} "
                f"checkpoints takes {most / GIB:.0f} if all weights train, far less with adapters: free some, or lower "
                "--save_total_limit."
            )
            # Not even a merged copy would fit.
            grade: Grade = "warning" if one.free < plan.weights else "note"
            yield Finding(grade, "environment", "disk", text)


def check_processors(machine: Machine, plan: Plan) -> Iterator[Finding]:
    gpus = len(machine.gpus)
    busy = (plan.workers + 1) * max(1, gpus)
    if plan.workers and busy > machine.processors:
        each = f" for each of {gpus} GPUs" if gpus > 1 else ""
        text = (
            f"{busy} processes (a training process and {counted(plan.workers, 'worker')}{each}) share "
            f"{counted(machine.processors, 'processor')}; lower --num_workers if decoding does not keep up."
        )
        yield Finding("note", "environment", "processors", text)


def check_collective(machine: Machine, plan: Plan) -> Iterator[Finding]:
    if plan.collectives and len(machine.gpus) > 1:
        yield from collective.check(len(machine.gpus), collective.all_reduce("nccl", len(machine.gpus)))


CHECKS: tuple[Callable[[Machine, Plan], Iterator[Finding]], ...] = (
    check_versions, check_accelerator, check_kernels, check_gpu_memory, check_memory, check_shared_memory, check_disk,
    check_processors, check_collective,
)  # fmt: skip


def examine(machine: Machine, plan: Plan) -> list[Finding]:
    return [finding for check in CHECKS for finding in check(machine, plan)]
