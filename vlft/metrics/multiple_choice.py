"""Multiple choice: the letter that an answer chooses, against the reference's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vlft.metrics import Prediction
from vlft.metrics.exact_match import normalise

_OPTION = re.compile(r"(?:^|\n)[ \t]*\(?([A-J])[).:][ \t]*(\S[^\n]*)")
_INLINE = re.compile(r"(?<!\w)\(?([A-J])[).:]\s*(\S.*?)(?=[\s,;]+\(?[A-J][).:]\s|\n|$)")
_BARE = re.compile(r"[\s\W_]*([A-Za-z])[\s\W_]*")
_STATED = re.compile(
    r"(?i:answer|choice|option|choose|select)(?i:\s+(?:is|would be|should be))?\s*[:=]?\s*[\"'*(\[]*"
    r"([A-J](?![\w'\u2019])|[a-j](?=[\"*)\].,;:!]|\s*$))"
)
_LEADING = re.compile(r"\s*[*(\[]*([A-J])[*]*[).:\]]")
_BRACKETED = re.compile(r"\(([A-J])\)")
_ALONE = re.compile(r"(?<![\w'\u2019])([B-HJ])(?![\w'\u2019])")


def options(question: str) -> dict[str, str]:
    """Letter -> text of the choices in a question: `A. cat`, `(A) cat`, `A) cat` or `A: cat`, on lines or in one.

    Empty unless they begin with A and go on without a gap.
    """
    for pattern in (_OPTION, _INLINE):
        found = dict(pattern.findall(question))
        letters = "".join(sorted(found))
        if len(found) > 1 and "ABCDEFGHIJ".startswith(letters):
            return {letter: text.strip() for letter, text in found.items()}
    return {}


def choose(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, or None.

    In this order: the answer is a letter; it says "the answer is B" (the last time counts); it begins with `B.`, `B)`,
    `(B)`; it is the text of one choice; it holds `(B)`; a capital letter stands alone, A and I aside; it holds the text
    of one choice. Two different letters of one kind choose none.

    Args:
        choices: of `options`; empty means A to D with unknown texts.
    """
    letters = frozenset(choices) or frozenset("ABCD")
    if bare := _BARE.fullmatch(answer):
        letter = str(bare[1]).upper()
        return letter if letter in letters else None
    stated = [str(letter).upper() for letter in _STATED.findall(answer)]
    if said := [letter for letter in stated if letter in letters]:
        return said[-1]
    bracketed = frozenset[str](_BRACKETED.findall(answer)) & letters
    if (leading := _LEADING.match(answer)) and leading[1] in letters and bracketed <= {leading[1]}:
        return str(leading[1])
    plain = normalise(answer)
    if len(same := [letter for letter, text in choices.items() if plain and normalise(text) == plain]) == 1:
        return same[0]
    if held := bracketed or frozenset[str](_ALONE.findall(answer)) & letters:
        return min(held) if len(held) == 1 else None
    named = {letter for letter, text in choices.items() if normalise(text) and f" {normalise(text)} " in f" {plain} "}
    return named.pop() if len(named) == 1 else None


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`accuracy`, and `answered`: the share of answers that choose a letter at all; each in 0..1.

    The letter is taken by rules, as in MMMU's evaluation (Yue et al. 2024), but an answer without one is wrong instead
    of guessed. A reference without a letter (the choices are not in the question) is compared as text, normalised.
    """
    if not predictions:
        return {}
    right = answered = 0
    for p in predictions:
        choices = options(p.question)
        made, wanted = choose(p.prediction, choices), choose(p.reference, choices)
        answered += made is not None
        right += made == wanted if wanted is not None else normalise(p.prediction) == normalise(p.reference)
    return {"accuracy": right / len(predictions), "answered": answered / len(predictions)}
