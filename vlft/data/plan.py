"""Which samples form a step (membership), and where in it they lie (placement). See "The step" in docs/architecture.md.

Membership is a pure function of (data, seed, epoch, global batch, step) and of nothing else. Placement may change with
memory and ranks.

Legend: N samples of the training side, G global batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vlft.data.mixing import mix64
from vlft.errors import DataError

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
_ORDER_SALT, _PART_SALT = 0x0BDE5, 0xF5AC


class Plan:
    """The order of samples, epoch by epoch."""

    def __init__(
        self, ids: npt.ArrayLike, datasets: npt.ArrayLike, weights: Sequence[float], *, seed: int, global_batch: int
    ) -> None:
        """
        Args:
            ids: (N,) sample ids that train.
            datasets: (N,) number of each one's data set.
            weights: passes per epoch over each data set; the fractional part is a subset drawn anew in each epoch.
            global_batch: samples of a step over all ranks.
        Raises:
            DataError: nothing is left to train on.
        """
        self.ids = np.asarray(ids, np.int64)
        self.seed, self.global_batch = seed, global_batch
        groups = np.asarray(datasets)
        self._pools = [(np.sort(self.ids[groups == n]), float(w)) for n, w in enumerate(weights)]
        self.samples_per_epoch = sum(len(pool) * int(w) + round(len(pool) * (w % 1.0)) for pool, w in self._pools)
        if not self.samples_per_epoch:
            raise DataError("no sample is left to train on; see the ledger, --train_split_ratio and the weights.")
        self._order: tuple[int, Ints] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_order": None}

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer than G samples."""
        return -(-self.samples_per_epoch // self.global_batch)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step of the epoch) of the step with this number, all from 0."""
        return divmod(step, self.steps_per_epoch)

    def order(self, epoch: int) -> Ints:
        """The ids of an epoch in their order, with repetitions."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._draw(epoch))
        return self._order[1]

    def _draw(self, epoch: int) -> Ints:
        ids, keys = [], []
        for pool, weight in self._pools:
            for copy in range(int(weight)):
                ids.append(pool)
                keys.append(mix64(pool, _ORDER_SALT, self.seed, epoch, copy))
            part = round(len(pool) * (weight % 1.0))
            if part:
                rank = np.argsort(mix64(pool, _PART_SALT, self.seed, epoch), kind="stable")
                chosen = np.sort(pool[rank[:part]])
                ids.append(chosen)
                keys.append(mix64(chosen, _ORDER_SALT, self.seed, epoch, int(weight)))
        return np.concatenate(ids)[np.argsort(np.concatenate(keys), kind="stable")]

    def members(self, epoch: int, k: int) -> Ints:
        """Sample ids of step `k` of an epoch: (G,), fewer in an epoch's last step.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= k < self.steps_per_epoch:
            raise IndexError(f"step {k} of an epoch of {self.steps_per_epoch}")
        return self.order(epoch)[k * self.global_batch : (k + 1) * self.global_batch]


# ------------------------------------------------------------------ placement

Rows: TypeAlias = list[list[int]]


def place(
    lengths: npt.ArrayLike,
    patches: npt.ArrayLike,
    cost: npt.ArrayLike,
    *,
    ranks: int,
    rows_per_rank: int = 1,
    token_budget: int | None = None,
    patch_budget: int | None = None,
) -> list[Rows]:
    """Put the samples of a step into rows, balanced by cost.

    Ranks first, by the longest-processing-time rule with swaps between the slowest and the fastest afterwards; then
    rows within each rank, under both budgets. The result depends on the arguments only.

    Args:
        lengths, patches: tokens and ViT patches of each member.
        cost: of each member, in any unit (`vlft.data.sample.Costs`).
        rows_per_rank: rows that every rank gets; more if the budgets ask for it.
        token_budget, patch_budget: most tokens and patches of a row; None: no limit. A sample beyond them is alone in
            its row.
    Returns:
        rank -> rows -> positions in `lengths`. Every rank has the same number of rows; rows may be empty.
    Source: Graham 1969, Bounds on Multiprocessing Timing Anomalies.
    """
    tokens, vit = np.asarray(lengths, np.int64), np.asarray(patches, np.int64)
    dear = np.asarray(cost, np.float64)
    budgets = (token_budget or np.iinfo(np.int64).max, patch_budget or np.iinfo(np.int64).max)
    groups = _balance(dear, ranks)
    loads = (tokens.tolist(), vit.tolist(), dear.tolist())
    rows = rows_per_rank
    placed: list[Rows] = []
    for _ in range(3):  # more rows than asked: fill that many again from the start, more evenly
        placed = [_pack(group, loads, budgets, rows) for group in groups]
        needed = max(len(rank) for rank in placed)
        if needed == rows:
            break
        rows = needed
    rows = max(len(rank) for rank in placed)
    return [rank + [[] for _ in range(rows - len(rank))] for rank in placed]


def _balance(cost: Floats, ranks: int) -> list[list[int]]:
    """Members of each rank, dearest first."""
    order = np.lexsort((np.arange(len(cost)), -cost)).tolist()
    if ranks == 1:
        return [order]
    groups: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, 0, rank) for rank in range(ranks)]
    values = cost.tolist()
    for member in order:
        load, count, rank = heapq.heappop(heap)
        groups[rank].append(member)
        heapq.heappush(heap, (load + values[member], count + 1, rank))
    _even_out(groups, cost)
    return [sorted(group, key=lambda m: (-values[m], m)) for group in groups]


