"""Curves and histograms as inline SVG whose colours are CSS custom properties: one drawing for light and dark.

matplotlib draws with colours that stand for a property (`_INK` for `var(--ink)`, ...); the SVG is then rewritten: names
instead of colours, no fonts, no numbers finer than a hundredth, ids that are unique on the page. Texts of users never
go through matplotlib (it would read `$` as mathematics): names are in the HTML legend.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from vlft.report.read import Curve, Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 600
_TABLE_ROWS = 12
_TONES = 8
"""Colours that the style sheet has for series (--tone-1 ...)."""
DASHES = ("", "5 2.5", "1.5 2", "8 2.5 1.5 2.5")
"""Dash patterns in units of the drawing; the legend's swatches use the same."""
_WIDTH, _HEIGHT = 380, 216
"""Units of the drawing: as wide as a phone, so that its text is as large there as on a desk."""
_INK, _LINE = "#0000a0", "#0000a1"
_COLOURS = {_INK: "var(--muted)", _LINE: "var(--line)"} | {f"#0000b{i}": f"var(--tone-{i + 1})" for i in range(_TONES)}
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "vlft", "font.size": 11.5, "path.simplify": True}


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    curve: Curve
    tone: int
    """Which colour, from 0."""
    dash: int = 0
    mark: tuple[float, float] | None = None
    """A point to ring: the best one."""


@dataclass(frozen=True)
class Legend:
    name: str
    tone: int
    """Which colour, from 1, as the style sheet counts."""
    dash: str


@dataclass(frozen=True)
class Chart:
    """What the page's template needs of one chart."""

    title: str
    note: str
    svg: Markup
    legend: tuple[Legend, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def compact(value: float, thousands: float = 1e4) -> str:
    """A number for people: four digits at most, millions as M, and from `thousands` on k."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, suffix in ((1e6, "M"), (thousands, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most `most` points: each the mean of a bucket of neighbouring steps."""
    count = len(curve.steps)
    if count <= most:
        return curve
    starts = np.linspace(0, count, most + 1).astype(int)
    sizes = np.diff(starts)
    steps = np.add.reduceat(np.asarray(curve.steps), starts[:-1]) / sizes
    values = np.add.reduceat(np.asarray(curve.values), starts[:-1]) / sizes
    return Curve(tuple(steps.tolist()), tuple(values.tolist()))


def smooth(curve: Curve) -> tuple[Curve, int]:
    """Centred moving mean over a twenty-fifth of the curve, and how many points it spans; the curve itself if short."""
    count = len(curve.values)
    half = count // 50
    if half < 1:
        return curve, 1
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(curve.values))])
    places = np.arange(count)
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, count)
    return Curve(curve.steps, tuple(((sums[high] - sums[low]) / (high - low)).tolist())), 2 * half + 1


def lines(
    uid: str, title: str, series: Sequence[Series], *, noisy: bool = False, log: bool = False, zero: bool = False,
    note: str = "",
) -> Chart:  # fmt: skip
    """A chart over steps.

    Args:
        uid: an id that no other chart of the page has.
        noisy: draw a moving mean over the pale curve itself.
        log: a logarithmic axis where the values span more than a factor of thirty.
        zero: the axis begins at zero.
    """
    figure, axes = _figure(steps=True)
    thinned = [thin(s.curve) for s in series]
    pooled = [v for c in thinned for v in c.values]
    if log and min(pooled) > 0 and max(pooled) > 30 * min(pooled):
        axes.set_yscale("log")
    spans = 1
    for one, curve in zip(series, thinned, strict=True):
        colour = f"#0000b{one.tone % _TONES}"
        style: dict[str, Any] = {"color": colour, "clip_on": False, "solid_capstyle": "round"}
        drawn, span = smooth(curve) if noisy else (curve, 1)
        if span > 1:
            axes.plot(curve.steps, curve.values, linewidth=0.7, alpha=0.3, **style)
            spans = max(spans, round(span * len(one.curve.steps) / len(curve.steps)))
        dash = DASHES[one.dash % len(DASHES)]
        if dash:
            style["linestyle"] = (0, tuple(float(n) / 1.8 for n in dash.split()))
        few = {"marker": "o", "markersize": 3.5} if len(curve.steps) <= 24 else {}
        axes.plot(drawn.steps, drawn.values, linewidth=1.8, **few, **style)
        if one.mark:
            axes.plot(*one.mark, "o", markersize=10, markerfacecolor="none", markeredgewidth=1.4, **style)
    if zero and axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=_INK, labelpad=3)
    if spans > 1:
        note = f"{note}{'; ' if note else ''}bold: mean of {spans} steps"
    return Chart(
        title, note, _svg(figure, uid, title, _told(series)), _legend(series),
        ("step", *(s.name for s in series)), _rows(series),
    )  # fmt: skip


