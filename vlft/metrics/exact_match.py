"""Share of answers that equal the reference, strictly and after normalising case, articles, punctuation and spaces."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from vlft.metrics import Prediction

_DROPPED = re.compile(rf"\b(a|an|the)\b|[{re.escape(string.punctuation)}]")


def normalise(text: str) -> str:
    """As SQuAD's evaluation does (Rajpurkar et al. 2016): lower case, no articles, no punctuation, single spaces."""
    return " ".join(_DROPPED.sub(" ", text.lower()).split())


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`exact_match` (normalised) and `strict` (to the letter, outer spaces aside), each in 0..1."""
    if not predictions:
        return {}
    hits = [normalise(p.prediction) == normalise(p.reference) for p in predictions]
    strict = [p.prediction.strip() == p.reference.strip() for p in predictions]
    return {"exact_match": sum(hits) / len(hits), "strict": sum(strict) / len(strict)}
