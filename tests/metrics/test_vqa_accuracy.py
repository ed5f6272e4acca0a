"""The values of the authors' script (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py)."""

from __future__ import annotations

import pytest
from answers import answer, answers

from vlft.metrics.vqa_accuracy import accuracy, evaluate, normalise


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog", "dog"),
        ("a man and an apple", "man and apple"),
        ("Two", "2"),
        ("none", "0"),
        ("ten two-year-olds", "10 2 year olds"),
        ("dont", "don't"),
        ("shed've", "she'd've"),
        ("y'alld've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("shed", "shed"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes, sir", "yes sir"),
        ("yes,sir", "yes sir"),
        ("1,000", "1000"),
        ("1,000 left-hand", "1000 lefthand"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("what?!", "what"),
        ("\tred\nblue ", "red blue"),
        ("it's 5:30", "it's 5:30"),
        ("", ""),
        ("don’t", "don't"),  # typographic: ours
    ],
)
def test_normalisation_is_the_official_one(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(("people", "value"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_people_of_whom_some_say_yes(people: int, value: float) -> None:
    """The published table: 3 of 10 is 0.9, since leaving one of the three out leaves two."""
    given = ["yes"] * people + ["no"] * (10 - people)
    assert evaluate([answer("Yes.", "yes", answers=given)])["vqa_accuracy"] == pytest.approx(value)
    annotations = [{"answer": one, "answer_id": i, "answer_confidence": "yes"} for i, one in enumerate(given)]
    assert evaluate([answer("Yes.", "no", answers=annotations)])["vqa_accuracy"] == pytest.approx(value)


def test_the_mean_over_questions() -> None:
    made = [answer("yes", "yes", answers=["yes"] * 2 + ["no"] * 8), answer("2", "two", answers=["two"] * 10)]
    assert evaluate(made)["vqa_accuracy"] == pytest.approx(0.8)


def test_a_single_reference_is_compared() -> None:
    assert evaluate(answers(("the two", "2"), ("three", "2")))["vqa_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("given", "value"),
    [(["a1", "a1"], 1.0), (["a1", "b1"], 0.5), (["a1", "a1", "b1"], 2 / 3), (["a1"] * 4, 1.0), (["a1", *"bcd"], 0.25)],
)
def test_fewer_than_ten(given: list[str], value: float) -> None:
    assert accuracy("a1", given) == pytest.approx(value)