def histogram(uid: str, title: str, found: Mapping[str, Histogram], *, unit: str, note: str = "") -> Chart:
    """Counts between edges; of several runs as outlines over each other.

    Args:
        found: name of the run -> its counts; the name is not shown where there is one.
        unit: what the edges count.
    """
    figure, axes = _figure()
    edges = [e for h in found.values() for e in h.edges]
    if min(edges) > 0 and max(edges) > 50 * min(edges):
        axes.set_xscale("log")
    told = []
    for i, (name, one) in enumerate(found.items()):
        colour, alone = f"#0000b{i % _TONES}", len(found) == 1
        axes.stairs(one.counts, one.edges, fill=alone, color=colour, alpha=0.85, linewidth=1.6, clip_on=False)
        top = int(np.argmax(one.counts))
        told.append(
            f"{'' if alone else name + ': '}{compact(sum(one.counts))} in all, most ({compact(one.counts[top])}) from "
            f"{compact(one.edges[top])} to {compact(one.edges[top + 1])} {unit}."
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel(unit, color=_INK, labelpad=3)
    series = [Series(name, Curve(), i) for i, name in enumerate(found)]
    rows = []
    for name, one in found.items():
        for low, high, count in zip(one.edges, one.edges[1:], one.counts, strict=False):
            cells = (f"{compact(low)} – {compact(high)}", compact(count))
            rows.append(cells if len(found) == 1 else (name, *cells))
    head = (unit, "samples" if unit == "tokens" else "count")
    return Chart(
        title, note, _svg(figure, uid, title, " ".join(told)), _legend(series),
        head if len(found) == 1 else ("run", *head), tuple(rows),
    )  # fmt: skip


def bars(uid: str, title: str, found: Mapping[str, Mapping[str, float]], *, unit: str, note: str = "") -> Chart:
    """A bar for each word; of several runs side by side.

    Args:
        found: name of the run -> word -> count. The words must be the program's own: they are drawn.
    """
    figure, axes = _figure()
    words = list(dict.fromkeys(word for one in found.values() for word in one))
    width = 0.72 / len(found)
    for i, one in enumerate(found.values()):
        places = np.arange(len(words)) + (i - (len(found) - 1) / 2) * width
        heights = [one.get(word, 0) for word in words]
        axes.bar(places, heights, width * 0.94, color=f"#0000b{i % _TONES}", alpha=0.85, clip_on=False)
    axes.set_xticks(range(len(words)), [word.replace("$", r"\$") for word in words])
    axes.set_xlabel(unit, color=_INK, labelpad=3)
    told = "; ".join(
        f"{'' if len(found) == 1 else name + ': '}" + ", ".join(f"{w} {unit}: {compact(n)}" for w, n in one.items())
        for name, one in found.items()
    )
    series = [Series(name, Curve(), i) for i, name in enumerate(found)]
    rows = tuple((word, *(compact(one.get(word, 0)) for one in found.values())) for word in words)
    head = (unit, *(found if len(found) > 1 else ("samples",)))
    return Chart(title, note, _svg(figure, uid, title, told), _legend(series), head, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Words for those who do not see the drawing
# ---------------------------------------------------------------------------------------------------------------------


def _told(series: Sequence[Series]) -> str:
    told = []
    for one in series[:_TONES]:
        steps, values = one.curve.steps, one.curve.values
        low, high = min(values), max(values)
        told.append(
            f"{one.name}: {compact(values[0])} at step {steps[0]:.0f}, {compact(values[-1])} at step {steps[-1]:.0f}, "
            f"between {compact(low)} and {compact(high)}."
        )
    return " ".join(told)


def _legend(series: Sequence[Series]) -> tuple[Legend, ...]:
    if len(series) < 2:
        return ()
    return tuple(Legend(s.name, s.tone % _TONES + 1, DASHES[s.dash % len(DASHES)]) for s in series)


def _rows(series: Sequence[Series]) -> tuple[tuple[str, ...], ...]:
    """Every step where there are few, otherwise means over equal stretches of steps."""
    steps = sorted({step for s in series for step in s.curve.steps})
    cuts = np.array_split(np.asarray(steps), min(len(steps), _TABLE_ROWS))
    columns = [(np.asarray(s.curve.steps), np.asarray(s.curve.values)) for s in series]
    rows = []
    for cut in cuts:
        low, high = cut[0], cut[-1]
        cells = []
        for at, values in columns:
            inside = values[np.searchsorted(at, low) : np.searchsorted(at, high, side="right")]
            cells.append(compact(float(inside.mean())) if len(inside) else "–")
        rows.append((f"{low:.0f}" if low == high else f"{low:.0f} – {high:.0f}", *cells))
    return tuple(rows)


# ---------------------------------------------------------------------------------------------------------------------
# matplotlib, without pyplot and its global state
# ---------------------------------------------------------------------------------------------------------------------


def _formatter(thousands: float) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _place: compact(float(f"{value:.6g}"), thousands))


def _figure(*, steps: bool = False) -> tuple[Figure, Axes]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        axes = figure.add_axes((46 / _WIDTH, 40 / _HEIGHT, (_WIDTH - 60) / _WIDTH, (_HEIGHT - 52) / _HEIGHT))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK, pad=5, which="both")
    axes.margins(x=0.01, y=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=steps))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(_formatter(1e5))
    axes.yaxis.set_major_formatter(_formatter(1e3))
    return figure, axes


def _svg(figure: Figure, uid: str, title: str, description: str) -> Markup:
    """The drawing as an element of the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
            axis.set_major_formatter(_formatter(1e3))
            axis.set_minor_formatter(NullFormatter())
    out = io.StringIO()
    with rc_context(_SETTINGS):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    return Markup(_rewritten(out.getvalue(), uid, str(escape(title)), str(escape(description))))


def _rewritten(svg: str, uid: str, title: str, description: str) -> str:
    body = svg[svg.index("<g id=") : svg.rindex("</svg>")]
    for colour, name in _COLOURS.items():
        body = body.replace(colour, name)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r'(?<=[\s"(])(-?\d+\.\d{3,})', lambda m: f"{float(m[1]):.2f}", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", body)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{uid}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{uid}-', body).replace("url(#", f"url(#{uid}-")
    body = re.sub(r"\s*\n\s*", " ", body)
    head = f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}" '
    told = f'aria-describedby="{uid}-desc"><title>{title}</title><desc id="{uid}-desc">{description}</desc>'
    return f"{head}{told}{body}</svg>"
