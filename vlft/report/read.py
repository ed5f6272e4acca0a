"""A run folder as plain values. Tolerant: a line cut by a kill is dropped, a missing file is an empty part of the page.

Nothing here trusts the folder: numbers that are none are dropped, and a picture is read only if its name stays inside
gallery/ and it is a JPEG. Schema of every file: docs/run-folder.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlft.errors import ConfigError
from vlft.metrics import lower_is_better

_LARGEST_PICTURE = 4 * 2**20
"""Bytes of a thumbnail; a larger file in gallery/ is not one of ours."""


@dataclass(frozen=True)
class Curve:
    """Values over steps; both have the same length, steps ascend."""

    steps: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class Histogram:
    edges: tuple[float, ...]
    counts: tuple[float, ...]
    """One fewer than edges."""


@dataclass(frozen=True)
class Unused:
    """A sample that was not used."""

    dataset: str
    id: str
    reason: str
    message: str
    step: int


@dataclass(frozen=True)
class DataFacts:
    """data.json: what the run read."""

    datasets: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """name -> samples to train on, samples held out."""
    tokens: Histogram | None = None
    pictures: Histogram | None = None
    """Megapixels of the pictures."""
    pictures_per_sample: Mapping[str, int] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    jpeg: bytes
    width: int
    """Of the picture as the model sees it, which box coordinates refer to; the file is smaller."""
    height: int


@dataclass(frozen=True)
class Shown:
    """A held-out sample of the gallery, with the answers by step."""

    dataset: str
    id: str
    question: str
    reference: str
    pictures: tuple[Picture, ...]
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Best:
    metric: str
    step: int
    value: float
    higher: bool
    """Whether large values are the good ones."""


@dataclass(frozen=True)
class RunFacts:
    """Everything that the report says about one run."""

    root: Path
    name: str
    options: Mapping[str, Any]
    card: Mapping[str, Any]
    curves: Mapping[str, Curve]
    """Of the train lines: "loss", "dataset_loss/NAME", "learning_rate/PART", "grad_norm", "grad_norms/PART",
    "perf/KEY", "epoch", "tokens", "samples"."""
    evals: Mapping[str, Curve]
    """Of the eval lines, by their key: "eval/DATASET/loss", "eval/DATASET/SCRIPT/METRIC"."""
    eval_seconds: float
    failed: Mapping[str, str]
    """"DATASET/SCRIPT" -> why it could not score at the last evaluation at which it could not."""
    skipped: Mapping[str, int]
    """Reason -> steps that did not update the weights."""
    unused: tuple[Unused, ...]
    data: DataFacts
    boxes: str
    """"relative1000" or "resized_pixels": what the numbers of a box count."""
    gallery: tuple[Shown, ...]
    before_step: int | None
    after_step: int | None
    best: Best | None
    checkpoints: tuple[int, ...]
    """Steps whose checkpoint is in the folder."""
    proved: Mapping[str, tuple[int, int, int]]
    """Part -> step in which it was seen to train, its tensors, how many of them moved."""
    result: bool
    """Whether model/ is there."""

    @property
    def last_step(self) -> int:
        return int(max((c.steps[-1] for c in (self.curves.get("loss"), self.curves.get("tokens")) if c), default=0))


def read(root: Path) -> RunFacts:
    """Raises: ConfigError if the folder is no run, neither run.yaml nor metrics.jsonl being there."""
    if not (root / "run.yaml").is_file() and not (root / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{root} is not the folder of a run: it has neither run.yaml nor metrics.jsonl; name an --output_dir."
        )
    lines = list(_lines(root / "metrics.jsonl"))
    train = _by_step([line for line in lines if line.get("kind") == "train"])
    evals = _by_step([line for line in lines if line.get("kind") == "eval"])
    found = _curves(evals, lambda line: ((k, v) for k, v in line.items() if k.startswith("eval/")))
    best = _best(root, found)
    steps = _evaluated_steps(root, {int(line["step"]) for line in evals})
    before, after = _before_and_after(steps, best)
    boxes, gallery = _gallery(root, before, after)
    card, state = _json(root / "run_card.json"), _newest_state(root)
    return RunFacts(
        root=root, name=root.resolve().name, options=_options(root / "run.yaml"), card=card,
        curves=_curves(train, _train_values), evals=found,
        eval_seconds=sum(_number(_mapping(line.get("perf")).get("eval_seconds")) or 0.0 for line in evals),
        failed={str(k): str(v) for line in evals for k, v in _mapping(line.get("failed")).items()},
        skipped=dict(Counter(str(line["skipped"]) for line in train if line.get("skipped"))),
        unused=tuple(_ledger(root / "ledger.jsonl")), data=_data(_json(root / "data.json")), boxes=boxes,
        gallery=gallery, before_step=before, after_step=after, best=best, checkpoints=_checkpoints(root),
        proved=_proved(state.get("proved")), result=(root / "model").is_dir(),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Files, whole or not.
# ---------------------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(_mapping(json.loads(_text(path) or "{}")))
    except ValueError:
        return {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in _text(path).split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def _options(path: Path) -> dict[str, Any]:
    try:
        return {str(k): v for k, v in _mapping(yaml.safe_load(_text(path))).items() if k != "schema"}
    except yaml.YAMLError:
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _number(value: Any) -> float | None:
    """A finite number, or nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def _count(value: Any) -> int:
    return int(_number(value) or 0)


