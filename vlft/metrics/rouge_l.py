"""ROUGE-L: the longest common subsequence of words, for summaries and descriptions (Lin 2004)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from math import fsum

from rapidfuzz.distance import LCSseq

from vlft.metrics import Prediction, references

_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
"""Kana and Han: each character is a word, since no space tells words apart."""


def words(text: str) -> list[str]:
    """Lower-case runs of letters, digits and their marks, of any script; no stemming.

    On ASCII these are rouge-score's, which drops every other letter.
    """
    kept = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower())
    return _UNSPACED.sub(r" \1 ", kept).split()


def f_measure(answer: str, reference: str) -> float:
    """2PR / (P + R) of the common subsequence; texts without any word are alike only if they are equal."""
    made, wanted = words(answer), words(reference)
    if not made and not wanted:
        return float(answer.strip() == reference.strip())
    return 2.0 * LCSseq.similarity(made, wanted) / (len(made) + len(wanted))


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Mean F-measure of ROUGE-L, the best over a record's references; in 0..1.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", with beta 1 as rouge-score's `rougeL` without
    stemming; the subsequence is found by rapidfuzz.
    """
    if not predictions:
        return {}
    best = [max(f_measure(p.prediction, one) for one in references(p)) for p in predictions]
    return {"rouge_l": fsum(best) / len(best)}
