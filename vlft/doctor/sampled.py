"""What the looked-into samples say: leaks and near duplicates, pictures that cannot be decoded, boxes, texts."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlft import boxes
from vlft.data.images import decode
from vlft.data.show import describe
from vlft.doctor import contents, languages
from vlft.doctor.contents import Chosen, Seen
from vlft.doctor.findings import Finding, Grade, Mark, Shot
from vlft.doctor.pictures import detail, look_the_same, near_pairs
from vlft.doctor.records import _ENOUGH, EXAMPLES, MANY, Ints, Records, find, left_out, line, share
from vlft.errors import RecordError

THUMBNAIL = 200
"""Pixels of the longer side."""
_MOST_COMPARED = 2000
"""Pairs that are decoded again for the second look, of each kind; a second for fifty."""
_OTHER_MIX = 0.3
"""Distance of two mixes of languages from which it is told."""
_OTHER_SCRIPT = 0.05
_SHEET = 8
"""Pictures of each data set and side on the contact sheet."""
_MOST_SHEET = 96


@dataclass(frozen=True)
class Sampled:
    data: Records
    chosen: Chosen
    seen: list[Seen]
    keys: npt.NDArray[np.uint64]
    """Every picture of the chosen samples (see `contents.picture_keys`)."""
    owners: Ints
    places: Ints


def look(data: Records, limit: int | None) -> Sampled:
    """Decode and read up to `limit` samples."""
    chosen = contents.choose(data.index, data.train, data.held_out, limit)
    keys, owners, places = contents.picture_keys(data.index, chosen.ids)
    todo = contents.tasks(chosen.ids, keys, owners, places)
    seen = contents.see_all(
        data.index, data.fitted, data.chat.family.box_convention, todo,
        workers=contents.workers(data.options.num_workers), progress=data.options.progress,
    )  # fmt: skip
    return Sampled(data, chosen, list(seen), keys, owners, places)


def check_sampled(s: Sampled) -> Iterator[Finding]:
    """What part was looked into, and what that means."""
    looked, total = len(s.chosen.ids), len(s.data.used)
    if looked == total:
        return
    sides = ((s.chosen.train, s.data.train), (s.chosen.held_out, s.data.held_out))
    train, held = (len(some) / max(1, len(every)) for some, every in sides)
    text = (
        f"pictures and texts of {share(looked, total)} samples were looked into, chosen by a hash: all that is said "
        "of decoding, near duplicates, boxes and languages is of these, and a leak shows with a chance of "
        f"{train * held:.0%}; give --sample_limit 0 for all."
    )
    yield find("note", "sampled", text)


def check_decoding(s: Sampled) -> Iterator[Finding]:
    """Pictures and records that the loader would stumble over in the middle of a run."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in s.seen:
        if one.failed:
            groups.setdefault((s.data.name_of(one.sample), one.failed[0]), []).append(one.failed[1])
    bad = sum(map(len, groups.values()))
    most = s.data.options.max_bad_fraction
    if bad > most * len(s.seen):
        text = (
            f"{share(bad, len(s.seen))} samples that were looked into cannot be decoded, more than --max_bad_fraction "
            f"{most:g}, at which training stops; repair them or raise it."
        )
        yield find("error", "bad_fraction", text)
    for (dataset, reason), messages in groups.items():
        yield left_out(dataset, reason, messages)


# ---------------------------------------------------------------------------------------------------------------------
# The same picture twice


@dataclass(frozen=True)
class _Unique:
    """Pictures of the sample that are different files; V of them."""

    hashes: npt.NDArray[np.uint64]
    """(V, 4)"""
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
    return _Unique(np.array(hashes, np.uint64).reshape(-1, 4), sample, at, sides[0][number], sides[1][number])


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
    held: set[int] = set()
    examples: list[str] = []
    shots: list[Shot | None] = []
    # What `check_exact_leaks` has told already is not told again.
    told = np.isin(data.index.split_hash, data.index.split_hash[data.train])
    for a, b in [*pairs, *([at, at] for at in both)]:
        if not (u.train[a] >= 0 and u.held_out[b] >= 0):
            a, b = b, a
        train, out = int(u.train[a]), int(u.held_out[b])
        if told[out] or out in held:
            continue
        held.add(out)
        if len(examples) < EXAMPLES:
            examples.append(f"{data.place(out)} is held out, {data.place(train)} trains")
            shots.append(shot(data, int(u.sample[a]), int(u.place[a]), "trains"))
            shots.append(shot(data, int(u.sample[b]), int(u.place[b]), "held out"))
    if not held:
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


