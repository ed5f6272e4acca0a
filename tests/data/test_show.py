"""Histograms of data.json."""

from __future__ import annotations

import numpy as np
import pytest

from vlft.data.show import BINS, _histogram


@pytest.mark.parametrize("size", [0.0107, 2.1, 0.0])
def test_pictures_of_one_size_are_one_bar_that_holds_it(size: float) -> None:
    """They had been 24 bars, from half a megapixel below nothing."""
    found = _histogram(np.full(7, size))
    assert found["counts"] == [7]
    low, high = found["edges"]
    assert 0 <= low <= size <= high


@pytest.mark.parametrize(("low", "high"), [(64, 64), (39, 93), (0, 24), (5, 4000)])
def test_bars_of_tokens_are_of_whole_numbers(low: int, high: int) -> None:
    values = np.arange(low, high + 1, dtype=np.int32)
    found = _histogram(values)
    assert all(edge == int(edge) for edge in found["edges"])
    assert sum(found["counts"]) == len(values)
    assert len(found["counts"]) <= BINS
    widths = np.diff(found["edges"])
    assert set(widths) == {widths[0]}
    assert found["counts"][:-1] == [widths[0]] * (len(found["counts"]) - 1), "all values alike in number, all bars too"
