"""ANLS: similarity by edit distance, forgiving small slips of reading and nothing worse (Biten et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from rapidfuzz.distance import Levenshtein

from vlft.metrics import Prediction, references

THRESHOLD = 0.5
"""An answer whose normalised distance reaches this scores 0."""


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def similarity(answer: str, reference: str) -> float:
    """1 - NL where NL, the edit distance over the longer length, is below the threshold, else 0."""
    distance = Levenshtein.normalized_distance(_plain(answer), _plain(reference))
    return 1.0 - distance if distance < THRESHOLD else 0.0


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Average normalised Levenshtein similarity, the best over a record's references; in 0..1.

    Case and the amount of white space do not count, as in the evaluation of DocVQA (Mathew et al. 2021). The formula is
    that of Biten et al. 2019, "Scene Text Visual Question Answering": exactly half right is 0, where the challenge's
    script gives 0.5.
    """
    if not predictions:
        return {}
    best = [max(similarity(p.prediction, one) for one in references(p)) for p in predictions]
    return {"anls": fsum(best) / len(best)}
