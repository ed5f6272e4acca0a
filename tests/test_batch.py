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

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.fails: Exception | None = None

    def __call__(self, row: Any, training: bool) -> dict[str, Any]:
        assert training
        if self.fails is not None:
            raise self.fails
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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ValueError("bytes do not match the grids")])
def test_a_row_that_cannot_be_made_ahead_is_made_in_its_step(error: Exception) -> None:
    """What is wrong with it must not cost the step before, which is trained and not yet written down."""
    inputs = Inputs()
    feed = Feed(iter([step(0), step(1)]), inputs)  # type: ignore[arg-type]
    next(feed)
    inputs.fails = error
    feed.look_ahead()
    row = next(feed).rows[0]
    with pytest.raises(type(error)):
        feed.inputs(row)
    inputs.fails = None
    assert feed.inputs(row) == {"of": row}


def test_the_time_of_fetching_is_told_once() -> None:
    feed = Feed(iter([step(0), step(1)]), Inputs())  # type: ignore[arg-type]
    next(feed)
    feed.look_ahead()
    assert feed.waited() > 0.0
    assert feed.waited() == 0.0