# ---------------------------------------------------------------------------------------------------------------------
# Boxes and texts


def check_boxes(s: Sampled) -> Iterator[Finding]:
    """Boxes that are trained on as they are written, and lie outside or have no area."""
    for n, spec in enumerate(s.data.index.specs):
        mine = [one for one in s.seen if one.boxes and int(s.data.index.dataset[one.sample]) == n]
        bad = [one for one in mine if one.outside]
        if bad:
            yield _outside(s, spec.name, mine, bad)
        empty = [one for one in mine if one.empty]
        if empty:
            text = (
                f"{share(len(empty), len(mine))} samples of {spec.name} with boxes have one without an area (x2 not "
                "above x1, or y2 not above y1); write them as x1, y1, x2, y2."
            )
            yield find("warning", "box_empty", text, [s.data.place(one.sample) for one in empty[:EXAMPLES]])


def _outside(s: Sampled, name: str, mine: Sequence[Seen], bad: Sequence[Seen]) -> Finding:
    count = sum(one.outside for one in bad)
    convention = s.data.chat.family.box_convention
    meant = "thousandths of the picture" if convention == "relative1000" else "pixels of the resized picture"
    advice = "correct them"
    if sum(one.as_pixels for one in bad) == count:
        advice = 'they fit the stored pictures, so give the data set the registry key "box_format": "pixels"'
    text = (
        f"{share(len(bad), len(mine))} samples of {name} with boxes have one outside the picture ({count} boxes, read "
        f"as {s.data.chat.family.title} does, in {meant}); {advice}."
    )
    spelled = [one for one in bad if one.spelled]
    grade: Grade = "error" if len(spelled) > s.data.options.max_bad_fraction * len(mine) else "warning"
    shots = [shot(s.data, one.sample, 0, s.data.place(one.sample), marked=True) for one in bad[:EXAMPLES]]
    examples = tuple(s.data.place(one.sample) for one in bad[:EXAMPLES])
    return Finding(grade, "data", "box_outside", text, examples=examples, shots=tuple(x for x in shots if x))


def check_texts(s: Sampled) -> Iterator[Finding]:
    """Placeholders that stay text, and questions and answers in different scripts."""
    left = [one for one in s.seen if one.placeholder]
    if left:
        kinds = ", ".join(sorted({one.placeholder for one in left}))
        text = (
            f"{share(len(left), len(s.seen))} samples hold {kinds} as plain text, which shows the model nothing; "
            "remove it, or give the pictures as a list beside the text."
        )
        yield find("warning", "placeholder", text, [s.data.place(one.sample) for one in left[:EXAMPLES]])
    other = [one for one in s.seen if one.other_script]
    if len(other) > _OTHER_SCRIPT * len(s.seen):
        text = (
            f"{share(len(other), len(s.seen))} samples ask in one script and answer in another; right for translation "
            "and transcription, otherwise the model learns to change the language."
        )
        yield find("note", "other_script", text, [s.data.place(one.sample) for one in other[:EXAMPLES]])


def mixes(s: Sampled) -> dict[str, tuple[Counter[str], Counter[str], Counter[str]]]:
    """Data set -> languages of its questions, of its answers, of its held-out answers."""
    found = {}
    for n, name in enumerate(s.data.names):
        ids, held = (a[s.data.index.dataset[a] == n] for a in (s.chosen.ids, s.chosen.held_out))
        found[name] = (
            contents.mixes(s.seen, ids, "asked"), contents.mixes(s.seen, ids, "answered"),
            contents.mixes(s.seen, held, "asked"),
        )  # fmt: skip
    return found


