"""IoU by hand, the best matching against all matchings, and every way in which the families write boxes."""

from __future__ import annotations

from itertools import permutations

import pytest
from answers import answer, answers
from hypothesis import given, settings
from hypothesis import strategies as st

from vlft.boxes import Box
from vlft.family import FAMILIES
from vlft.metrics.box_iou import evaluate, match


@pytest.mark.parametrize(
    ("made", "wanted", "iou"),
    [
        ("[0, 0, 10, 10]", "[0, 0, 10, 10]", 1.0),
        ("[0, 0, 10, 10]", "[5, 0, 15, 10]", 50 / 150),
        ("[0, 0, 10, 10]", "[5, 5, 15, 15]", 25 / 175),
        ("[0, 0, 10, 10]", "[2, 2, 4, 4]", 4 / 100),
        ("[0, 0, 10, 10]", "[10, 0, 20, 10]", 0.0),
        ("[5, 5, 5, 9]", "[5, 5, 5, 9]", 1.0),  # without area, but the same
        ("[9, 9, 1, 1]", "[1, 1, 9, 9]", 0.0),  # corners the wrong way round
        ("(0,0),(10,10)", "[5, 0, 15, 10]", 1 / 3),
        ('```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]\n```', "(5,0),(15,10)", 1 / 3),
        ("the cat(0,0),(10,10)", "<|box_start|>(5,0),(15,10)<|box_end|>", 1 / 3),
        ("It is at [0.5, 0.25, 0.75, 1.0].", "[0.5, 0.25, 0.75, 1]", 1.0),
    ],
)
def test_iou_of_one_box(made: str, wanted: str, iou: float) -> None:
    found = evaluate(answers((made, wanted)))
    hit = float(iou >= 0.5)
    assert found == {"iou": pytest.approx(iou), "precision": hit, "recall": hit, "with_boxes": 1.0}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_every_family_s_own_writing(family: object) -> None:
    text = f"It is {family.box_template.format(x1=1, y1=2, x2=30, y2=40)}."  # type: ignore[attr-defined]
    decoded = text.replace("<|box_start|>", "").replace("<|box_end|>", "")
    assert evaluate(answers((decoded, text)))["iou"] == 1.0


def test_the_threshold_is_reached_at_one_half() -> None:
    half = evaluate(answers(("[0, 0, 10, 5]", "[0, 0, 10, 10]")))
    assert (half["iou"], half["recall"]) == (0.5, 1.0)
    assert evaluate(answers(("[0, 0, 10, 4]", "[0, 0, 10, 10]")))["recall"] == 0.0


def test_the_matching_is_one_to_one_and_the_best() -> None:
    """Greedy would give the first box its nearest partner, and leave nothing for the second."""
    made = "[0, 0, 10, 10] [0, 0, 10, 6]"
    wanted = "[0, 0, 10, 8] [0, 3, 10, 13]"
    found = evaluate(answers((made, wanted)))
    assert found["iou"] == pytest.approx((7 / 13 + 6 / 8) / 2)
    assert evaluate(answers(("[0, 0, 9, 9] [0, 0, 9, 9] [0, 0, 9, 9]", "[0, 0, 9, 9]"))) == {
        "iou": 1.0,
        "precision": pytest.approx(1 / 3),
        "recall": 1.0,
        "with_boxes": 1.0,
    }


def test_boxes_count_over_all_records() -> None:
    made = answers(
        ("[0, 0, 10, 10]", "[0, 0, 10, 10] [50, 50, 60, 60]"), ("[1, 1, 2, 2]", "none"), ("no idea", "[0, 0, 1, 1]")
    )
    found = evaluate(made)
    assert found == {
        "iou": pytest.approx(1 / 3),
        "precision": 0.5,
        "recall": pytest.approx(1 / 3),
        "with_boxes": pytest.approx(2 / 3),
    }


def test_labels_must_agree_where_both_have_one() -> None:
    def labelled(*pairs: tuple[int, str]) -> str:
        return "[" + ", ".join(f'{{"bbox_2d": [{x}, 0, {x + 10}, 10], "label": "{label}"}}' for x, label in pairs) + "]"

    wanted = labelled((0, "cat"), (50, "dog"))
    assert evaluate(answers((labelled((0, "Cat"), (50, "dog")), wanted)))["iou"] == 1.0
    assert evaluate(answers((labelled((0, "dog"), (50, "cat")), wanted)))["iou"] == 0.0
    assert evaluate(answers((labelled((0, "dog"), (3, "cat")), wanted)))["iou"] == pytest.approx(70 / 130 / 2)
    assert evaluate(answers(("[0, 0, 10, 10] [50, 0, 60, 10]", wanted)))["iou"] == 1.0
    assert evaluate(answers((wanted[:-30], wanted)))["iou"] >= 0.5, "cut off by the limit on new tokens"


def test_without_boxes_all_is_zero() -> None:
    assert set(evaluate([answer("a", "b"), answer("[1, 2, 3, 4]", "b")]).values()) == {0.0}


BOX = st.tuples(*[st.integers(0, 12)] * 4).map(lambda b: Box(b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=150, deadline=None)
@given(st.lists(BOX, min_size=1, max_size=4), st.lists(BOX, min_size=1, max_size=4))
def test_no_matching_has_a_larger_sum(made: list[Box], wanted: list[Box]) -> None:
    def overlap(a: Box, b: Box) -> float:
        """Counted cell by cell."""
        cells = [{(x, y) for x in range(int(c.x1), int(c.x2)) for y in range(int(c.y1), int(c.y2))} for c in (a, b)]
        union = cells[0] | cells[1]
        return len(cells[0] & cells[1]) / len(union) if union else float(a == b)

    few, many = sorted((made, wanted), key=len)
    best = max(
        sum(1.0 if a == b else overlap(a, b) for a, b in zip(few, order, strict=True))
        for order in permutations(many, len(few))
    )
    assert sum(match(made, wanted)) == pytest.approx(best)
