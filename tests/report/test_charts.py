"""Curves are thinned by means, and drawings name colours instead of having them."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from vlft.report import charts
from vlft.report.charts import Series, compact, smooth, thin
from vlft.report.read import Curve, Histogram


def _curve(values: list[float]) -> Curve:
    return Curve(tuple(float(i) for i in range(1, len(values) + 1)), tuple(values))


def test_a_short_curve_is_left_alone() -> None:
    curve = _curve([1.0] * 600)
    assert thin(curve) is curve


@pytest.mark.parametrize("count", [601, 1000, 1199, 10_000])
def test_buckets_hold_every_step_once(count: int) -> None:
    values = np.random.default_rng(0).standard_normal(count).tolist()
    thinned = thin(_curve(values))
    assert len(thinned.steps) == 600
    assert list(thinned.steps) == sorted(thinned.steps)
    starts = np.linspace(0, count, 601).astype(int)
    assert np.allclose(thinned.values, [np.mean(values[a:b]) for a, b in pairwise(starts)])
    assert np.average(thinned.values, weights=np.diff(starts)) == pytest.approx(np.mean(values))


def test_smoothing_keeps_length_and_constants() -> None:
    flat, span = smooth(_curve([2.0] * 300))
    assert span == 13
    assert np.allclose(flat.values, 2.0)
    assert smooth(_curve([1.0, 2.0]))[1] == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (2e-05, "2e-5"), (1234.5, "1,234"), (25_913, "25.9k"), (3.2e6, "3.2M"),
     (7, "7"), (-0.25, "-0.25"), (1e-12, "1e-12"), (4e12, "4e12")],
)  # fmt: skip
def test_numbers_for_people(value: float, text: str) -> None:
    assert compact(value) == text


def _chart(**how: object) -> charts.Chart:
    series = [Series("a", _curve([3.0, 2.0, 1.0]), 0), Series("b <$x$>", _curve([300.0, 20.0, 1.0]), 1, 1, (3, 1.0))]
    return charts.lines("c1", "Loss & more", series, **how)  # type: ignore[arg-type]


def test_colours_are_properties_and_fonts_the_page_s() -> None:
    svg = _chart(log=True).svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", svg)) == {"--muted", "--line", "--tone-1", "--tone-2"}
    assert "font-family" not in svg
    assert "DejaVu" not in svg
    assert "<text" in svg


def test_a_chart_says_what_it_shows() -> None:
    svg = _chart().svg
    assert svg.startswith('<svg class="plot" viewBox="0 0 380 216" role="img" aria-label="Loss &amp; more"')
    assert "<title>Loss &amp; more</title>" in svg
    assert "b &lt;$x$&gt;: 300 at step 1, 1 at step 3, between 1 and 300." in svg
    assert _chart().rows == (("1", "3", "300"), ("2", "2", "20"), ("3", "1", "1"))


def test_ids_are_the_chart_s_own() -> None:
    ids = re.findall(r' id="([^"]+)"', _chart().svg)
    assert len(ids) == len(set(ids))
    assert all(i.startswith("c1-") for i in ids)
    assert {f"#{i}" for i in ids} >= set(re.findall(r'href="(#[^"]+)"', _chart().svg))


def test_long_tables_are_means_over_steps() -> None:
    rows = charts.lines("c", "t", [Series("a", _curve([float(i) for i in range(1, 1201)]), 0)]).rows
    assert len(rows) == 12
    assert rows[0] == ("1 – 100", "50.5")


def test_curves_of_different_steps_share_a_table() -> None:
    series = [Series("a", Curve((1, 2), (1.0, 2.0)), 0), Series("b", Curve((2, 4), (5.0, 6.0)), 1)]
    assert charts.lines("c", "t", series).rows == (("1", "1", "–"), ("2", "2", "5"), ("4", "–", "6"))


def test_histograms() -> None:
    one = charts.histogram("h", "Tokens", {"r": Histogram((1, 10, 1000), (3, 4))}, unit="tokens")
    assert one.legend == ()
    assert one.rows == (("1 – 10", "3"), ("10 – 1,000", "4"))
    two = charts.histogram("h", "T", {"r": Histogram((0, 1), (3,)), "s": Histogram((0, 2), (4,))}, unit="tokens")
    assert [entry.name for entry in two.legend] == ["r", "s"]
    assert two.rows[1] == ("s", "0 – 2", "4")


def test_constant_and_zero_curves_can_be_drawn() -> None:
    for values in ([0.0], [0.0, 0.0], [5.0, 5.0], [-1.0, 1e-30], [1e200, 1.0]):
        assert "<path" in charts.lines("c", "t", [Series("a", _curve(values), 0)], noisy=True, log=True, zero=True).svg
