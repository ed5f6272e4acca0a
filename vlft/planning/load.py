"""What the steps of this data hold, as training would cut them: looked at, not decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlft.data.budget import Budget
from vlft.data.prepare import Data
from vlft.data.sample import Costs
from vlft.models.flops import Shape, Work

STEPS = 200
"""Steps of the first epoch that are looked at."""


@dataclass(frozen=True)
class Row:
    """One forward."""

    tokens: int
    patches: int
    sample: int
    """tokens of the longest"""
    picture: int
    """patches of the largest"""
    supervised: int
    work: Work


@dataclass(frozen=True)
class Steps:
    """Rows of one rank, step by step."""

    rows: list[list[Row]]
    largest: Row
    """The row of an epoch, over all ranks, that takes the most memory, near enough."""
    steps_per_epoch: int
    samples_per_epoch: int

    def work(self) -> Work:
        """Of a mean step, in sums over rows."""
        total = sum((row.work for rows in self.rows for row in rows), Work())
        return Work(*(round(value / len(self.rows)) for value in vars(total).values()))


def look(
    data: Data,
    shape: Shape,
    *,
    costs: Costs,
    budget: Budget,
    start: int = 0,
    total: int | None = None,
    steps: int = STEPS,
) -> Steps:
    """The first steps from `start` on, rank 0's rows; the largest row of all ranks in the epoch that begins there.

    Args:
        costs, budget: as for `Data.steps`.
        total: steps of the run; None: the epoch's.
    """
    plan, end = data.plan, start + data.plan.steps_per_epoch if total is None else total
    found = []
    for step in range(start, min(start + steps, end)):
        rows = data.placed(step, costs, budget)[0]
        found.append([_row(data, shape, ids) for ids in rows if len(ids)])
    most = [_row(data, shape, np.array(one.ids)) for one in data.largest(start, end, costs, budget)]
    largest = max(most, key=lambda row: 2 * row.tokens + row.patches)
    return Steps(found, largest, plan.steps_per_epoch, plan.samples_per_epoch)


def _row(data: Data, shape: Shape, ids: npt.NDArray[np.int64]) -> Row:
    fitted, index = data.fitted, data.index
    lengths = fitted.length[ids]
    unit = data.options.layout.patch
    grids = [(1, h // unit, w // unit) for i in ids.tolist() for w, h in fitted.sizes(index, i)]
    supervised = int(fitted.learnt[ids].sum())
    work = Work.of(shape, lengths, np.array(grids, np.int64).reshape(-1, 3), supervised)
    return Row(
        tokens=int(lengths.sum()), patches=work.patches, sample=int(lengths.max()),
        picture=max((h * w for _, h, w in grids), default=4), supervised=supervised, work=work,
    )  # fmt: skip


def histogram(values: npt.ArrayLike, bars: int = 8) -> Sequence[tuple[int, int, int]]:
    """(from, to, how many) of each bar, in round numbers."""
    found = np.asarray(values)
    if not len(found):
        return []
    top = int(found.max()) + 1
    width = max(1, -(-top // bars))
    size = 10 ** max(0, len(str(width)) - 2)
    width = -(-width // size) * size
    edges = np.arange(0, top + width, width)
    counts, _ = np.histogram(found, edges)
    return [(int(a), int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
