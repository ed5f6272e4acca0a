"""VQA accuracy: an answer is right as far as people gave it (Antol et al. 2015; Goyal et al. 2017)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import fsum

from vlft.metrics import Prediction, references

_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _lacking_an_apostrophe(words: Sequence[str]) -> dict[str, str]:
    """Each word with one of its apostrophes forgotten -> the word. Only "she'd've", not "she'd": "shed" is a word."""
    return {word[:at] + word[at + 1 :]: word for word in words for at, character in enumerate(word) if character == "'"}


_CONTRACTIONS = _lacking_an_apostrophe(_CONTRACTED)


def _without_punctuation(text: str) -> str:
    """A mark beside a space, or in a text with 1,000 in it, goes; any other becomes a space. The official rule."""
    thousands = bool(_DIGITS_COMMA.search(text))
    out = text
    for mark in _PUNCTUATION:
        beside_a_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_a_space or thousands else " ")
    return _PERIOD.sub("", out)


def normalise(text: str) -> str:
    """As the official evaluation: punctuation, number words to digits, no articles, apostrophes of contractions."""
    text = text.replace("\n", " ").replace("\t", " ").replace("’", "'").strip()
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, accepted: Sequence[str]) -> float:
    """The mean of min(matches / 3, 1) over all ways to leave one annotator out.

    With fewer than four references (the formula is made for ten) all the others must match; a single one is compared.
    """
    made, given = normalise(answer), [normalise(one) for one in accepted]
    if len(given) == 1:
        return float(made == given[0])
    matches, enough = given.count(made), min(3, len(given) - 1)
    return fsum(min((matches - (one == made)) / enough, 1.0) for one in given) / len(given)


def evaluate(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The official VQA accuracy over a record's ten answers; in 0..1.

    Antol et al. 2015, "VQA: Visual Question Answering"; normalisation and leave-one-out of the authors' vqaEval.py.
    References are normalised as fully as the prediction is (that script leaves articles and number words in them, so
    that "two" could never be answered), and a typographic apostrophe is an apostrophe.
    """
    if not predictions:
        return {}
    scores = [accuracy(p.prediction, references(p)) for p in predictions]
    return {"vqa_accuracy": fsum(scores) / len(scores)}