def _even_out(groups: list[list[int]], cost: Floats, *, close: float = 1.005, tries: int = 64) -> None:
    """Deal out anew the members of the slowest rank and a fast one while that helps."""
    loads = np.array([cost[group].sum() for group in groups])
    for _ in range(tries):
        slow = int(loads.argmax())
        if loads[slow] <= close * loads.mean():
            return
        for fast in np.argsort(loads, kind="stable").tolist()[:_PARTNERS]:
            few = len(groups[slow]) + len(groups[fast]) <= _FEW
            if fast != slow and (_redeal if few else _exchange)(groups, cost, loads, slow, fast):
                break
        else:
            return


_PARTNERS = 16
_FEW = 10
"""Members of two ranks up to which all ways to deal them out are tried: 2^10 sums."""


@lru_cache(maxsize=_FEW)
def _ways(n: int) -> Floats:
    """(2^(n-1), n) all subsets of n things as 0 and 1, but for complements."""
    return (np.arange(1 << (n - 1))[:, None] >> np.arange(n) & 1).astype(np.float64)


def _redeal(groups: list[list[int]], cost: Floats, loads: Floats, slow: int, fast: int) -> bool:
    """The best of all ways to deal out the members of two ranks, if it makes the slower of the two faster."""
    members = groups[slow] + groups[fast]
    ways = _ways(len(members))
    sums = ways @ cost[members]
    total = loads[slow] + loads[fast]
    best = int(np.abs(sums - total / 2).argmin())
    ends = (float(sums[best]), float(total - sums[best]))
    if max(ends) >= loads[slow] * (1 - 1e-9):
        return False
    taken = ways[best].tolist()
    groups[slow] = [m for m, t in zip(members, taken, strict=True) if t]
    groups[fast] = [m for m, t in zip(members, taken, strict=True) if not t]
    loads[slow], loads[fast] = ends
    return True


def _exchange(groups: list[list[int]], cost: Floats, loads: Floats, slow: int, fast: int) -> bool:
    """The best move or swap from `slow` to `fast`, if it makes the slower of the two faster."""
    gap = loads[slow] - loads[fast]
    give = cost[groups[slow]]
    take = np.concatenate([[0.0], cost[groups[fast]]])  # 0: a move without anything in return
    shift = give[:, None] - take[None, :]
    distance = np.abs(shift - gap / 2)
    a, b = np.unravel_index(int(distance.argmin()), distance.shape)
    moved = shift[a, b]
    if not 1e-9 * loads[slow] < moved < gap * (1 - 1e-9):
        return False
    member = groups[slow].pop(int(a))
    if b > 0:
        groups[slow].append(groups[fast].pop(int(b) - 1))
    groups[fast].append(member)
    loads[slow] -= moved
    loads[fast] += moved
    return True


def _pack(
    group: list[int], loads: tuple[list[int], list[int], list[float]], budgets: tuple[int, int], rows: int
) -> Rows:
    """Members of one rank (dearest first) in at least `rows` rows: each to the cheapest row that has room, or to a
    new one.
    """
    tokens, patches, cost = loads
    filled: Rows = [[] for _ in range(rows)]
    used = [[0, 0] for _ in range(rows)]
    heap = [(0.0, n) for n in range(rows)]
    for member in group:
        full: list[tuple[float, int]] = []
        while heap:
            load, n = heapq.heappop(heap)
            if not filled[n] or (
                used[n][0] + tokens[member] <= budgets[0] and used[n][1] + patches[member] <= budgets[1]
            ):
                break
            full.append((load, n))
        else:
            load, n = 0.0, len(filled)
            filled.append([])
            used.append([0, 0])
        filled[n].append(member)
        used[n][0] += tokens[member]
        used[n][1] += patches[member]
        for entry in (*full, (load + cost[member], n)):
            heapq.heappush(heap, entry)
    return filled
