"""Helpers of the end-to-end tests: a toy data set, a run as a user starts it, and reading what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

CPU_ADAM = bool(list(Path("~/.cache/torch_extensions").expanduser().glob("*/cpu_adam/cpu_adam.so")))
"""DeepSpeed compiles its CPU Adam at first use, for minutes: offload is tested where it did."""

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""Environment: what accelerate's launcher sets for FSDP2."""
FSDP_ON_CPU: dict[str, Any] = {"fault": {"kind": "fsdp_on_cpu"}, **FSDP}
"""How `start` starts it where Accelerate would ignore it."""

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220), "grey": (128, 128, 128)}


def write_data(
    folder: Path, n: int = 24, *, name: str = "toy", seed: int = 0, counts: Sequence[int] = (1, 0, 3, 2), **spec: Any
) -> Path:
    """Records with `counts` pictures, in turn, one or two turns, of different lengths; returns the registry's path."""
    rng = np.random.default_rng(seed)
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w") as out:
        for i in range(n):
            count, colour = counts[i % len(counts)], list(COLOURS)[i % len(COLOURS)]
            names = []
            for k in range(count):
                height, width = rng.integers(40, 150, 2)
                noise = rng.integers(-30, 30, (height, width, 3))
                pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
                names.append(f"{name}-{i}-{k}.png")
                Image.fromarray(pixels).save(pictures / names[-1])
            turns = [{"role": "user", "content": "<image>" * count + "what colour is the picture"}]
            turns.append({"role": "assistant", "content": f"the picture is {colour} " * (1 + i % 3)})
            if i % 3 == 0:
                turns += [{"role": "user", "content": "describe"}, {"role": "assistant", "content": f"{colour} square"}]
            out.write(json.dumps({"id": f"r{i}", "messages": turns, "images": names}) + "\n")
    registry = folder / "registry.json"
    known = json.loads(registry.read_text())["datasets"] if registry.exists() else {}
    known[name] = {"json_path": f"{name}.jsonl", "image_root": "images", **spec}
    registry.write_text(json.dumps({"datasets": known}))
    return registry


def command(model: Path, registry: Path, output: Path, strategy: str, **options: Any) -> list[str]:
    """Words of a training run. `True` becomes a bare flag, a tuple several words."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "num_workers": 0,
        "train_split_ratio": 1.0,
        "cache_dir": registry.parent / "cache",
        "report": "false",
    }
    words = ["--model_name_or_path", str(model), "--dataset_config_path", str(registry), "--output_dir", str(output)]
    words += ["--tuning_strategy", strategy]
    for key, value in (defaults | options).items():
        if value is True:
            words.append(f"--{key}")
        elif value is not None:
            many = value if isinstance(value, tuple) else (value,)
            words += [f"--{key}", *(str(v) for v in many)]
    return words


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: one thread each (tests run side by side), no hub, no tracker on the network."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **extra}


def train(words: list[str]) -> None:
    """Run vlft inside this process, which saves the seconds of an import. Errors come as they are raised."""
    from accelerate.state import AcceleratorState

    from vlft import train as story
    from vlft.parse import parse

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        story.main(parse(words))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def final_weights(output: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Trained weights of the newest checkpoint, or of that step's, in their training dtype."""
    newest = sorted((output / "checkpoints").glob("step-*" if step is None else f"step-{step:06d}"))[-1]
    return {k: v for f in sorted(newest.glob("weights*.safetensors")) for k, v in load_file(f).items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of the whole weight vectors over the norm of the first."""
    assert a.keys() == b.keys()
    gap = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    return (gap / sum(float(a[n].double().square().sum()) for n in a)) ** 0.5


def launched(
    words: list[str], processes: int = 1, fault: dict[str, Any] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command line of a run in some processes, and what its environment needs."""
    program = ["-m", "vlft"] if fault is None else [str(Path(__file__).parent / "faults" / "spoiled.py")]
    env = {} if fault is None else {"FAULT": json.dumps(fault)}
    if processes == 1:
        return [sys.executable, *program, *words], env
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    torchrun += ["--master_port", str(20000 + os.getpid() % 20000)]
    return [*torchrun, *program, *words], {"ACCELERATE_USE_CPU": "true"} | env


def start(
    words: list[str],
    *,
    processes: int = 1,
    check: bool = True,
    fault: dict[str, Any] | None = None,
    limit: float = 280,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run vlft and wait; raises with its output if it fails and `check` is set, or if it takes longer than `limit` s.

    Args:
        fault: what goes wrong in it (tests/faults/spoiled.py).
    """
    line, more = launched(words, processes, fault)
    env = more | env
    done = subprocess.run(line, capture_output=True, text=True, env=environment(**env), timeout=limit, check=False)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def metrics(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one kind, without what a repeat may change."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "perf"} for line in lines if line["kind"] == kind]


def ledger(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
