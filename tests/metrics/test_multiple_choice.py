"""Which letter an answer chooses."""

from __future__ import annotations

import pytest
from answers import answer

from vlft.metrics.multiple_choice import choose, evaluate, options

QUESTION = "Which animal?\nA. cat\nB. dog\nC. a big cat\nD. none of these"
CHOICES = {"A": "cat", "B": "dog", "C": "a big cat", "D": "none of these"}


@pytest.mark.parametrize(
    ("question", "found"),
    [
        (QUESTION, CHOICES),
        ("Which?\n(A) cat\n(B) dog", {"A": "cat", "B": "dog"}),
        ("Which? (A) cat (B) dog (C) cow", {"A": "cat", "B": "dog", "C": "cow"}),
        ("Which? A) red, B) blue", {"A": "red", "B": "blue"}),
        ("Which?\n A: 1.5\n B: 2.5\nAnswer with the letter.", {"A": "1.5", "B": "2.5"}),
        ("Which?\nA. 猫\nB. 犬", {"A": "猫", "B": "犬"}),
        ("Is plan A. better?", {}),
        ("B. dog\nC. cow", {}),
        ("What colour?", {}),
    ],
)
def test_options_of_a_question(question: str, found: dict[str, str]) -> None:
    assert options(question) == found


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            (text, "B")
            for text in (
                "B",
                "b",
                " (B) ",
                "B.",
                "**B**",
                "[b]",
                "B. dog",
                "(B) dog",
                "B: a dog",
                "**B.** dog",
                "(B) not A",
            )
        ),
        *((text, "B") for text in ("The answer is B", "answer: (b).", "ANSWER: B", "I choose B", "Option B, clearly")),
        ("The correct answer is **A**.", "A"),
        ("At first answer A, but the answer is C.", "C"),
        ("dog", "B"),
        ("A big cat", "C"),
        ("It is surely a dog.", "B"),
        ("The answer is a dog", "B"),
        ("It must be (D), since nothing fits", "D"),
        ("I think B", "B"),
        ("A dog", "B"),
        ("(A) or (B)", None),
        ("B or C", None),
        ("E", None),
        ("I", None),
        ("", None),
        ("who knows", None),
        ("DOGMA", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert choose(text, CHOICES) == letter


@pytest.mark.parametrize(("text", "letter"), [("d", "D"), ("The answer is C", "C"), ("A dog", None), ("E", None)])
def test_without_choices_in_the_question(text: str, letter: str | None) -> None:
    assert choose(text, {}) == letter


def test_shares() -> None:
    pairs = [("B", "B"), ("dog", "B. dog"), ("C", "b"), ("no idea", "B"), ("A big cat", "a big cat")]
    made = [answer(*pair, question=QUESTION) for pair in pairs]
    assert evaluate(made) == {"accuracy": 3 / 5, "answered": 4 / 5}


def test_a_reference_without_a_letter_is_compared_as_text() -> None:
    assert evaluate([answer("The Louvre.", "louvre"), answer("Orsay", "louvre")])["accuracy"] == 0.5
