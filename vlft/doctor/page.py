"""From the findings to doctor.html: what is said, in which order. How it looks is in doctor.html.j2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlft.doctor.findings import AREAS, GRADES, Finding, Shot, ordered
from vlft.report.page import jpeg_url, template

TITLES = {"environment": "Environment", "model": "Model", "data": "Data"}
_WORDS = {"error": ("error", "errors"), "warning": ("warning", "warnings"), "note": ("note", "notes")}
_MOST_LANGUAGES = 4


@dataclass
class Checkup:
    """All that the page shows."""

    looked: tuple[str, ...]
    """Areas that were looked at."""
    findings: list[Finding] = field(default_factory=list)
    about: list[tuple[str, str]] = field(default_factory=list)
    """What was looked at: model, registry, device."""
    figures: list[tuple[str, str, str]] = field(default_factory=list)
    """Label, value, detail."""
    counts: list[tuple[str, ...]] = field(default_factory=list)
    """Rows of `vlft.doctor.records.counts`."""
    languages: dict[str, tuple[Counter[str], Counter[str], Counter[str]]] = field(default_factory=dict)
    sheet: list[tuple[str, list[Shot]]] = field(default_factory=list)
    machine: list[tuple[str, str]] = field(default_factory=list)
    packages: list[tuple[str, str]] = field(default_factory=list)


def grades(findings: Sequence[Finding]) -> str:
    """`1 error, 2 warnings and 3 notes`."""
    count = Counter(one.grade for one in findings)
    words = [f"{count[g]} {_WORDS[g][count[g] != 1]}" for g in GRADES]
    return f"{words[0]}, {words[1]} and {words[2]}"


def shares(mix: Counter[str]) -> str:
    """`English 80%, German 20%`."""
    if not mix:
        return "–"
    said = [f"{name} {n / mix.total():.0%}" for name, n in mix.most_common(_MOST_LANGUAGES)]
    rest = sum(n for _, n in mix.most_common()[_MOST_LANGUAGES:])
    return ", ".join(said + ([f"others {rest / mix.total():.0%}"] if rest else []))


def render(checkup: Checkup) -> str:
    findings = ordered(checkup.findings)
    go = not any(one.grade == "error" for one in findings)
    areas = [
        (area, TITLES[area], [one for one in findings if one.area == area])
        for area in AREAS
        if area in checkup.looked or any(one.area == area for one in findings)
    ]
    context: dict[str, Any] = {
        "go": go, "summary": grades(findings), "areas": areas, "about": checkup.about, "figures": checkup.figures,
        "counts": checkup.counts, "machine": checkup.machine, "packages": checkup.packages, "sheet": checkup.sheet,
        "languages": [(name, *map(shares, mixes)) for name, mixes in checkup.languages.items()],
        "url": jpeg_url,
    }  # fmt: skip
    return template(Path(__file__).parent / "doctor.html.j2").render(context)
