"""ChartQA's relaxed accuracy, and the ways in which numbers are written."""

from __future__ import annotations

from decimal import Decimal

import pytest
from answers import answer, answers
from hypothesis import assume, given
from hypothesis import strategies as st

from vlft.metrics.number import correct, evaluate, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"),
        (" -7. ", "-7"),
        ("−7", "-7"),
        ("+3", "3"),
        (".5", "0.5"),
        ("1e-3", "0.001"),
        ("1,234", "1234"),
        ("1,234,567.8", "1234567.8"),
        ("12,34,567", "1234567"),
        ("1 234,5", "1234.5"),
        ("1\u202f234\u202f567", "1234567"),
        ("1'234.5", "1234.5"),
        ("1.234,5", "1234.5"),
        ("1.234.567", "1234567"),
        ("1.234", "1.234"),
        ("3,5", "3.5"),
        ("0,500", "0.5"),
        ("1,2345", "1.2345"),
        ("50%", "0.5"),
        ("12,5 %", "0.125"),
        ("$1,234.50", "1234.5"),
        ("-$5", "-5"),
        ("€ 3,50", "3.5"),
        ("3,50 €", "3.5"),
        ("CHF 1'000", "1000"),
        ("007", "7"),
        ("١٢", "12"),
    ],
)
def test_a_number_is_read(text: str, value: str) -> None:
    assert parse(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "12 km",
        "1,234,56",
        "1,23,4",
        "2019-2020",
        "10²",
        "1/2",
        "v1.2.3",
        "1.2.3",
        "3 4",
        "--5",
        "5%%",
        "NaN",
    ],
)
def test_no_number(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("made", "wanted", "relaxed", "strict"),
    [
        ("105", "100", True, False),
        ("95", "100", True, False),
        ("105.01", "100", False, False),
        ("94.99", "100", False, False),
        ("-105", "-100", True, False),
        ("-100", "100", False, False),
        ("100.0", "100", True, True),
        ("0.3", "0.30", True, True),
        ("7%", "0.07", True, True),
        ("50", "50%", False, False),
        ("0", "0", True, True),
        ("0.0001", "0", False, False),
        ("The total is $1,234.50.", "1234.5", True, True),
        ("from 3 to 5", "3", False, False),
        ("no idea", "3", False, False),
        ("Yes", "yes", True, True),
        ("Group 20", "Group 21", False, False),
        ("2020", "2019", True, False),
    ],
)
def test_relaxed_and_strict(made: str, wanted: str, relaxed: bool, strict: bool) -> None:
    assert correct(made, wanted) == (relaxed, strict)


def test_shares_and_several_references() -> None:
    made = [*answers(("105", "100"), ("3", "3"), ("x", "3")), answer("7", "1", answers=["1", "7"])]
    assert evaluate(made) == {"relaxed_accuracy": 0.75, "strict": 0.5}


PLAIN = st.decimals(-10_000, 10_000, places=3)


def chartqa(target: float, prediction: float) -> bool:
    """Masry et al. 2022, 5.1: within 5 % of the gold answer."""
    return abs(prediction - target) / abs(target) <= 0.05


@given(PLAIN, st.decimals("0.9", "1.1", places=3))
def test_the_definition_on_plain_numbers(wanted: Decimal, factor: Decimal) -> None:
    made = wanted * factor
    assume(wanted)
    assume(abs(abs(factor - 1) - Decimal("0.05")) > Decimal("1e-6"))
    assert correct(f"{made:f}", f"{wanted:f}") == (chartqa(float(wanted), float(made)), made == wanted)


@given(st.integers(0, 10**12), st.integers(0, 99))
def test_separators_do_not_change_a_number(whole: int, cents: int) -> None:
    english = f"{whole:,}.{cents:02}"
    value = Decimal(f"{whole}.{cents:02}")
    german = english.translate(str.maketrans(",.", ".,"))
    assert parse(english) == parse(german) == parse(english.replace(",", "'")) == value
    assert parse(german.replace(".", " ")) == parse(f"${english}") == parse(f"{german} €") == value
