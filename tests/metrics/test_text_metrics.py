"""Metrics of texts against the libraries themselves, published formulas, and values that other programs gave."""

from __future__ import annotations

import re
import string

import jiwer
import pytest
import sacrebleu
from answers import answer, answers
from hypothesis import given, settings
from hypothesis import strategies as st

from vlft.metrics.anls import evaluate as anls
from vlft.metrics.error_rate import cer, wer
from vlft.metrics.exact_match import evaluate as exact_match
from vlft.metrics.exact_match import normalise
from vlft.metrics.ngrams import bleu, chrf
from vlft.metrics.rouge_l import evaluate as rouge_l
from vlft.metrics.rouge_l import words

SENTENCES = [
    ("The dog bit the man.", ["The dog bit the man.", "The dog had bit the man."]),
    ("It was not surprising.", ["It was not unexpected.", "No one was surprised."]),
    ("The man had bitten him first.", ["The man bit him first.", "The man had bitten the dog."]),
]
"""sacrebleu's own example (README), with other answers."""


@pytest.mark.parametrize(
    ("made", "wanted", "value"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("Coca  Cola\n", "coca cola", 1.0),
        ("abcd", "abxy", 0.0),  # NL = 0.5 reaches the threshold
        ("abcde", "abcxy", 1 - 2 / 5),
        ("$1,234.50", "1,234.50", 1 - 1 / 9),
        ("", "x", 0.0),
        ("Straße", "strasse", 1 - 2 / 7),
        ("北京市", "北京", 1 - 1 / 3),
    ],
)
def test_anls_is_the_paper_s_formula(made: str, wanted: str, value: float) -> None:
    assert anls(answers((made, wanted)))["anls"] == pytest.approx(value)


def test_anls_takes_the_best_of_a_record_s_references() -> None:
    one = answer("ITC Limited", "itc", answers=["itc", "itc limited", "ITC Ltd"])
    assert anls([one])["anls"] == 1.0
    assert anls([one, answer("nothing", "x")])["anls"] == 0.5
    assert anls([answer("ITC Limited", "itc limited", answers=["itc"])])["anls"] == 0.0, (
        "the list replaces the reference"
    )


# ------------------------------------------------------------------ cer, wer


def test_error_rates_by_hand() -> None:
    made = answers(("the cat sit", "the cat sat"), ("a dog", "a big dog"))
    assert wer(made)["wer"] == pytest.approx(2 / 6)
    assert cer(made)["cer"] == pytest.approx((1 + 4) / (11 + 9))
    assert wer(answers(("a b c", "a")))["wer"] == 2.0


def test_a_line_break_is_a_space() -> None:
    made = answers(("total\n12  EUR", "total 12\tEUR"))
    assert wer(made) == {"wer": 0.0}
    assert cer(made) == {"cer": 0.0}


TEXT = st.lists(st.text("abcé中", min_size=1, max_size=4), max_size=6).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_error_rates_are_jiwer_s(pairs: list[tuple[str, str]]) -> None:
    made, wanted = [p for p, _ in pairs], [r for _, r in pairs]
    assert wer(answers(*pairs))["wer"] == jiwer.wer(wanted, made)
    assert cer(answers(*pairs))["cer"] == jiwer.cer(wanted, made)


# ------------------------------------------------------------------ bleu, chrf


def test_bleu_and_chrf_are_sacrebleu_s_corpus_scores() -> None:
    made = [answer(text, refs[0], answers=refs) for text, refs in SENTENCES]
    texts, streams = [t for t, _ in SENTENCES], [[refs[i] for _, refs in SENTENCES] for i in range(2)]
    assert bleu(made)["bleu"] == sacrebleu.corpus_bleu(texts, streams).score
    assert chrf(made)["chrf"] == sacrebleu.corpus_chrf(texts, streams).score
    single = [answer(text, refs[0]) for text, refs in SENTENCES]
    assert bleu(single)["bleu"] == sacrebleu.corpus_bleu(texts, streams[:1]).score
    assert bleu(single) != bleu(made)


def test_records_may_have_different_numbers_of_references() -> None:
    made = [answer(SENTENCES[0][0], SENTENCES[0][1][0]), answer(SENTENCES[1][0], "", answers=SENTENCES[1][1])]
    texts, streams = [SENTENCES[0][0], SENTENCES[1][0]], [["The dog bit the man.", "It was not unexpected."]]
    more = [*streams, [None, "No one was surprised."]]
    assert bleu(made)["bleu"] == sacrebleu.corpus_bleu(texts, more).score
    assert chrf(made)["chrf"] == sacrebleu.corpus_chrf(texts, more).score
    assert chrf(made)["chrf"] != sacrebleu.corpus_chrf(texts, streams).score


