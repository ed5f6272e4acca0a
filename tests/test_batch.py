"""Steps that are fetched, and brought to the device, before they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlft.batch import Feed
from vlft.errors import DataError


def step(number: int, rows: int = 2) -> Any:
    return SimpleNamespace(number=number, rows=[f"row {number}.{i}" for i in range(rows)])


class Inputs:
    """Notes for which rows inputs were made."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.short = False

    def __call__(self, row: Any, training: bool) -> dict[str, Any]:
        assert training
        if self.short:
            raise torch.OutOfMemoryError
        self.made.append(row)
        return {"of": row}


def test_the_next_step_s_first_row_is_made_ahead_and_each_row_once() -> None:
    inputs = Inputs()
    feed = Feed(iter([step(0), step(1)]), inputs)  # type: ignore[arg-type]
    first = next(feed)
    assert inputs.made == []
    for row in first.rows:
        assert feed.inputs(row) == {"of": row}
    feed.look_ahead()
    assert inputs.made == ["row 0.0", "row 0.1", "row 1.0"]
    second = next(feed)
    assert second.number == 1
    for row in second.rows:
        assert feed.inputs(row) == {"of": row}
    assert inputs.made == ["row 0.0", "row 0.1", "row 1.0", "row 1.1"]
    feed.look_ahead()
    with pytest.raises(StopIteration):
        next(feed)


def test_a_row_that_is_run_once_more_is_made_once_more() -> None:
    """As a step is that did not fit: the first try may have changed what was made."""
    inputs = Inputs()
    feed = Feed(iter([step(0), step(1)]), inputs)  # type: ignore[arg-type]
    next(feed)
    feed.look_ahead()
    row = next(feed).rows[0]
    feed.inputs(row)
    feed.inputs(row)
    assert inputs.made == ["row 1.0", "row 1.0"]


def test_what_fails_ahead_is_told_when_its_own_step_is_asked_for() -> None:
    def steps() -> Iterator[Any]:
        yield step(0)
        raise DataError("all is bad")

    feed = Feed(steps(), Inputs())  # type: ignore[arg-type]
    next(feed)
    feed.look_ahead()
    with pytest.raises(DataError, match="all is bad"):
        next(feed)


def test_memory_that_is_short_ahead_is_asked_for_again() -> None:
    inputs = Inputs()
    feed = Feed(iter([step(0), step(1)]), inputs)  # type: ignore[arg-type]
    next(feed)
    inputs.short = True
    feed.look_ahead()
    inputs.short = False
    row = next(feed).rows[0]
    assert feed.inputs(row) == {"of": row}


def test_the_time_of_fetching_is_told_once() -> None:
    feed = Feed(iter([step(0), step(1)]), Inputs())  # type: ignore[arg-type]
    next(feed)
    feed.look_ahead()
    assert feed.waited() > 0.0
    assert feed.waited() == 0.0
