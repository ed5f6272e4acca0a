"""Task metrics: functions from predictions to named numbers, found as entry points of `vlft.metrics` or in a file.

A metric gets predictions, never the model: the core generates, on all ranks, without duplicates.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlft.discovery import load_metric
from vlft.errors import ConfigError


@dataclass(frozen=True)
class Prediction:
    """One generated answer."""

    id: str
    """The record's own id, or its place in the file."""
    question: str
    """The last user turn."""
    prediction: str
    reference: str
    images: tuple[str, ...]
    """Paths or addresses of the pictures, as the record gives them."""
    record: Any
    """The raw record."""

    def json(self) -> dict[str, Any]:
        """For eval/step-N/DATASET.jsonl; the raw record is left out (it is in the data)."""
        return {k: v for k, v in asdict(self).items() if k != "record"}


Metric = Callable[[Sequence[Prediction]], dict[str, float]]


def load_script(script: str) -> tuple[str, Metric]:
    """(stem, function) of a metric's name or of a Python file with `evaluate(predictions)`.

    Raises:
        ConfigError: the file cannot be imported or has no `evaluate`.
        VlftError: no metric of that name (from discovery).
    """
    if not script.endswith(".py"):
        return script, load_metric(script)[0]
    path = Path(script)
    spec = importlib.util.spec_from_file_location(f"vlft_script_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"--eval_dataset_scripts: there is no Python file {path}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises while it is imported is told the same way
        raise ConfigError(
            f"--eval_dataset_scripts: {path} cannot be used: {type(error).__name__}: {str(error)[:200]}; correct it."
        ) from error
    function: Metric | None = getattr(module, "evaluate", None)
    if not callable(function):
        raise ConfigError(f"--eval_dataset_scripts: {path} has no function evaluate(predictions); add it.")
    return path.stem, function
