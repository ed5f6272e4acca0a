"""What a run writes beside its weights: metrics.jsonl, ledger.jsonl, run.yaml, run_card.json, trackers, the terminal.

Other programs read these files; their names and keys are a contract (docs/run-folder.md). Only the main process writes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from vlft.errors import CheckpointError
from vlft.terminal import ending, open_terminal
from vlft.trackers import Trackers

SCHEMA = 1
_PACKAGES = (
    "vlft", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "kornia", "deepspeed", "numpy", "pillow"
)  # fmt: skip


@dataclass(frozen=True)
class Best:
    """The evaluation with the best value of one metric."""

    metric: str
    """A key of eval lines in metrics.jsonl."""
    greater: bool
    """Is a greater value better?"""
    step: int = 0
    """0: none yet. An evaluation before the first step does not count: it has no checkpoint."""
    value: float = math.nan

    def among(self, lines: Iterable[Mapping[str, Any]]) -> Best:
        """The best of these lines; of equal ones the first."""
        found = [(float(line[self.metric]), int(line["step"])) for line in lines if line.get(self.metric) is not None]
        found = [(value, step) for value, step in found if step and math.isfinite(value)]
        if not found:
            return replace(self, step=0, value=math.nan)
        value, step = max(found, key=lambda one: (one[0] if self.greater else -one[0], -one[1]))
        return replace(self, step=step, value=value)

    def json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "metric": self.metric, "greater_is_better": self.greater, "step": self.step,
                "value": self.value}  # fmt: skip


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
    def data(self) -> Path:
        """Counts and histograms of the data."""
        return self.root / "data.json"

    @property
    def gallery(self) -> Path:
        """Held-out pictures, for people."""
        return self.root / "gallery"

    @property
    def best(self) -> Path:
        """Which checkpoint is the best so far."""
        return self.root / "best.json"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.root / "eval"

    def predictions(self, step: int, dataset: str) -> Path:
        return self.evaluations / f"step-{step:06d}" / f"{dataset}.jsonl"


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


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file of steps; none for a line cut by a kill, or without the file."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            if isinstance(entry := json.loads(line), dict) and "step" in entry:
                yield entry


def told(path: Path, step: int) -> list[dict[str, Any]]:
    """Ledger lines of training and evaluation up to `step`."""
    return [entry for entry in entries(path) if 0 < entry["step"] <= step]


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


def write_predictions(path: Path, made: Iterable[Any]) -> None:
    """The generated answers of one data set, as JSON lines."""
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(p.json(), ensure_ascii=False) + "\n" for p in made)
        # A path that is no UTF-8 holds half surrogates, which JSON writes as such an escape.
        path.write_bytes(text.encode("utf-8", "backslashreplace"))


class Journal:
    """Writes metrics and ledger lines, feeds the trackers, and talks to the terminal. Silent on other ranks."""

    def __init__(self, folder: RunFolder, trackers: Trackers, *, is_main: bool, total_steps: int) -> None:
        self.folder, self.trackers, self.is_main, self.total = folder, trackers, is_main, total_steps
        self.terminal = open_terminal(total_steps, speaks=is_main)
        self.began = time.monotonic()
        trackers.warn = self.say

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The run ends: the terminal is plain again, trackers send what they still hold."""
        self.terminal.close()
        if self.is_main:
            self.trackers.close(0 if error is None else int(getattr(error, "exit_code", 1)))

    def say(self, text: str) -> None:
        self.terminal.say(text)

    def doing(self, what: str) -> None:
        """What takes the time until the next step."""
        self.terminal.doing(what)

    def ended(self, trained: str, best: Best | None, *, merges: bool) -> None:
        """Say what came of the run, on the main process.

        Args:
            trained: a sentence about what was.
            merges: the result is an adapter.
        """
        results = _results(self.evaluations(), best)
        unused = sum(1 for _ in self.folder.ledger.open()) if self.folder.ledger.exists() else 0
        self.say(ending(trained, results, unused, self.folder.root, merges=merges))

    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that evaluations wrote."""
        return [entry for entry in entries(self.folder.metrics) if entry.get("kind") == "eval"]

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of `step` is in metrics.jsonl."""
        return any(line["step"] == step for line in self.evaluations())

    def best(self, best: Best) -> Best:
        """The best evaluation so far; best.json says so. Call on the main process."""
        found = best.among(self.evaluations())
        if found.step:
            write_json(self.folder.best, found.json())
        else:
            self.folder.best.unlink(missing_ok=True)
        return found

    def evaluation(
        self,
        step: int,
        values: Mapping[str, float | None],
        made: Mapping[str, Iterable[Any]],
        failed: Mapping[str, str],
        seconds: float,
    ) -> None:
        """Write an evaluation's predictions, then its line: a line means that all is there."""
        if not self.is_main:
            return
        for dataset, answers in made.items():
            write_predictions(self.folder.predictions(step, dataset), answers)
            self.trackers.predictions(step, dataset, answers)
        for name, error in failed.items():
            self.say(f"WARNING: the script {name} failed at step {step}: {error}; 'vlft eval' can score again.")
        more = {"failed": dict(failed)} if failed else {}
        self.metrics({"step": step, "kind": "eval", **values, **more, "perf": {"eval_seconds": seconds}})

    def ledger(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self.is_main:
            append(self.folder.ledger, lines)

    def metrics(self, line: dict[str, Any]) -> None:
        if not self.is_main:
            return
        whole = {"schema": SCHEMA, **line}
        append(self.folder.metrics, [whole])
        self.trackers.log(whole)
        (self.terminal.evaluated if line["kind"] == "eval" else self.terminal.step)(line)


def _results(evaluations: Sequence[Mapping[str, Any]], best: Best | None) -> list[str]:
    """A sentence for each metric of the last evaluation, and one for the best."""
    last = evaluations[-1] if evaluations else {}
    values = {key: value for key, value in last.items() if key.startswith("eval/") and value is not None}
    lines = [f"{key} {value:.4g} at step {last['step']}" for key, value in values.items()]
    if best is not None and best.step:
        lines.append(f"best {best.metric} {best.value:.4g} at step {best.step}: that is what model/ holds")
    return lines


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    # Hidden: a run that is killed here has not begun its folder, and its repetition may.
    # By rank: two that are out of memory at once both write their budget.
    beside = path.with_name(f".writing-{os.environ.get('RANK', '0')}-{path.name}")
    with _writable(path):
        beside.write_text(json.dumps(content, indent=2, default=str))
        os.replace(beside, path)
