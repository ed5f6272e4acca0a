"""Fields by hand, Donut's F1, and answers that are no JSON."""

from __future__ import annotations

import json

import pytest
from answers import answers

from vlft.metrics.json_f1 import evaluate, flatten

RECEIPT = {"menu": [{"nm": "Tea", "price": "2.50"}, {"nm": "Cake", "price": "4.00"}], "total": {"sum": "6.50"}}


def f1(made: str, wanted: object) -> float:
    return evaluate(answers((made, json.dumps(wanted))))["f1"]


def test_flat_fields_of_a_receipt() -> None:
    assert sorted(flatten(RECEIPT).elements()) == [
        (".menu.nm", "Cake"),
        (".menu.nm", "Tea"),
        (".menu.price", "2.50"),
        (".menu.price", "4.00"),
        (".total.sum", "6.50"),
    ]


def test_by_hand() -> None:
    made = {"menu": [{"nm": "Cake", "price": "4.00"}, {"nm": "Tee", "price": "2.50"}], "date": "today"}
    found = evaluate(answers((json.dumps(made), json.dumps(RECEIPT))))
    assert found == {"precision": 3 / 5, "recall": 3 / 5, "f1": 3 / 5, "valid": 1.0, "scored": 1.0}
    fewer = evaluate(answers(('{"total": {"sum": 6.5}}', '{"total": {"sum": "6.5", "tax": 1}}')))
    assert (fewer["precision"], fewer["recall"], fewer["f1"]) == (1.0, 0.5, pytest.approx(2 / 3))


def test_fields_count_together_not_records() -> None:
    found = evaluate(answers(('{"a": 1}', '{"a": 1}'), ("{}", '{"a": 1, "b": 2, "c": 3}')))
    assert found["recall"] == 1 / 4
    assert found["f1"] == 2 * 1 / (2 + 4)


@pytest.mark.parametrize(
    "made",
    [
        '{"a": [1, 2]}',
        '```json\n{"a": [1, 2]}\n```',
        'Here it is:\n```\n{"a": [2, 1.0]}\n```\nDone.',
        '```JSON {"a": ["1", 2]}',
        '{"a": [" 1 ", "2"]}',
    ],
)
def test_the_same_fields(made: str) -> None:
    assert f1(made, {"a": [1, 2]}) == 1.0


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        ('{"a": 1}', {"b": 1}),
        ('{"a": "X"}', {"a": "x"}),
        ('{"a.b": 1}', {"a": {"b": 1}}),
        ('{"a": {}}', {"a": []}),
        ('{"a": true}', {"a": 1}),
        ('{"a": 1', {"a": 1}),
        ("", {"a": 1}),
        ("[" * 100_000, {"a": 1}),
        ("9" * 5000, {"a": 1}),
    ],
)
def test_other_fields(made: str, wanted: object) -> None:
    assert f1(made, wanted) == 0.0


def test_a_value_given_twice_counts_once() -> None:
    found = evaluate(answers(('{"a": [1, 1, 1]}', '{"a": [1, 2]}')))
    assert (found["precision"], found["recall"]) == (1 / 3, 1 / 2)


def test_what_is_no_json_counts_as_empty() -> None:
    found = evaluate(answers(("no idea", '{"a": 1}'), ('{"a": 1}', '{"a": 1}'), ('{"a": 1}', "plain text")))
    assert found == {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "valid": 0.5, "scored": 2 / 3}
    assert set(evaluate(answers(("a", "b"))).values()) == {0.0}


def test_unicode() -> None:
    assert f1('{"名前": "\\u5c71田"}', {"名前": "山田"}) == 1.0
