"""The allocator is set up before torch is there, however a run is started, and never against the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, environment

from vlft import engine
from vlft.allocator import NAMES, prepare_allocator, shortage

EXPANDS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="no such segments here")


@ON_LINUX
def test_segments_expand_unless_the_user_says_something() -> None:
    found: dict[str, str] = {"PATH": "/bin"}
    prepare_allocator(found)
    prepare_allocator(found)
    assert found == {"PATH": "/bin"} | EXPANDS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["max_split_size_mb:512", "expandable_segments:False", ""])
def test_what_the_user_says_stays(name: str, value: str) -> None:
    found = {name: value}
    prepare_allocator(found)
    assert found == {name: value}


@pytest.mark.parametrize(
    ("free", "reserved", "others"),
    [
        (2e9, 56e9, "; other processes hold 78.7 of its 133.4 GiB, nvidia-smi names them"),
        (2e9, 140e9, ""),  # what is left is this process's own: the driver's and NCCL's
    ],
)
def test_an_error_tells_what_others_hold(
    monkeypatch: pytest.MonkeyPatch, free: float, reserved: float, others: str
) -> None:
    """A run that a kill had left behind held 80 GiB, and the user was told to train fewer parts."""
    facts = {"is_available": True, "mem_get_info": (free, 143.27e9), "memory_reserved": reserved}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    assert shortage(error) == f"CUDA out of memory{others}"


def test_elsewhere_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    found: dict[str, str] = {}
    prepare_allocator(found)
    assert found == {}


SPY = """
import os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch sees", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), flush=True)
sys.meta_path.insert(0, Spy())
import runpy
runpy.run_module("vlft", run_name="__main__")
"""


@ON_LINUX
@pytest.mark.parametrize("given", [None, "max_split_size_mb:512"])
def test_it_is_there_when_torch_is_imported(tmp_path: Path, given: str | None) -> None:
    """`accelerate launch -m vlft`, torchrun and deepspeed run the same module in each of their processes."""
    env = environment(**({"PYTORCH_CUDA_ALLOC_CONF": given} if given else {}))
    if given is None:
        env = {name: value for name, value in env.items() if name not in NAMES}
    (tmp_path / "registry.json").write_text('{"datasets": {}}')  # which ends the run, once torch is there
    words = command(tmp_path, tmp_path / "registry.json", tmp_path / "out", "full")
    done = subprocess.run([sys.executable, "-c", SPY, *words], capture_output=True, text=True, env=env, check=False)
    assert f"torch sees {given or 'expandable_segments:True'}\n" in done.stdout, done.stdout + done.stderr
    assert "torch sees None" not in done.stdout


@ON_LINUX
def test_it_is_there_when_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a program that calls `vlft.train.main`."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    seen: list[Any] = []
    monkeypatch.setattr(engine, "Engine", lambda *_: seen.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF")))
    engine.start_engine("no")
    assert seen == list(EXPANDS.values())
