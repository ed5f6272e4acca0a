from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from vlft.data.mixing import mix64
from vlft.data.plan import Plan, place
from vlft.errors import DataError


def plan(sizes: list[int], weights: list[float], seed: int = 1, batch: int = 8) -> Plan:
    datasets = np.repeat(np.arange(len(sizes)), sizes)
    return Plan(np.arange(sum(sizes)), datasets, weights, seed=seed, global_batch=batch)


def epoch_of(p: Plan, epoch: int) -> list[int]:
    return np.concatenate([p.members(epoch, k) for k in range(p.steps_per_epoch)]).tolist()


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    p = plan([101], [1.0])
    assert p.steps_per_epoch == 13
    assert len(p.members(0, 12)) == 5
    first, second = epoch_of(p, 0), epoch_of(p, 1)
    assert sorted(first) == sorted(second) == list(range(101))
    assert first != second
    assert first != sorted(first)


def test_membership_is_a_pure_function() -> None:
    a, b = plan([50, 30], [1.0, 0.5]), plan([50, 30], [1.0, 0.5])
    b.members(3, 1)  # another history
    assert a.members(2, 4).tolist() == b.members(2, 4).tolist()
    assert epoch_of(a, 0) != epoch_of(plan([50, 30], [1.0, 0.5], seed=2), 0)
    # Another global batch cuts the same order elsewhere.
    assert epoch_of(plan([50], [1.0], batch=4), 0) == epoch_of(plan([50], [1.0], batch=16), 0)


def test_weights_are_passes_per_epoch() -> None:
    p = plan([40, 40, 40], [2.5, 0.25, 0.0])
    assert p.samples_per_epoch == 110
    subsets = []
    for epoch in range(3):
        counts = Counter(epoch_of(p, epoch))
        assert sum(counts.values()) == 110
        assert {counts[i] for i in range(40)} == {2, 3}
        small = {i for i in range(40, 80) if counts[i]}
        assert len(small) == 10
        assert not any(counts[i] for i in range(80, 120))
        subsets.append(small)
    assert subsets[0] != subsets[1] != subsets[2]


def test_nothing_left() -> None:
    with pytest.raises(DataError, match="no sample is left"):
        plan([5], [0.0])
    with pytest.raises(DataError, match="no sample is left"):
        plan([0], [1.0])


def test_locate_and_ends() -> None:
    p = plan([20], [1.0])
    assert [p.locate(s) for s in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]
    with pytest.raises(IndexError):
        p.members(0, 3)


def test_mixing_is_even_and_salted() -> None:
    values = mix64(np.arange(100_000), 1, 2)
    assert len(np.unique(values)) == 100_000
    assert abs((values >> np.uint64(63)).mean() - 0.5) < 0.01
    assert not np.array_equal(values, mix64(np.arange(100_000), 2, 1))
    # Pinned: a resume under another version must find the same order.
    assert mix64(np.arange(2), 7).tolist() == [15991376853121349544, 5591917668790602582]


# ------------------------------------------------------------------ placement


def mixed(rng: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    images = rng.integers(0, 4, n)
    tokens = np.array([sum(rng.integers(64, 1280) for _ in range(k)) for k in images], np.int64)
    return rng.integers(30, 600, n) + tokens, 4 * tokens


def loads(rows: Any, cost: np.ndarray) -> np.ndarray:
    return np.array([sum(cost[m] for row in rank for m in row) for rank in rows])


def check(rows: Any, n: int, ranks: int) -> None:
    assert sorted(m for rank in rows for row in rank for m in row) == list(range(n))
    assert len(rows) == ranks
    assert len({len(rank) for rank in rows}) == 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("per_rank", [4, 8, 32])
def test_the_slowest_rank_is_close_to_the_mean(ranks: int, per_rank: int) -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(40):
        tokens, patches = mixed(rng, ranks * per_rank)
        cost = tokens + 0.5 * patches
        rows = place(tokens, patches, cost, ranks=ranks)
        check(rows, len(tokens), ranks)
        load = loads(rows, cost)
        ratios.append(load.max() / load.mean())
        # No placement beats the mean or the dearest sample; with few samples that bound itself may be out of reach.
        assert load.max() <= 1.08 * max(load.mean(), cost.max())
    assert np.mean(ratios) < 1.02
    assert per_rank == 4 or max(ratios) < 1.01


def test_budgets_hold_and_rows_grow_alike_on_every_rank() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        tokens, patches = mixed(rng, 24)
        rows = place(tokens, patches, tokens, ranks=3, rows_per_rank=2, token_budget=4096, patch_budget=8192)
        check(rows, 24, 3)
        assert len(rows[0]) >= 2
        for row in (row for rank in rows for row in rank if len(row) > 1):
            assert tokens[row].sum() <= 4096
            assert patches[row].sum() <= 8192


def test_a_sample_over_budget_is_alone() -> None:
    rows = place([10, 5000, 20], [0, 0, 0], [10, 5000, 20], ranks=1, token_budget=100)
    check(rows, 3, 1)
    assert [1] in rows[0]


def test_few_samples_leave_empty_rows() -> None:
    rows = place([5], [0], [5], ranks=3, rows_per_rank=2)
    check(rows, 1, 3)
    assert len(rows[0]) == 2
    check(place([], [], [], ranks=2), 0, 2)


def test_rows_of_a_rank_are_even() -> None:
    rows = place(np.full(16, 100), np.zeros(16), np.full(16, 100), ranks=2, rows_per_rank=4)
    assert all(len(row) == 2 for rank in rows for row in rank)
