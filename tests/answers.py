"""Predictions for the tests of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlft.metrics import Prediction


def answer(made: str, wanted: str, answers: Sequence[Any] | None = None, question: str = "What?") -> Prediction:
    record = {} if answers is None else {"answers": list(answers)}
    return Prediction("7", question, made, wanted, (), record)


def answers(*pairs: tuple[str, str]) -> list[Prediction]:
    """(prediction, reference) each."""
    return [answer(made, wanted) for made, wanted in pairs]
