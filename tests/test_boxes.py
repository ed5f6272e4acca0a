"""Boxes as Qwen-VL writes them, and what else looks like one."""

from __future__ import annotations

import pytest

from vlft.boxes import CONVENTIONS, Box, ends, iou, parse
from vlft.family import FAMILIES


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("(10,20),(30,40)", [Box(10, 20, 30, 40)]),
        ("the cat(10,20),(30,40) and (1,2), (3,4)", [Box(10, 20, 30, 40), Box(1, 2, 3, 4)]),
        ("[1, 2,3.5 ,4]", [Box(1, 2, 3.5, 4)]),
        ('```json\n[{"bbox_2d": [5, 6, 7, 8], "label": "a \\"b\\""}]\n```', [Box(5, 6, 7, 8, 'a "b"')]),
        (
            '{"label": "x", "bbox_2d": [5, 6, 7, 8]}, {"bbox_2d": [9, 6, 70, 80], "la',
            [Box(5, 6, 7, 8, "x"), Box(9, 6, 70, 80)],
        ),
        ('{"bbox_2d": [1, 2, 3, 4], "label": 7} [5,6,7,8]', [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]),
        ("(1,2),(3,4) [5,6,7,8]", [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]),
        ("[-3, 0, 5, 9]", [Box(-3, 0, 5, 9)]),
        ("[1, 2, 3] (4, 5) [1,2,3,4,5] [a,b,c,d] 1,2,3,4", []),
        ("[1e400, 2, 3, 4] [99999999, 1, 2, 3]", []),
        ("", []),
    ],
)
def test_parse(text: str, boxes: list[Box]) -> None:
    assert parse(text) == boxes


def test_a_long_hostile_text_takes_no_time() -> None:
    assert parse("[1," * 20_000 + "{" * 20_000 + "(1,2),(" * 20_000) == []


def test_every_family_s_convention_has_its_ends() -> None:
    assert {family.box_convention for family in FAMILIES.values()} == set(CONVENTIONS)
    assert [ends(convention, (640, 480)) for convention in CONVENTIONS] == [(1000, 1000), (640, 480)]


def test_iou() -> None:
    assert iou(Box(0, 0, 2, 2), Box(1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou(Box(0, 0, 2, 2), Box(0, 0, 2, 2)) == 1
    assert iou(Box(0, 0, 2, 2), Box(5, 5, 6, 6)) == 0
    assert iou(Box(2, 2, 0, 0), Box(0, 0, 2, 2)) == 0
    assert iou(Box(0, 0, 0, 0), Box(0, 0, 0, 0)) == 0
