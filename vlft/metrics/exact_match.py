"""Share of answers that equal the reference, strictly and after normalising case, articles, punctuation and spaces."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from vlft.metrics import Prediction

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """As SQuAD v1.1's official script (Rajpurkar et al. 2016), in its order: lower case, no punctuation (nothing takes
    its place), no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def same(answer: str, reference: str) -> bool:
    """Whether they are equal once normalised; where that leaves nothing of either ("A", "-"), as they stand."""
    made, wanted = normalise(answer), normalise(reference)
    return made == wanted if made or wanted else answer.strip() == reference.strip()


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`exact_match` (normalised) and `strict` (to the letter, outer spaces aside), each in 0..1."""
    if not predictions:
        return {}
    hits = [same(p.prediction, p.reference) for p in predictions]
    strict = [p.prediction.strip() == p.reference.strip() for p in predictions]
    return {"exact_match": sum(hits) / len(hits), "strict": sum(strict) / len(strict)}