def test_the_documented_signatures() -> None:
    """docs/metrics.md and the docstrings name them; a library that changes its defaults changes the values."""
    signatures = []
    for metric in (sacrebleu.BLEU(), sacrebleu.CHRF()):
        metric.corpus_score(["a"], [["a"]])
        signatures.append(str(metric.get_signature()).rpartition("|version")[0])
    assert signatures == [
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp",
        "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no",
    ]


def test_bleu_of_short_answers_is_zero_as_documented() -> None:
    assert bleu(answers(("red circle", "red circle")))["bleu"] == 0.0
    assert chrf(answers(("red circle", "red circle")))["chrf"] == 100.0


# ------------------------------------------------------------------ rouge_l

ROUGE_SCORE = [
    ("the cat sat on the mat", "the cat was on the mat", 0.833333333333),
    ("police killed the gunman", "the gunman police killed", 0.5),
    ("police kill the gunman", "police killed the gunman", 0.75),
    ("A b C", "c b a", 0.333333333333),
    ("x_y z", "x y z", 1.0),
    ("", "a", 0.0),
    ("Total: $1,234.50", "total 1 234 50", 1.0),
    ("don't stop", "do not stop", 0.333333333333),
    ("red-brick a the 3.5 cat Dog's", "sat the a sat Dog's the Dog's red-brick Dog's", 0.363636363636),
    ("12 cat Dog's bark a Dog's the the sat", "a on Dog's a on 12 bark sat Dog's", 0.454545454545),
    ("mat on a Dog's the mat cat on red-brick", "the bark 12 Dog's 3.5 on bark", 0.3),
    ("Dog's mat 3.5 red-brick mat bark the bark", "on a bark the mat cat cat the", 0.210526315789),
    ("red-brick cat cat sat sat mat Dog's", "on cat mat Dog's on", 0.533333333333),
    ("Dog's red-brick Dog's", "cat 3.5 red-brick mat mat the cat on", 0.25),
    ("mat bark mat sat red-brick", "cat mat the mat red-brick 3.5", 0.571428571429),
]
"""(answer, reference, F-measure) as rouge-score 0.1.2 gives it: `RougeScorer(["rougeL"], use_stemmer=False)`.

The second and third are Lin's examples (2004, section 3.1): recall of S2 is 3/4, of S3 2/4.
"""


@pytest.mark.parametrize(("made", "wanted", "value"), ROUGE_SCORE)
def test_rouge_l_is_rouge_score_s(made: str, wanted: str, value: float) -> None:
    assert rouge_l(answers((made, wanted)))["rouge_l"] == pytest.approx(value, abs=1e-9)


def test_rouge_l_takes_the_best_reference() -> None:
    assert rouge_l([answer("a b", "c", answers=["c", "a b c", "a x"])])["rouge_l"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Größe: 5µm", ["größe", "5µm"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("東京タワー 5", [*"東京タワ", "ー", "5"]),
        ("x_y -- z", ["x", "y", "z"]),
    ],
)
def test_words_of_any_script(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_rouge_l_of_texts_without_words() -> None:
    assert rouge_l(answers(("?", "?"), ("?", "!")))["rouge_l"] == 0.5


# ------------------------------------------------------------------ exact_match


def squads_normalize_answer(s: str) -> str:
    """Transcribed from SQuAD v1.1's evaluate-v1.1.py."""

    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text: str) -> str:
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


PIECES = st.sampled_from(
    ["the", "A", "an", "a", "-", ".", "'", "U.S.", "don't", "the-", "x", "É", "İ", "\n", " ", "。"]
)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(max_size=12) | st.lists(PIECES, max_size=8).map("".join) | st.lists(PIECES, max_size=8).map(" ".join)
)
def test_exact_match_normalises_as_squads_script(text: str) -> None:
    assert normalise(text) == squads_normalize_answer(text)


@pytest.mark.parametrize(
    ("made", "wanted", "equal"),
    [("U.S.", "US", True), ("the-end", "theend", True), ("the-end", "end", False), ("dont", "don't", True),
     ("A", "the", False), ("A", " A ", True), ("+", "-", False), ("an", "", False), ("", "", True)],
)  # fmt: skip
def test_exact_match_of_what_normalising_joins_or_empties(made: str, wanted: str, equal: bool) -> None:
    assert exact_match(answers((made, wanted)))["exact_match"] == equal
