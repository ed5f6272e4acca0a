"""What the doctor says: findings of three grades, and the verdict over all of them. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vlft.errors import DataError, ModelError, VlftError

Grade = Literal["error", "warning", "note"]
"""error: training would fail, or teach something wrong; warning: it would run worse than it could; note: good to know.
"""
Area = Literal["environment", "model", "data"]
GRADES: tuple[Grade, ...] = ("error", "warning", "note")
AREAS: tuple[Area, ...] = ("environment", "model", "data")
_ERRORS: dict[Area, type[VlftError]] = {"environment": VlftError, "model": ModelError, "data": DataError}


@dataclass(frozen=True)
class Mark:
    """A box on a picture, in hundredths of its sides."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Shot:
    """A thumbnail on the page."""

    jpeg: bytes
    width: int
    """Pixels of the thumbnail."""
    height: int
    caption: str
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    grade: Grade
    area: Area
    check: str
    """A short stable word for the check, such as `leak`."""
    text: str
    """One sentence: what was found, where, and what to do."""
    source: str = ""
    """Address that says more."""
    examples: tuple[str, ...] = ()
    shots: tuple[Shot, ...] = ()


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """By grade, then area; what was found first stays first."""
    return sorted(findings, key=lambda one: (GRADES.index(one.grade), AREAS.index(one.area)))


def verdict(findings: Iterable[Finding], page: str) -> VlftError | None:
    """The error that ends a no-go: of the kind that training would end with, plain where several kinds were found.

    Returns:
        None: go.
    """
    bad = [one for one in ordered(findings) if one.grade == "error"]
    if not bad:
        return None
    areas = {one.area for one in bad}
    kind = _ERRORS[areas.pop()] if len(areas) == 1 else VlftError
    many = f"{len(bad)} errors" if len(bad) > 1 else "1 error"
    return kind(f"no-go: {many}, the first being: {bad[0].text} All are in {page}.")
