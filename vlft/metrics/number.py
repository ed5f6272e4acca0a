"""Numeric answers: right within 5 % (ChartQA's relaxed accuracy), and right exactly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from vlft.metrics import Prediction, references

TOLERANCE = Decimal("0.05")
_ENGLISH = r"(?P<english>[1-9](?:\d{0,2}(?:,\d{3})+|\d?(?:,\d\d)+,\d{3})(?:\.\d+)?)"
"""1,234.5, and 12,34,567 as in India."""
_GERMAN = r"(?P<german>[1-9]\d{0,2}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,}))"
"""1.234,5 or 1.234.567; `1.234` alone is below."""
_SPACED = r"[1-9]\d{0,2}(?P<sep>['\u2019 ])\d{3}(?:(?P=sep)\d{3})*(?:[.,]\d+)?"
_VALUE = rf"(?:{_ENGLISH}|{_GERMAN}|{_SPACED}|\d+(?:[.,]\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}})?"
_MONEY = r"[$€£¥₹₩]|(?:USD|EUR|GBP|JPY|CNY|INR|CHF|US\$)"
_WRITTEN = re.compile(
    rf"(?<![\w.,])(?P<sign>[+-]?)\s?(?:(?:{_MONEY})\s?(?P<inner>[+-]?))?(?P<value>{_VALUE})"
    rf"(?:\s?(?P<percent>%)|\s?(?:{_MONEY}))?(?![\w%]|[.,]\d)"
)
_SPACES = str.maketrans({"\u2212": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\uff05": "%"})


def _decimal(match: re.Match[str]) -> Decimal:
    """The value of a match: separators out, a decimal comma to a point, percent to a fraction."""
    text = re.sub(r"['\u2019 ]", "", match["value"])
    if match["english"]:
        text = text.replace(",", "")
    elif match["german"]:
        text = text.replace(".", "")
    value = Decimal(text.replace(",", ".")) / (100 if match["percent"] else 1)
    return -value if "-" in (match["sign"], match["inner"]) else value


def parse(text: str) -> Decimal | None:
    """The number that the whole text is, or None.

    Understood: `1,234.5`, `1.234,5`, `1 234,5`, `1'234`, `12,34,567`, `.5`, `1e-3`, a sign, a percent sign (50% is
    0.5), a currency before or after. A single comma is a decimal comma (`3,5`) unless three digits follow (`1,234` is
    1234); a single point is always a decimal point (`1.234`). Words such as "million" and units are not read.
    """
    match = _WRITTEN.fullmatch(_clean(text))
    return _decimal(match) if match else None


def _clean(text: str) -> str:
    return text.translate(_SPACES).strip().rstrip(".")


def _answered(text: str) -> Decimal | None:
    """The number of an answer: the whole text, or the only number in it."""
    found = list(_WRITTEN.finditer(_clean(text)))
    whole = parse(text)
    return whole if whole is not None or len(found) != 1 else _decimal(found[0])


def correct(answer: str, reference: str) -> tuple[bool, bool]:
    """(within the tolerance, exactly). A reference that is no number must be equalled, case aside (ChartQA's rule)."""
    wanted = parse(reference)
    if wanted is None:
        same = answer.strip().lower() == reference.strip().lower()
        return same, same
    made = _answered(answer)
    if made is None:
        return False, False
    return abs(made - wanted) <= TOLERANCE * abs(wanted), made == wanted


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`relaxed_accuracy` (within 5 % of the reference) and `strict` (the same number), each in 0..1.

    Masry et al. 2022, "ChartQA", section 5.1, after Methani et al. 2020. With several references one must be met. More
    ways of writing a number are read than pix2struct's script does (`parse`); a reference 0 must be met exactly.
    """
    if not predictions:
        return {}
    pairs = [[correct(p.prediction, one) for one in references(p)] for p in predictions]
    relaxed = sum(any(near for near, _ in one) for one in pairs)
    strict = sum(any(same for _, same in one) for one in pairs)
    return {"relaxed_accuracy": relaxed / len(pairs), "strict": strict / len(pairs)}