# ---------------------------------------------------------------------------------------------------------------------
# metrics.jsonl, best.json
# ---------------------------------------------------------------------------------------------------------------------


def _by_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of the steps; of two lines of one step the later one counts (a resume wrote it again)."""
    last = {int(line["step"]): line for line in lines if _number(line.get("step")) is not None}
    return [last[step] for step in sorted(last)]


def _train_values(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("loss", "grad_norm", "epoch", "tokens", "samples", "padding"):
        yield key, line.get(key)
    for key in ("dataset_loss", "learning_rate", "grad_norms", "perf"):
        for name, value in _mapping(line.get(key)).items():
            yield f"{key}/{name}", value


def _curves(
    lines: Sequence[Mapping[str, Any]], values: Callable[[Mapping[str, Any]], Iterator[tuple[str, Any]]]
) -> dict[str, Curve]:
    points: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for key, value in values(line):
            number = _number(value)
            if number is not None:
                steps, found = points.setdefault(key, ([], []))
                steps.append(int(line["step"]))
                found.append(number)
    return {key: Curve(tuple(steps), tuple(found)) for key, (steps, found) in points.items()}


def higher_is_better(metric: str) -> bool:
    """By the name alone, which is all that a metric tells; as a run decides with --metric_for_best."""
    return not lower_is_better(metric)


def _best(root: Path, evals: Mapping[str, Curve]) -> Best | None:
    """What best.json says; where it does not say the direction, its value's place on the curve or the name does."""
    found = _json(root / "best.json")
    metric, step, value = found.get("metric"), _number(found.get("step")), _number(found.get("value"))
    if not isinstance(metric, str) or step is None or value is None:
        return None
    values, higher = evals.get(metric, Curve()).values, higher_is_better(metric)
    if isinstance(found.get("greater_is_better"), bool):
        higher = found["greater_is_better"]
    elif values and min(values) < max(values) and value in (min(values), max(values)):
        higher = value == max(values)
    return Best(metric, int(step), value, higher)


def best_point(curve: Curve, *, higher: bool) -> tuple[int, float]:
    """Step and value of the first best point of a curve that has one."""
    value = max(curve.values) if higher else min(curve.values)
    return int(curve.steps[curve.values.index(value)]), value


# ---------------------------------------------------------------------------------------------------------------------
# Data, ledger, checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def _histogram(value: Any) -> Histogram | None:
    edges = [_number(x) for x in _sequence(_mapping(value).get("edges"))]
    counts = [_number(x) for x in _sequence(_mapping(value).get("counts"))]
    good_edges, good_counts = [x for x in edges if x is not None], [x for x in counts if x is not None]
    whole = len(good_edges) == len(edges) == len(counts) + 1 and len(good_counts) == len(counts)
    return Histogram(tuple(good_edges), tuple(good_counts)) if whole and any(good_counts) else None


