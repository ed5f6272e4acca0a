"""The allocator is set up before torch is there, however a run is started, and never against the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import command, environment

from vlft import engine
from vlft.allocator import NAMES, prepare_allocator

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
