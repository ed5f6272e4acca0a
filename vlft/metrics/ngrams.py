"""BLEU and chrF of translations and descriptions, over the whole corpus (sacrebleu)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from vlft.metrics import Prediction, library, references

_sacrebleu = library("sacrebleu.metrics", "bleu, chrf")


def _corpus(metric: Any, predictions: Sequence[Prediction]) -> float:
    """A corpus score. sacrebleu wants one list for the first references, one for the second, ...; None fills gaps."""
    streams = [list(stream) for stream in zip_longest(*(references(p) for p in predictions))]
    return float(metric.corpus_score([p.prediction for p in predictions], streams).score)


def bleu(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Corpus BLEU in 0..100, with all references of a record.

    Papineni et al. 2002; sacrebleu's default (Post 2018), signature case:mixed|eff:no|tok:13a|smooth:exp. A corpus in
    which no answer has four words scores 0, however right: take `chrf` there.
    """
    return {"bleu": _corpus(_sacrebleu.BLEU(), predictions)} if predictions else {}


def chrf(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Corpus chrF in 0..100 (chrF2: recall counts twice), with all references of a record.

    Popović 2015; sacrebleu's default, signature case:mixed|eff:yes|nc:6|nw:0|space:no. Characters, not words: right for
    every script.
    """
    return {"chrf": _corpus(_sacrebleu.CHRF(), predictions)} if predictions else {}
