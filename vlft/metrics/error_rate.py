"""Character and word error rate of read texts (jiwer)."""

from __future__ import annotations

from collections.abc import Sequence

from vlft.metrics import Prediction, library

_jiwer = library("jiwer", "cer, wer")


def _pairs(predictions: Sequence[Prediction]) -> tuple[list[str], list[str]]:
    """References and predictions, with any white space as one space: jiwer takes a line break for a part of a word."""
    return [" ".join(p.reference.split()) for p in predictions], [" ".join(p.prediction.split()) for p in predictions]


def cer(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Character error rate: edits over the characters of all references; 0 is perfect, long answers exceed 1.

    Case and punctuation count. Morris, Maier and Green 2004 compare such rates; computed by jiwer.
    """
    return {"cer": float(_jiwer.cer(*_pairs(predictions)))} if predictions else {}


def wer(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Word error rate: edits over the words of all references; 0 is perfect, long answers exceed 1.

    Words are what spaces separate, so for scripts without spaces take `cer`. Case and punctuation count. Computed by
    jiwer.
    """
    return {"wer": float(_jiwer.wer(*_pairs(predictions)))} if predictions else {}
