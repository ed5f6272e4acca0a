"""What is said of a machine: each check told what the machine is like."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlft.doctor import collective, machine, versions
from vlft.doctor.findings import Finding
from vlft.doctor.machine import GIB, Disk, Gpu, Machine, Plan
from vlft.doctor.versions import KNOWN, known_bad, out_of_range

H100 = Gpu("H100", (9, 0), 80 * GIB, 79 * GIB)
GOOD = Machine(
    torch_cuda="13.0", driver=True, gpus=(H100, H100), architectures=("sm_80", "sm_90"), precision="bf16",
    processors=32, memory=200 * GIB, shared=64 * GIB, shared_free=60 * GIB,
    disks=(Disk("output_dir", Path("/out"), 900 * GIB), Disk("cache_dir", Path("/cache"), 900 * GIB)),
)  # fmt: skip
PLAN = Plan(4, 2, 8, 1_000_000, 15 * GIB, 3, collectives=False)


def said(here: Machine, plan: Plan = PLAN) -> list[tuple[str, str]]:
    found: list[Finding] = []
    for check in machine.CHECKS:
        if check is not machine.check_versions:
            found += check(here, plan)
    assert all(one.text.endswith(".") and one.area == "environment" for one in found)
    return [(one.grade, one.check) for one in found]


def test_nothing_is_said_of_a_good_machine() -> None:
    assert said(GOOD) == []


GRAPHICS = (replace(H100, capability=(7, 5), name="T4"),)


@pytest.mark.parametrize(
    ("change", "plan", "finding"),
    [
        (dict(gpus=(), driver=False), {}, ("warning", "no_gpu")),
        (dict(gpus=(), torch_cuda=None), {}, ("error", "torch_build")),
        (dict(gpus=(), cuda_error="driver too old"), {}, ("error", "no_gpu")),
        (dict(precision_error="--mixed_precision fp16 needs a GPU."), {}, ("error", "precision")),
        (dict(precision="no"), {}, ("warning", "precision")),
        (dict(architectures=("sm_100", "compute_120")), {}, ("error", "architecture")),
        (dict(gpus=GRAPHICS, architectures=("sm_75",)), {}, ("warning", "varlen")),
        (dict(varlen=False), {}, ("error", "varlen")),
        (dict(bitsandbytes_error="no library"), {}, ("warning", "bitsandbytes")),
        (dict(triton_error="RuntimeError: no C compiler"), {}, ("warning", "triton")),
        (dict(gpus=(H100, replace(H100, name="A100"))), {}, ("warning", "mixed_gpus")),
        (dict(gpus=(replace(H100, free=40 * GIB),)), {}, ("warning", "gpu_memory")),
        (dict(memory=8 * GIB), {}, ("warning", "memory")),
        (dict(shared=0, shared_free=0, gpus=(H100,)), {}, ("error", "shared_memory")),
        (dict(shared_free=64 * 2**20, gpus=(H100,)), {}, ("warning", "shared_memory")),
        (dict(shared_free=8 * 2**20, gpus=(H100,)), {}, ("error", "shared_memory")),
        (dict(shared=64 * 2**20), {"workers": 0}, ("warning", "shared_memory")),
        (dict(disks=(Disk("cache_dir", Path("/c"), GIB),)), {}, ("error", "disk")),
        (dict(disks=(Disk("cache_dir", Path("/c"), 90 * GIB, 0),)), {}, ("error", "disk")),
        (dict(disks=(Disk("output_dir", Path("/o"), 10 * GIB),)), {}, ("warning", "disk")),
        (dict(disks=(Disk("output_dir", Path("/o"), 200 * GIB),)), {}, ("note", "disk")),
        (dict(processors=4), {}, ("note", "processors")),
    ],
)  # fmt: skip
def test_what_is_wrong(change: dict[str, object], plan: dict[str, int], finding: tuple[str, str]) -> None:
    assert said(replace(GOOD, **change), replace(PLAN, **plan)) == [finding]  # type: ignore[arg-type]


def test_more_processes_than_processors_are_counted() -> None:
    (several,) = machine.check_processors(replace(GOOD, processors=4), PLAN)
    assert several.text.startswith("10 processes (a training process and 4 workers for each of 2 GPUs) share 4 proces")
    (one,) = machine.check_processors(replace(GOOD, gpus=(), processors=1), replace(PLAN, workers=1))
    assert one.text.startswith("2 processes (a training process and 1 worker) share 1 processor; lower --num_workers")


def test_a_cache_s_disk_holds_no_checkpoints() -> None:
    assert said(replace(GOOD, disks=(Disk("cache_dir", Path("/c"), 10 * GIB),))) == []


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 6), ("sm_80",), True),  # same major version
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((12, 0), ("sm_90", "compute_90"), True),  # PTX is compiled for what is newer
        ((7, 0), ("sm_75", "compute_120"), False),
        ((9, 0), ("sm_90a",), True),
        ((12, 0), ("sm_120",), True),
    ],
)
def test_architectures(capability: tuple[int, int], built: tuple[str, ...], runs: bool) -> None:
    assert machine._built_for(capability, built) is runs


def test_memory_within_a_container(tmp_path: Path) -> None:
    assert machine.free_memory(tmp_path) == 0, "no Linux"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   1000000 kB\n")
    assert machine.free_memory(tmp_path) == 1_024_000_000
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.free_memory(tmp_path) == 1_024_000_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("500000000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("200000000\n")
    assert machine.free_memory(tmp_path) == 300_000_000


def test_the_disk_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    found = machine.disk("output_dir", tmp_path / "not" / "yet")
    assert found.path == tmp_path
    assert found.free > 0


def test_this_machine_can_be_looked_at(tmp_path: Path) -> None:
    here = machine.look(None, [("output_dir", tmp_path)])
    assert here.versions["torch"]
    assert here.processors > 0
    assert machine.examine(here, replace(PLAN, collectives=False)) is not None


def test_bitsandbytes_without_its_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = pytest.importorskip("bitsandbytes.cextension")
    monkeypatch.setattr(extension, "lib", SimpleNamespace(compiled_with_cuda=True))
    assert machine._bitsandbytes(gpu=True) == ""
    monkeypatch.setattr(extension, "lib", SimpleNamespace(compiled_with_cuda=False))
    assert machine._bitsandbytes(gpu=True) == "its library was built without CUDA"
    assert machine._bitsandbytes(gpu=False) == "", "not needed"


# ------------------------------------------------------------------ versions


def test_every_row_of_the_table_is_found_where_it_matters_and_only_there() -> None:
    bad = {"cudnn": ["9.10.2", "9.20.1"], "nccl": ["2.29.2"], "deepspeed": ["0.19.3"]}
    facts = {"gpu", "several", "bf16", "zero2"}
    found = [one for name, those in bad.items() for v in those for one in known_bad({name: v}, facts)]
    assert len(found) == len(KNOWN), "a row without a version here, or a version that two rows name"
    assert {one.source for one in found} == {row.source for row in KNOWN}
    assert all(one.source.startswith("https://") and one.text.endswith(".") for one in found)
    good = {"cudnn": "9.21.0", "nccl": "2.29.3", "deepspeed": "0.19.8", "torch": "2.13.0+cu130"}
    assert list(known_bad(good, facts)) == []
    assert list(known_bad({name: those[0] for name, those in bad.items()}, set())) == [], "no GPU, no ZeRO"


def test_versions_outside_the_range() -> None:
    needed = [
        "torch>=2.11", "peft<1,>=0.19", "bitsandbytes>=0.49; extra == 'qlora'", "bitsandbytes>=0.49; extra == 'demo'",
        "ruff>=99; extra == 'dev'", "tomli; python_version < '3.0'", "absent>=1; extra == 'wandb'",
    ]  # fmt: skip
    assert list(out_of_range({"torch": "2.13.0+cpu", "peft": "0.21.2"}, needed)) == []
    found = [one.text for one in out_of_range({"torch": "2.9.1", "bitsandbytes": "0.48.0", "ruff": "1.0"}, needed)]
    assert found == [
        "torch 2.9.1 is installed, vlft was made for >=2.11; pip install 'torch>=2.11'.",
        "peft is not installed, and vlft needs it; pip install 'peft<1,>=0.19'.",
        "bitsandbytes 0.48.0 is installed, vlft was made for >=0.49; pip install 'bitsandbytes>=0.49'.",
    ]
    assert versions.requirement_names(needed) == ["absent", "bitsandbytes", "peft", "torch"]


# ------------------------------------------------------------------ several processes


def test_an_all_reduce_that_works() -> None:
    found = collective.all_reduce("gloo", 2, seconds=120)
    assert found.problem == ""
    assert found.gib_per_second > 0
    (one,) = collective.check(2, found)
    assert one.grade == "note"


def test_a_process_that_dies_and_one_that_hangs() -> None:
    def dies(rank: int, world: int, backend: str, store: Path) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('no device')" if rank else "import time; time.sleep(60)"]

    found = collective.all_reduce("gloo", 2, seconds=30, command=dies)
    assert found.problem == "the process of GPU 1 failed: no device"
    (one,) = collective.check(2, found)
    assert one.grade == "error"
    assert "NCCL_DEBUG=INFO" in one.text

    def hangs(rank: int, world: int, backend: str, store: Path) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(60)" if rank else "pass"]

    assert "within 1 s (GPU 1)" in collective.all_reduce("gloo", 2, seconds=1, command=hangs).problem
