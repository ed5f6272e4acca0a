"""Boxes written in text, as Qwen-VL writes them: one parser for metrics and for the report. No torch.

Three spellings are read, in any mixture and in the order of the text: `(x1,y1),(x2,y2)` (Qwen2-VL, its special tokens
dropped by decoding), `[x1, y1, x2, y2]`, and JSON objects with `bbox_2d` and maybe `label` (Qwen2.5-VL, Qwen3-VL), cut
short or not. What the numbers count (pixels of the resized picture, or thousandths) is the model family's convention.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)"
_LIST = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
_BOX = re.compile(f"{_PAIRS}|{_LIST}")
_POINT = re.compile(rf'"point_2d"\s*:\s*\[{_NUMBER},{_NUMBER}\]|<\|box_start\|>\({_NUMBER},{_NUMBER}\)<\|box_end\|>')


class Box(NamedTuple):
    """Corners as they are written; `x2 < x1` is kept, its area is 0."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""

    @property
    def area(self) -> float:
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)


def parse(text: str) -> list[Box]:
    """Every box of the text, in its order."""
    found = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(n) for n in match.groups() if n is not None)
        found.append(Box(x1, y1, x2, y2, _label(text, match.start(), match.end())))
    return found


def places(text: str) -> list[tuple[float, ...]]:
    """Every box (x1, y1, x2, y2) and every point (x, y) of the text, in its order; points have a key or marks."""
    found = [(m.start(), tuple(float(n) for n in m.groups() if n is not None)) for m in _BOX.finditer(text)]
    found += [(m.start(), tuple(float(n) for n in m.groups() if n is not None)) for m in _POINT.finditer(text)]
    return [numbers for _, numbers in sorted(found)]


CONVENTIONS = ("relative1000", "resized_pixels")
"""What the numbers of a box count: thousandths of a picture, or its pixels at the size that the model sees."""


def ends(convention: str, size: tuple[int, int]) -> tuple[int, int]:
    """The largest x and y on a picture of this (width, height), by `Family.box_convention`."""
    return (1000, 1000) if convention == "relative1000" else size


def _label(text: str, start: int, end: int) -> str:
    """`label` of the JSON object around text[start:end]; empty where there is none."""
    opening, closing = text.rfind("{", 0, start), text.find("}", end)
    if opening < 0 or closing < 0 or "}" in text[opening:start]:
        return ""
    try:
        around = json.loads(text[opening : closing + 1])
    except ValueError:
        return ""
    label = around.get("label") if isinstance(around, dict) else None
    return label if isinstance(label, str) else ""


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0 where either has no area."""
    width, height = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(0.0, width) * max(0.0, height)
    return shared / (a.area + b.area - shared) if shared and a.area and b.area else 0.0