def check_languages(s: Sampled) -> Iterator[Finding]:
    """What is held out is asked in other languages than what trains."""
    train, held = (contents.mixes(s.seen, ids, "asked") for ids in (s.chosen.train, s.chosen.held_out))
    for mix in (train, held):
        mix.pop(languages.SHORT, None)
    if min(train.total(), held.total()) < _ENOUGH:
        return
    if (apart := languages.apart(train, held)) > _OTHER_MIX:
        text = (
            f"questions that train and those held out are in different languages ({apart:.0%} of them: {_said(train)} "
            f"against {_said(held)}), so that evaluations measure something else; hold out a part of each."
        )
        yield find("warning", "languages", text)


def _said(mix: Counter[str]) -> str:
    return ", ".join(f"{name} {n / mix.total():.0%}" for name, n in mix.most_common(3))


CHECKS = (check_sampled, check_decoding, check_same_pictures, check_boxes, check_texts, check_languages)


def examine(s: Sampled) -> list[Finding]:
    return [finding for check in CHECKS for finding in check(s)]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures for the page


def shot(data: Records, i: int, n: int, caption: str, *, marked: bool = False) -> Shot | None:
    """A thumbnail of picture `n` of sample `i`; None where it cannot be decoded, or the sample has none.

    Args:
        marked: draw the boxes of the sample's text, where it has one picture.
    """
    sizes = data.index.sizes(i)
    if not sizes:
        return None
    width, height = sizes[n]
    scale = THUMBNAIL / max(width, height)
    small = max(1, round(width * scale)), max(1, round(height * scale))
    try:
        pixels = decode(data.index.sources(i)[n], small)
        marks = _marks(data, i) if marked and len(sizes) == 1 else ()
    except RecordError:
        return None
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "JPEG", quality=80)
    return Shot(out.getvalue(), *small, line(caption), marks)


def _marks(data: Records, i: int) -> tuple[Mark, ...]:
    """Boxes of a sample's only picture as the model would read them, cut at the picture's border."""
    about = describe(data.index, data.fitted, data.chat, i)
    text = f"{about.question}\n{about.reference}"
    width, height = about.sizes[0]
    ends = (1000, 1000) if data.chat.family.box_convention == "relative1000" else (width, height)
    marks = []
    for box in boxes.parse(text):
        x1, x2 = (min(max(100 * x / ends[0], 0.0), 100.0) for x in (box.x1, box.x2))
        y1, y2 = (min(max(100 * y / ends[1], 0.0), 100.0) for y in (box.y1, box.y2))
        if x2 > x1 and y2 > y1:
            marks.append(Mark(x1, y1, x2 - x1, y2 - y1))
    return tuple(marks)


def contact_sheet(s: Sampled) -> list[tuple[str, list[Shot]]]:
    """(data set and side, pictures with question and answer): the first by the hash that chose the sample."""
    sheet = []
    broken = {one.sample for one in s.seen if one.failed}
    each = max(1, min(_SHEET, _MOST_SHEET // max(1, 2 * len(s.data.names))))
    for n, name in enumerate(s.data.names):
        for side, ids in (("trains", s.chosen.train), ("held out", s.chosen.held_out)):
            mine = ids[(s.data.index.dataset[ids] == n) & (s.data.index.n_images[ids] > 0)]
            order = mine[np.argsort(s.data.index.identity[mine], kind="stable")]
            shots: list[Shot] = []
            for i in order.tolist():
                if len(shots) == each:
                    break
                if i not in broken and (one := _captioned(s.data, i)):
                    shots.append(one)
            if shots:
                sheet.append((f"{name}, {side}", shots))
    return sheet


def _captioned(data: Records, i: int) -> Shot | None:
    try:
        about = describe(data.index, data.fitted, data.chat, i)
    except RecordError:
        return None
    return shot(data, i, 0, f"{line(about.question, 70)} → {line(about.reference, 70)}", marked=True)
