"""What is in a sample of the data: pictures are decoded and hashed, texts are read for boxes, placeholders, languages.

Only this costs time (about 10 ms a picture of a megapixel and worker, 0.2 ms a text), so only this takes a part of the
data: records with the smallest hashes, the same ones every time, and as many held-out ones as half of them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from vlft import boxes
from vlft.data.formats import Record
from vlft.data.images import decode
from vlft.data.index import BOXED, HAS_BOXES, Index
from vlft.data.mixing import mix64
from vlft.data.sample import Fitted
from vlft.doctor.languages import SHORT, language, main_script
from vlft.doctor.pictures import SIDE, signature
from vlft.errors import RecordError

Ints = npt.NDArray[np.int64]
_SALT = 0xD0C708
_CHUNK = 64
_SLACK = 0.01
"""Part of a side by which a coordinate may lie outside: rounding, as in vlft.data.tokens."""
_SPELLED = re.compile(r"bbox_2d|<\|box_start\|>|\(\s*\d+\s*,\s*\d+\s*\)\s*,\s*\(")


@dataclass(frozen=True)
class Task:
    sample: int
    pictures: tuple[int, ...]
    """Which of its pictures are decoded: those that no earlier sample has."""


@dataclass(slots=True)
class Seen:
    """What one sample is like."""

    sample: int
    hashes: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(picture, hash); None for a picture without anything in it."""
    failed: tuple[str, str] | None = None
    """Reason and message with which training would leave it out."""
    boxes: int = 0
    outside: int = 0
    empty: int = 0
    """Boxes without an area."""
    as_pixels: int = 0
    """Boxes outside that would be inside if they were pixels of the stored picture."""
    spelled: bool = False
    """The text says that they are boxes; bare lists of four numbers may be something else."""
    placeholder: str = ""
    """A literal `<image>` or `<bbox>` that the model would read as text."""
    asked: str = ""
    """Language of the user turns."""
    answered: str = ""
    other_script: bool = False
    """Question and answer are written in different scripts."""


@dataclass(frozen=True)
class Chosen:
    train: Ints
    held_out: Ints

    @property
    def ids(self) -> Ints:
        return np.sort(np.concatenate([self.train, self.held_out]))


