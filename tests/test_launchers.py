"""Every way to start a run that the README names, for real, for one step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from runs import command, environment, metrics, write_data

from vlft.config import bundled

BIN = Path(sys.executable).parent
PORT = str(21000 + os.getpid() % 20000)
WAYS = {
    "python -m vlft": [sys.executable, "-m", "vlft"],
    "vlft train": [str(BIN / "vlft"), "train"],
    "accelerate launch": [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "-m", "vlft"],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "1", "--master_port", PORT, "-m", "vlft"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "1", "--master_port", PORT, "--module", "vlft"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_starts(tiny: Callable[..., Path], tmp_path: Path, way: str) -> None:
    words = command(tiny(), write_data(tmp_path, 4), tmp_path / "out", "lora", max_steps=1)
    env = environment(DS_ACCELERATOR="cpu", PATH=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run(WAYS[way] + words, capture_output=True, text=True, env=env, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(metrics(tmp_path / "out")) == 1
    assert "1 step of 4 samples" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accelerate", "deepspeed"])
def test_zero_on_two_processes_starts(tiny: Callable[..., Path], tmp_path: Path, way: str) -> None:
    """(torchrun: tests/test_distributed.py.) accelerate starts two processes on a CPU for its type DEEPSPEED only."""
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", PORT, "--module", "vlft"]
    more: dict[str, str] = {"deepspeed": "zero2"}
    if way == "accelerate":
        settings = {
            "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_machines": 1,
            "num_processes": 2, "main_process_port": int(PORT),
            "deepspeed_config": {"deepspeed_config_file": str(bundled("ds_configs", ".json")["zero2"]),
                                 "zero3_init_flag": False},
        }  # fmt: skip
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(settings))
        launcher = [str(BIN / "accelerate"), "launch", "--config_file", str(tmp_path / "launch.yaml"), "-m", "vlft"]
        more = {}  # the file says it
    words = command(tiny(), write_data(tmp_path, 8), tmp_path / "out", "lora", max_steps=1, **more)
    env = environment(DS_ACCELERATOR="cpu", PATH=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=env, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    card = json.loads((tmp_path / "out/run_card.json").read_text())
    assert (card["world_size"], card["distributed_type"]) == (2, "DEEPSPEED")
