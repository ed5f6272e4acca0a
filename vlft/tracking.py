"""What a run writes beside its weights: metrics.jsonl, ledger.jsonl, run.yaml, run_card.json, trackers, the terminal.

Other programs read these files; their names and keys are a contract (docs/run-folder.md). Only the main process writes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import filter_trackers

from vlft.errors import CheckpointError, ConfigError

SCHEMA = 1
_PACKAGES = (
    "vlft", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "kornia", "deepspeed", "numpy", "pillow"
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths inside an output directory."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def budget(self) -> Path:
        """What a run that ended out of memory leaves for its resume: smaller rows."""
        return self.root / "budget.json"

    @property
    def base(self) -> Path:
        """The merged base of a second stage, where the run started from an adapter."""
        return self.root / "base"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    def predictions(self, step: int, dataset: str) -> Path:
        return self.root / "eval" / f"step-{step:06d}" / f"{dataset}.jsonl"


def cut_back(path: Path, step: int) -> None:
    """Drop the lines that a resume from `step` will write again; a line cut by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    beside = path.with_suffix(".cutting")
    beside.write_text("".join(kept))
    beside.replace(path)


def told(path: Path, step: int) -> list[dict[str, Any]]:
    """Ledger lines of training and evaluation up to `step`; none for a line cut by a kill."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError):
            entry = json.loads(line)
            if 0 < entry["step"] <= step:
                found.append(entry)
    return found


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add JSON lines, on disk when this returns control to the loop (a later kill loses nothing)."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if text:
        with _writable(path), path.open("a") as file:
            file.write(text)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Raises: CheckpointError where the disk is full or gone; a resume drops half a line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}; free some space and go on with --resume_from_checkpoint latest."
        ) from error


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def run_card(**facts: Any) -> dict[str, Any]:
    """Versions, device, commit and what else the caller knows."""
    gpu = torch.cuda.is_available()
    return {
        "schema": SCHEMA,
        "versions": {p: v for p in _PACKAGES if (v := _installed(p))} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "git_commit": _git_commit(),
        "command": sys.argv,
        **facts,
    }


class Trackers:
    """Trackers beyond metrics.jsonl. Only the main process logs."""

    def __init__(
        self, accelerator: Any, *, enabled: bool, project: str | None, run_name: str | None, options: dict[str, Any]
    ) -> None:
        """Raises: ConfigError if wandb is asked for and missing (Accelerate would drop it at debug level)."""
        self.accelerator = accelerator if enabled else None
        if not enabled:
            return
        if _installed("wandb") is None:
            raise ConfigError("--use_wandb needs wandb: pip install 'vlft[wandb]'.")
        accelerator.log_with = filter_trackers(["wandb"])
        init = {"wandb": {"name": run_name}} if run_name else {}
        accelerator.init_trackers(project or "vlft", config=options, init_kwargs=init)

    def log(self, line: Mapping[str, Any]) -> None:
        """Send one metrics line, flattened with slashes."""
        if self.accelerator is None:
            return
        flat: dict[str, Any] = {}
        for key, value in line.items():
            if isinstance(value, Mapping):
                flat |= {f"{key}/{k}": v for k, v in value.items()}
            elif key not in ("schema", "kind", "step"):
                flat[key if key.startswith("eval/") else f"{line['kind']}/{key}"] = value
        self.accelerator.log(flat, step=int(line["step"]))


class Journal:
    """Writes metrics and ledger lines, feeds the trackers, and talks to the terminal. Silent on other ranks."""

    def __init__(self, folder: RunFolder, trackers: Trackers, *, is_main: bool, total_steps: int) -> None:
        self.folder, self.trackers, self.is_main, self.total = folder, trackers, is_main, total_steps
        self._spoke = 0.0

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of `step` is in metrics.jsonl."""
        lines = self.folder.metrics.read_text().splitlines() if self.folder.metrics.exists() else []
        return any(line["kind"] == "eval" and line["step"] == step for line in map(json.loads, lines))

    def ledger(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self.is_main:
            append(self.folder.ledger, lines)

    def predictions(self, step: int, dataset: str, made: Iterable[Any]) -> None:
        """Write the generated answers of one dataset."""
        if self.is_main:
            path = self.folder.predictions(step, dataset)
            with _writable(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(json.dumps(p.json(), ensure_ascii=False) + "\n" for p in made)
                # A path that is no UTF-8 holds half surrogates, which JSON writes as such an escape.
                path.write_bytes(text.encode("utf-8", "backslashreplace"))

    def metrics(self, line: dict[str, Any]) -> None:
        if not self.is_main:
            return
        whole = {"schema": SCHEMA, **line}
        append(self.folder.metrics, [whole])
        self.trackers.log(whole)
        now = time.monotonic()
        if line["kind"] == "eval" or now - self._spoke >= 1.0 or line["step"] == self.total:
            self._spoke = now
            self.say(_sentence(line, self.total))


def _sentence(line: Mapping[str, Any], total: int) -> str:
    head = f"step {line['step']}/{total}"
    if line["kind"] == "eval":
        found = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k.startswith("eval/"))
        return f"{head}  {found}"
    perf = line["perf"]
    rates = " ".join(f"{part} {rate:.2e}" for part, rate in line["learning_rate"].items())
    loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
    norm = "-" if line["grad_norm"] is None else f"{line['grad_norm']:.3g}"
    skipped = f"  skipped ({line['skipped']})" if line["skipped"] else ""
    return (
        f"{head}  loss {loss}  grad {norm}{skipped}  lr {rates}  "
        f"{perf['tokens_per_second']:.0f} tok/s  {perf['peak_memory_gib']:.1f} GiB"
    )


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    # Hidden: a run that is killed here has not begun its folder, and its repetition may.
    beside = path.with_name(f".writing-{path.name}")
    with _writable(path):
        beside.write_text(json.dumps(content, indent=2, default=str))
        os.replace(beside, path)