def _data(found: Mapping[str, Any]) -> DataFacts:
    datasets = {n: _mapping(d) for n, d in _mapping(found.get("datasets")).items()}
    return DataFacts(
        datasets={n: (_count(d.get("train")), _count(d.get("held_out"))) for n, d in datasets.items()},
        tokens=_histogram(found.get("tokens")),
        pictures=_histogram(found.get("pictures")),
        pictures_per_sample={k: _count(v) for k, v in _mapping(found.get("pictures_per_sample")).items()},
        unused={k: _count(v) for k, v in _mapping(found.get("unused")).items()},
    )


def _ledger(path: Path) -> Iterator[Unused]:
    for line in _lines(path):
        dataset, name, reason, message = (str(line.get(key, "")) for key in ("dataset", "id", "reason", "message"))
        yield Unused(dataset, name, reason, message, _count(line.get("step")))


def _checkpoints(root: Path) -> tuple[int, ...]:
    found = []
    for state in (root / "checkpoints").glob("step-*/state.json"):
        with suppress(ValueError):
            found.append(int(state.parent.name.removeprefix("step-")))
    return tuple(sorted(found))


def _newest_state(root: Path) -> dict[str, Any]:
    steps = _checkpoints(root)
    return _json(root / "checkpoints" / f"step-{steps[-1]:06d}" / "state.json") if steps else {}


def _proved(value: Any) -> dict[str, tuple[int, int, int]]:
    found = {}
    for part, facts in _mapping(value).items():
        numbers = [_count(n) for n in _sequence(facts)]
        if len(numbers) == 3:
            found[part] = (numbers[0], numbers[1], numbers[2])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Gallery and answers
# ---------------------------------------------------------------------------------------------------------------------


def _evaluated_steps(root: Path, evaluated: Collection[int]) -> list[int]:
    """Steps with answers on disk, ascending; answers without a line are of a course that a resume has left."""
    found = []
    for folder in (root / "eval").glob("step-*"):
        with suppress(ValueError):
            step = int(folder.name.removeprefix("step-"))
            if step in evaluated and any(folder.glob("*.jsonl")):
                found.append(step)
    return sorted(found)


def _before_and_after(steps: Sequence[int], best: Best | None) -> tuple[int | None, int | None]:
    """The lowest step, and the best one where it is known and a later one, else the highest."""
    before = steps[0] if len(steps) > 1 or 0 in steps else None
    later = [step for step in steps if step != before]
    after = best.step if best and best.step in later else later[-1] if later else None
    return before, after


def _answers(root: Path, step: int | None, dataset: str) -> dict[str, str]:
    """id -> what the model wrote; a data set's name that leaves the folder finds nothing."""
    if step is None or Path(dataset).name != dataset:
        return {}
    lines = _lines(root / "eval" / f"step-{step:06d}" / f"{dataset}.jsonl")
    return {str(line.get("id")): str(line.get("prediction", "")) for line in lines}


def _gallery(root: Path, before: int | None, after: int | None) -> tuple[str, tuple[Shown, ...]]:
    """What the numbers of a box count, and the samples."""
    found = _json(root / "gallery" / "gallery.json")
    samples = [_mapping(s) for s in _sequence(found.get("samples"))]
    names = {str(s.get("dataset", "")) for s in samples}
    first = {name: _answers(root, before, name) for name in names}
    last = {name: _answers(root, after, name) for name in names}
    shown = []
    for sample in samples:
        dataset, name = str(sample.get("dataset", "")), str(sample.get("id", ""))
        shown.append(
            Shown(
                dataset, name, str(sample.get("question", "")), str(sample.get("reference", "")),
                tuple(_pictures(root / "gallery", sample.get("pictures"))),
                before=first[dataset].get(name), after=last[dataset].get(name),
            )
        )  # fmt: skip
    return str(found.get("boxes", "")), tuple(shown)


def _pictures(folder: Path, value: Any) -> Iterator[Picture]:
    for entry in _sequence(value):
        facts = _mapping(entry)
        name, width, height = str(facts.get("file", "")), _count(facts.get("width")), _count(facts.get("height"))
        path = folder / name
        # A folder that someone sent may name /etc/passwd here; the page would carry it on.
        if Path(name).name != name or path.is_symlink() or not path.is_file() or width < 1 or height < 1:
            continue
        if path.stat().st_size <= _LARGEST_PICTURE and (jpeg := path.read_bytes()).startswith(b"\xff\xd8\xff"):
            yield Picture(jpeg, width, height)
