"""Every way to start a run that the README names, for real, for one step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import command, environment, metrics, write_data

BIN = Path(sys.executable).parent
PORT = str(21000 + os.getpid() % 20000)
WAYS = {
    "python -m vlft": [sys.executable, "-m", "vlft"],
    "vlft train": [str(BIN / "vlft"), "train"],
    "accelerate launch": [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "-m", "vlft"],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "1", "--master_port", PORT, "-m", "vlft"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "1", "--master_port", PORT, "--module", "vlft"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_starts(tiny: Callable[..., Path], tmp_path: Path, way: str) -> None:
    words = command(tiny(), write_data(tmp_path, 4), tmp_path / "out", "lora", max_steps=1)
    env = environment(DS_ACCELERATOR="cpu", PATH=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run(WAYS[way] + words, capture_output=True, text=True, env=env, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(metrics(tmp_path / "out")) == 1
    assert "1 steps of 4 samples" in done.stdout
