"""Task metrics: functions from predictions to named numbers, found as entry points of `vlft.metrics` or in a file.

A metric gets predictions, never the model: the core generates, on all ranks, without duplicates. docs/metrics.md lists
the installed ones and shows how to write another.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from vlft.discovery import load_metric
from vlft.errors import ConfigError, StrategyError


@dataclass(frozen=True)
class Prediction:
    """One generated answer."""

    id: str
    """The record's own id, or its place in the file."""
    question: str
    """The user turn before the last learnt answer, which is what is asked."""
    prediction: str
    reference: str
    images: tuple[str, ...]
    """Paths or addresses of the pictures, as the record gives them."""
    record: Any
    """The raw record."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) in pixels of each picture as the model sees it: what boxes in pixels refer to."""

    def json(self) -> dict[str, Any]:
        """For eval/step-N/DATASET.jsonl; the raw record is left out (it is in the data)."""
        return {k: v for k, v in asdict(self).items() if k != "record"}


Metric = Callable[[Sequence[Prediction]], dict[str, float]]

_FALLING = ("loss", "error", "error_rate", "wer", "cer", "perplexity", "distance", "invalid", "mae", "mse", "rmse")


def lower_is_better(name: str) -> bool:
    """Whether a smaller value is the better one, by the name alone: it is, or ends in, a word for what should be small.

    Args:
        name: a value's name, with or without its path: "cer", "edit_distance", "eval/pages/wer/wer". Every other name
            (a user's own metric may have any) counts as one that rises.
    """
    last = "_" + name.rpartition("/")[2].lower().replace("-", "_").replace(" ", "_")
    return last.endswith(tuple(f"_{word}" for word in _FALLING))


def references(prediction: Prediction) -> tuple[str, ...]:
    """All accepted answers: the record's `answers`, or else the one reference.

    `answers` is a list of texts or numbers, or of objects with a key `answer` (as VQA's annotations are). A record
    whose `answers` is anything else, or empty, has its one reference.
    """
    raw = prediction.record.get("answers") if isinstance(prediction.record, Mapping) else None
    if not isinstance(raw, list | tuple) or not raw:
        return (prediction.reference,)
    found = [one.get("answer") if isinstance(one, Mapping) else one for one in raw]
    if not all(isinstance(one, str | int | float) for one in found):
        return (prediction.reference,)
    return tuple(str(one) for one in found)


def share(part: float, whole: float) -> float:
    """`part` / `whole`, 0 of nothing."""
    return part / whole if whole else 0.0


def library(name: str, metric: str) -> Any:
    """The optional library `name` that `metric` is built on.

    Raises:
        StrategyError: it is not installed or does not load; the message holds the install line.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise StrategyError(
            f"The metric '{metric}' needs {name.partition('.')[0]}, which cannot be imported ({error}); "
            "run: pip install 'vlft[metrics]'."
        ) from error


def load_script(script: str) -> tuple[str, Metric]:
    """(stem, function) of a metric's name or of a Python file with `evaluate(predictions)`.

    Raises:
        ConfigError: the file cannot be imported or has no `evaluate`.
        VlftError: no metric of that name (from discovery).
    """
    if not script.endswith(".py"):
        return script, load_metric(script)[0]
    path = Path(script)
    if not path.is_file():
        raise ConfigError(f"--eval_dataset_scripts: there is no Python file {path}.")
    try:
        module = _run_file(path.absolute())
    except (Exception, SystemExit) as error:  # whatever a user's file raises while it is imported is told the same way
        raise ConfigError(
            f"--eval_dataset_scripts: {path} cannot be used: {type(error).__name__}: {str(error)[:200]}; correct it."
        ) from error
    function: Metric | None = getattr(module, "evaluate", None)
    if not callable(function):
        raise ConfigError(f"--eval_dataset_scripts: {path} has no function evaluate(predictions); add it.")
    return path.stem, function


def _run_file(path: Path) -> ModuleType:
    """A file as a module, imported as `python FILE` would be: it may import what lies beside it."""
    # The place tells files of one name apart; dataclasses look their module up in sys.modules.
    name = f"vlft_script_{path.stem}_{crc32(bytes(path)):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file has a loader
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        with suppress(ValueError):  # the file itself may have changed the list
            sys.path.remove(str(path.parent))
    return module
