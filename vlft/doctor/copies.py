"""The same picture twice: on both sides, or several times on one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vlft.data.images import decode
from vlft.doctor.findings import Finding, Grade, Shot
from vlft.doctor.looked import Sampled
from vlft.doctor.pictures import detail, look_the_same, near_pairs
from vlft.doctor.records import EXAMPLES, MANY, Ints, find, share
from vlft.doctor.shots import shot
from vlft.errors import RecordError

_MOST_COMPARED = 2000
"""Pairs that are decoded again for the second look, of each kind; a second for fifty."""


@dataclass(frozen=True)
class _Unique:
    """Pictures of the sample that are different files; V of them."""

    hashes: npt.NDArray[np.uint64]
    """(V, 4)"""
    key: npt.NDArray[np.uint64]
    """(V,) where it is, as in `Sampled.keys`."""
    sample: Ints
    """(V,) the sample that it was decoded for."""
    place: Ints
    """(V,) which of its pictures."""
    train: Ints
    """(V,) a training sample that shows it, or -1."""
    held_out: Ints
    """(V,) a held-out one, or -1."""


def _unique(s: Sampled) -> _Unique:
    hashes, samples, places = [], [], []
    for one in s.seen:
        for place, value in one.hashes:
            if value is not None and not one.failed:
                hashes.append(np.frombuffer(value, np.uint64))
                samples.append(one.sample)
                places.append(place)
    keys, inverse = np.unique(s.keys, return_inverse=True)
    sides = np.full((2, len(keys)), -1, np.int64)
    held = s.data.is_held_out[s.owners] if len(s.owners) else np.zeros(0, np.bool_)
    for side in (0, 1):
        mine = np.flatnonzero(held == bool(side))
        sides[side, inverse[mine]] = s.owners[mine]
    sample, at = np.array(samples, np.int64), np.array(places, np.int64)
    # `owners`, then `places`, ascend.
    number: Ints = inverse[np.searchsorted(s.owners << 20 | s.places, sample << 20 | at)]
    return _Unique(
        np.array(hashes, np.uint64).reshape(-1, 4), keys[number], sample, at, sides[0][number], sides[1][number]
    )


def _candidates(u: _Unique) -> tuple[Ints, int]:
    """(M, 2) positions in `u` whose hashes are equal or near; of many equal ones each with the first."""
    if not len(u.hashes):
        return np.zeros((0, 2), np.int64), 0
    hashes, first, inverse = np.unique(u.hashes, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    # Of each group one picture of either side stands for all.
    stands = np.full((2, len(hashes)), -1, np.int64)
    for side, owner in ((0, u.train), (1, u.held_out)):
        mine = np.flatnonzero(owner >= 0)
        stands[side, inverse[mine]] = mine
    equal = [np.stack([np.arange(len(u.hashes)), first[inverse]], axis=1)]
    equal += [np.stack([np.arange(len(u.hashes)), stands[side][inverse]], axis=1) for side in (0, 1)]
    pairs, crowded = near_pairs(hashes)
    near = [np.stack([stands[a][pairs[:, 0]], stands[b][pairs[:, 1]]], axis=1) for a in (0, 1) for b in (0, 1)]
    both = np.concatenate([*equal, *near])
    both = np.sort(both[(both[:, 0] != both[:, 1]) & (both >= 0).all(axis=1)], axis=1)
    return np.unique(both, axis=0), crowded


def check_same_pictures(s: Sampled) -> Iterator[Finding]:
    """Pictures that train and are held out, and pictures that come several times on one side."""
    u = _unique(s)
    pairs, crowded = _candidates(u)
    a, b = pairs[:, 0], pairs[:, 1]
    leaks = ((u.train[a] >= 0) & (u.held_out[b] >= 0)) | ((u.held_out[a] >= 0) & (u.train[b] >= 0))
    same = _Compare(s, u)
    confirmed = [pair for pair in pairs[leaks][:_MOST_COMPARED].tolist() if same(*pair)]
    both = np.flatnonzero((u.train >= 0) & (u.held_out >= 0)).tolist()
    yield from _leaks(s, u, confirmed, both)
    repeats = [pair for pair in pairs[~leaks][:_MOST_COMPARED].tolist() if same(*pair)]
    yield from _repeats(s, u, repeats)
    skipped = max(0, int(leaks.sum()) - _MOST_COMPARED) + max(0, int((~leaks).sum()) - _MOST_COMPARED)
    if skipped or crowded:
        text = (
            f"very many pictures look alike: {skipped:,} pairs were not compared in detail, and {crowded:,} pictures "
            "have more likenesses than they were compared with, so more may be the same; split such data by hand, "
            'with "split" in the registry.'
        )
        yield find("note", "alike", text)


class _Compare:
    """The second look at a pair of pictures."""

    def __init__(self, s: Sampled, u: _Unique) -> None:
        self.s, self.u = s, u
        self.pixels = lru_cache(maxsize=256)(self._pixels)

    def _pixels(self, at: int, side: int) -> npt.NDArray[np.uint8] | None:
        i, n = int(self.u.sample[at]), int(self.u.place[at])
        try:
            return decode(self.s.data.index.sources(i)[n], (side, side))
        except RecordError:
            return None

    def _size(self, at: int) -> tuple[int, int]:
        return self.s.data.index.sizes(int(self.u.sample[at]))[int(self.u.place[at])]

    def __call__(self, a: int, b: int) -> bool:
        side = detail(self._size(a), self._size(b))
        one, other = self.pixels(a, side), self.pixels(b, side)
        return one is not None and other is not None and look_the_same(one, other)


def _leaks(s: Sampled, u: _Unique, pairs: list[list[int]], both: list[int]) -> Iterator[Finding]:
    data = s.data
    examples: list[str] = []
    shots: list[Shot | None] = []
    # What `check_exact_leaks` has told already is not told again.
    told = np.isin(data.index.split_hash, data.index.split_hash[data.train])
    leaked: set[int] = set()
    for a, b in [*pairs, *([at, at] for at in both)]:
        if not (u.train[a] >= 0 and u.held_out[b] >= 0):
            a, b = b, a
        train, out = int(u.train[a]), int(u.held_out[b])
        if told[out] or int(u.key[b]) in leaked:
            continue
        leaked.add(int(u.key[b]))
        if len(examples) < EXAMPLES:
            examples.append(f"{data.place(out)} is held out, {data.place(train)} trains")
            shots.append(shot(data, int(u.sample[a]), int(u.place[a]), "trains"))
            shots.append(shot(data, int(u.sample[b]), int(u.place[b]), "held out"))
    # Several questions may be about one picture.
    shown = s.owners[np.isin(s.keys, np.array(sorted(leaked), np.uint64))]
    held = np.unique(shown[data.is_held_out[shown] & ~told[shown]])
    if not len(held):
        return
    looked = len(s.chosen.held_out)
    text = (
        f"{share(len(held), looked)} held-out samples that were looked into show a picture that also trains (another "
        'size or file of it), so that evaluations flatter the model; remove one of each pair, or give both sets the '
        'same "split".'
    )  # fmt: skip
    grade: Grade = "error" if len(held) > MANY * looked else "warning"
    yield Finding(grade, "data", "leak", text, examples=tuple(examples), shots=tuple(x for x in shots if x))


def _repeats(s: Sampled, u: _Unique, pairs: list[list[int]]) -> Iterator[Finding]:
    data = s.data
    again = {b for _, b in pairs}
    if not again:
        return
    shots = []
    for a, b in pairs[:EXAMPLES]:
        shots += [shot(data, int(u.sample[at]), int(u.place[at]), data.place(int(u.sample[at]))) for at in (a, b)]
    text = (
        f"{share(len(again), len(u.sample))} pictures that were looked into are copies of another one of the same side "
        "(another size or file); right where each has questions of its own: otherwise keep one."
    )
    grade: Grade = "warning" if len(again) > 10 * MANY * len(u.sample) else "note"
    examples = tuple(f"{data.place(int(u.sample[a]))} and {data.place(int(u.sample[b]))}" for a, b in pairs[:EXAMPLES])
    yield Finding(grade, "data", "near_duplicates", text, examples=examples, shots=tuple(x for x in shots if x))
