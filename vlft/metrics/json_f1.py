"""Fields of a JSON answer that are right: precision, recall, F1 (documents, forms, receipts)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlft.metrics import Prediction, share

_FENCE = re.compile(r"```(?:json)?\s*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

Fields = Counter[tuple[str, str]]
"""How often each (path, value) occurs."""


def parse(text: str) -> Any:
    """The JSON value of an answer, out of a ```json fence if there is one.

    Raises:
        ValueError: it is not JSON.
    """
    fenced = _FENCE.search(text)
    try:
        return json.loads(fenced[1] if fenced else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def flatten(value: Any) -> Fields:
    """(path, value) of each leaf, as Donut does: lists leave no trace in the path, so rows may come in any order.

    A number equals its text (12, 12.0 and "12"); texts are compared without outer spaces. An empty object or list is a
    leaf too.
    """
    fields: Fields = Counter()
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, one = waiting.pop()
        if isinstance(one, dict) and one:
            waiting += [(f"{path}.{_escaped(key)}", inner) for key, inner in one.items()]
        elif isinstance(one, list) and one:
            waiting += [(path, inner) for inner in one]
        else:
            fields[path, _leaf(one)] += 1
    return fields


def _escaped(key: str) -> str:
    """So that {"a.b": 1} is not {"a": {"b": 1}}."""
    return json.dumps(key) if re.search(r'[."]', key) else key


def _leaf(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)


def _read(text: str) -> Fields | None:
    try:
        return flatten(parse(text))
    except ValueError:
        return None


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`precision`, `recall`, `f1` of all fields together, `valid` and `scored`, each in 0..1.

    Kim et al. 2022 (Donut): 2 TP / (2 TP + FP + FN) over flattened fields. `scored` is the share of records whose
    reference is JSON; the others are left out. `valid` is the share of answers, among those, that are JSON; one that is
    not counts as having no field.
    """
    if not predictions:
        return {}
    pairs = [(_read(p.prediction), wanted) for p in predictions if (wanted := _read(p.reference)) is not None]
    right = sum((made & wanted).total() for made, wanted in pairs if made is not None)
    made_fields = sum(made.total() for made, _ in pairs if made is not None)
    wanted_fields = sum(wanted.total() for _, wanted in pairs)
    return {
        "precision": share(right, made_fields),
        "recall": share(right, wanted_fields),
        "f1": share(2 * right, made_fields + wanted_fields),
        "valid": share(sum(made is not None for made, _ in pairs), len(pairs)),
        "scored": share(len(pairs), len(predictions)),
    }