def choose(index: Index, train: Ints, held_out: Ints, limit: int | None) -> Chosen:
    """The samples to look into; held-out ones have the first half of `limit`, for leaks are found from them."""

    def first(ids: Ints, count: int) -> Ints:
        if count >= len(ids):
            return ids
        order = np.argsort(mix64(index.identity[ids], _SALT), kind="stable")
        return np.sort(ids[order[:count]])

    if limit is None:
        return Chosen(train, held_out)
    held = min(len(held_out), max(limit // 2, limit - len(train)))
    return Chosen(first(train, limit - held), first(held_out, held))


def picture_keys(index: Index, ids: Ints) -> tuple[npt.NDArray[np.uint64], Ints, Ints]:
    """Every picture of some samples: (hash of where it is, sample, which of its pictures). 24 bytes a picture."""
    keys: list[int] = []
    owners: list[int] = []
    places: list[int] = []
    for i in ids.tolist():
        shard, k = index.locate(i)
        start = int(shard.image_starts[k])
        for n in range(int(shard.n_images[k])):
            a, b = int(shard.ref_starts[start + n]), int(shard.ref_starts[start + n + 1])
            ref = shard.refs[a:b].tobytes()
            if ref.startswith(b"inline:"):
                ref += f" {index.identity[i]}".encode()
            keys.append(xxhash.xxh3_64_intdigest(ref))
            owners.append(i)
            places.append(n)
    return np.array(keys, np.uint64), np.array(owners, np.int64), np.array(places, np.int64)


def tasks(ids: Ints, keys: npt.NDArray[np.uint64], owners: Ints, places: Ints) -> list[Task]:
    """One for each sample; each picture is decoded once, for the first sample that shows it."""
    _, firsts = np.unique(keys, return_index=True)
    mine: dict[int, list[int]] = {}
    for at in firsts.tolist():
        mine.setdefault(int(owners[at]), []).append(int(places[at]))
    return [Task(i, tuple(sorted(mine.get(i, ())))) for i in ids.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# One sample, in a worker


@dataclass(frozen=True)
class _Job:
    index: Index
    fitted: Fitted
    convention: str


_JOB: _Job | None = None


def _start(job: _Job) -> None:
    global _JOB
    _JOB = job


def _work(chunk: Sequence[Task]) -> list[Seen]:
    assert _JOB is not None
    return [see(_JOB.index, _JOB.fitted, _JOB.convention, task) for task in chunk]


def see_all(
    index: Index, fitted: Fitted, convention: str, todo: Sequence[Task], *, workers: int, progress: bool
) -> Iterator[Seen]:
    """`see` of every task, in their order."""
    from tqdm import tqdm

    bar = tqdm(total=len(todo), desc="looking into samples", unit="", disable=not progress, unit_scale=True)
    chunks = [todo[at : at + _CHUNK] for at in range(0, len(todo), _CHUNK)]
    with bar:
        if workers <= 1 or len(chunks) < 2:
            for task in todo:
                yield see(index, fitted, convention, task)
                bar.update()
            return
        index.warm()
        job = _Job(index, fitted, convention)
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job,)) as pool:
            for found in pool.map(_work, chunks):
                yield from found
                bar.update(len(found))


def see(index: Index, fitted: Fitted, convention: str, task: Task) -> Seen:
    """Look into one sample."""
    i = task.sample
    seen = Seen(i)
    try:
        sources, stored = index.sources(i), index.sizes(i)
        for n in task.pictures:
            found = signature(decode(sources[n], (SIDE, SIDE), expect_wh=stored[n]))
            seen.hashes.append((n, None if found is None else found.tobytes()))
        _read(index.parsed(i), index, fitted, convention, seen)
    except RecordError as error:
        seen.failed = (error.reason, f"{index.place(i)}: {error}")
    return seen


def _read(record: Record, index: Index, fitted: Fitted, convention: str, seen: Seen) -> None:
    i = seen.sample
    asked = "\n".join(turn.text for turn in record.turns if turn.role == "user")
    answered = "\n".join(turn.text for turn in record.turns if turn.role == "assistant")
    seen.asked, seen.answered = language(asked), language(answered)
    if SHORT not in (seen.asked, seen.answered):
        scripts = main_script(asked), main_script(answered)
        seen.other_script = "" not in scripts and scripts[0] != scripts[1]
    for mark in ("<image>", "<bbox>", "<ref-object>", "<video>"):
        if mark in asked or mark in answered:
            seen.placeholder = mark
    # What the index marks as BOXED was converted, and a coordinate outside is in the ledger.
    if index.flags[i] & HAS_BOXES and not index.flags[i] & BOXED:
        _boxes(f"{asked}\n{answered}", index.sizes(i), fitted.sizes(index, i), convention, seen)


def _boxes(
    text: str, stored: Sequence[tuple[int, int]], final: Sequence[tuple[int, int]], convention: str, seen: Seen
) -> None:
    found = boxes.parse(text)
    seen.boxes, seen.spelled = len(found), _SPELLED.search(text) is not None
    outside = [box for box in found if not inside(box, final, convention)]
    seen.outside = len(outside)
    seen.empty = sum(not box.area for box in found)
    seen.as_pixels = sum(inside(box, stored, "resized_pixels") for box in outside)


def inside(box: boxes.Box, sizes: Sequence[tuple[int, int]], convention: str) -> bool:
    """Whether a box lies in one of the pictures, but for rounding.

    Args:
        sizes: (width, height) of each picture.
        convention: `Family.box_convention`.
    """
    ends = [boxes.ends(convention, size) for size in sizes or [(0, 0)]]  # thousandths ask for no picture
    return any(
        all(-_SLACK * w - 1 <= x <= w * (1 + _SLACK) + 1 for x in (box.x1, box.x2))
        and all(-_SLACK * h - 1 <= y <= h * (1 + _SLACK) + 1 for y in (box.y1, box.y2))
        for w, h in ends
    )


def workers(wanted: int) -> int:
    return max(1, min(wanted, os.cpu_count() or 1))


def mixes(seen: Sequence[Seen], ids: Ints, what: str) -> Counter[str]:
    """Samples of `ids` by language of their questions ("asked") or answers ("answered")."""
    wanted = set(ids.tolist())
    found: Any = (getattr(one, what) for one in seen if one.sample in wanted and not one.failed)
    return Counter(word for word in found if word)
