"""The largest rows of some steps: worked out from lengths alone, nothing is read.

Legend: G global batch, K steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlft.data.plan import Floats, Ints, Plan, place

LOOKED = 512
"""Steps whose rows are worked out; of more, those whose samples are the largest."""


@dataclass(frozen=True)
class Planned:
    """A row of a step as the plan has it."""

    step: int
    """From 0."""
    ids: tuple[int, ...]
    """Its samples, by their numbers in the index."""
    tokens: int
    patches: int


def largest_rows(
    plan: Plan,
    length: npt.ArrayLike,
    patches: npt.ArrayLike,
    cost: npt.ArrayLike,
    steps: range,
    *,
    ranks: int,
    without: Sequence[int] = (),
    **placement: Any,
) -> list[Planned]:
    """The row with the most tokens over all ranks, and that with the most patches where it is another one.

    Args:
        length, patches, cost: (N,) of every sample.
        steps: by number, from 0.
        without: samples that are left out of their steps.
        placement: as for `plan.place`.
    """
    tokens, vit = np.asarray(length, np.int64).copy(), np.asarray(patches, np.int64).copy()
    left_out = np.asarray(without, np.int64)
    tokens[left_out] = vit[left_out] = 0
    dear = np.asarray(cost, np.float64)
    most: list[Planned | None] = [None, None]
    for step in _worth_a_look(plan, (tokens, vit), steps, ranks * int(placement.get("rows_per_rank", 1))):
        ids = plan.members(*plan.locate(step))
        ids = ids[~np.isin(ids, left_out)]
        for rank in place(tokens[ids], vit[ids], dear[ids], ranks=ranks, **placement):
            for members in filter(None, rank):
                mine = ids[members]
                row = Planned(step, tuple(mine.tolist()), int(tokens[mine].sum()), int(vit[mine].sum()))
                most[0] = max(most[0] or row, row, key=lambda one: (one.tokens, one.patches))
                most[1] = max(most[1] or row, row, key=lambda one: (one.patches, one.tokens))
    by_tokens, by_patches = most
    if by_tokens is None or by_patches is None:
        return []
    return [by_tokens] if by_tokens.patches == by_patches.patches else [by_tokens, by_patches]


def _worth_a_look(plan: Plan, sizes: Iterable[Ints], steps: range, rows: int) -> list[int]:
    """At most `LOOKED` of the steps, in their order: those of which a row could be the largest, by a bound on it."""
    if len(steps) <= LOOKED:
        return list(steps)
    members = np.concatenate(list(_members(plan, steps)))
    chosen: set[int] = set()
    for size in sizes:
        # The last member stands for no sample, in an epoch's last step.
        size_KG = np.append(size, 0)[members]
        # The bound on the longest of `rows` balanced sums (Graham 1969); the sum itself where there is one.
        bound_K: Floats = size_KG.sum(1) / rows + size_KG.max(1) * (1 - 1 / rows)
        chosen |= {int(k) for k in np.argsort(-bound_K, kind="stable")[: LOOKED // 2]}
    return [steps[k] for k in sorted(chosen)]


def _members(plan: Plan, steps: range) -> Iterator[Ints]:
    """(K, G) sample ids of the steps of each epoch, -1 where a step has fewer."""
    at = steps.start
    while at < steps.stop:
        epoch, k = plan.locate(at)
        count = min(plan.steps_per_epoch - k, steps.stop - at)
        ids = plan.order(epoch)[k * plan.global_batch : (k + count) * plan.global_batch]
        short = count * plan.global_batch - len(ids)
        yield np.concatenate([ids, np.full(short, -1)]).reshape(count, plan.global_batch)
        at += count
