"""A conversation after its pictures have moved: the same movement on every box and point, before it is tokenised.

Coordinates are followed where they are sure to be some: `objects` (boxes of the record itself), `"bbox_2d": [...]`,
`"point_2d": [...]` and `<|box_start|>...<|box_end|>`; with `box_format: model` a bare `[x1, y1, x2, y2]` as well, since
the registry then says that texts hold coordinates. A sample that speaks of places in any other way does not move.

Legend: T tokens, (x1, y1, x2, y2) and (x, y) fractions of a picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vlft.augmentation.geometry import TRIES, draw, kinds, move_place
from vlft.augmentation.ops import Matrix
from vlft.augmentation.policy import Policy
from vlft.augmentation.rules import refused
from vlft.data.formats import JSON_BOX, MARKED_BOX, BoxPart, Part, Record, RefPart, TextPart, Turn
from vlft.data.mixing import mix64_scalar
from vlft.data.tokens import Chat, Encoded, PictureSize
from vlft.family import Family

_SALT = 0x6E0
_OUTSIDE = 0.01
"""Part of a side by which a coordinate may lie outside; more means numbers of another convention."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_KEY = re.compile(r'"\w+"\s*:')
_N = r"\s*-?\d+(?:\.\d+)?\s*"
_BARE = re.compile(rf"\[({_N}(?:,{_N}){{3}})\]")
# What may be a place and is not followed: quads, tags, bare lists and pairs of numbers, keyed coordinates.
_UNKNOWN = re.compile(
    rf"<\|box_start\|>|<\|quad_start\|>|<box>|<point|<loc|\[{_N}(?:,{_N})+\]|\({_N}(?:,{_N})+\)"
    rf"|\b[xy]\d?[\"']?\s*[=:]\s*-?\d",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Mover:
    """Which movement a sample gets in an epoch: a function of these three and the sample's identity alone."""

    policy: Policy
    seed: int
    epoch: int


@dataclass(frozen=True)
class Moved:
    unit: Matrix | None
    """(3, 3) on fractions; None: the pictures stay."""
    encoded: Encoded | None = None
    """The conversation with its new coordinates; None: its tokens are as they were."""
    why: str = ""
    """Why a sample stays that could have moved, or which movements it was spared."""


def move(
    record: Record,
    mover: Mover,
    chat: Chat,
    sizes: Sequence[PictureSize],
    *,
    identity: int,
    bare_boxes: bool,
    most_tokens: int,
) -> Moved:
    """Draw movements of a sample until one is admitted by its words, its boxes and its planned length.

    Args:
        sizes: of its pictures, final ones included.
        identity: of the sample.
        bare_boxes: `[x1, y1, x2, y2]` in a text is a box.
        most_tokens: the length that rows were planned with, one token a picture.
    """
    why = refused(mover.policy.rules, _words(record))
    if "any" in why:
        return Moved(None, why=why["any"])
    followed = with_places(record, bare_boxes)
    if followed is None:
        return Moved(None, why="coordinates that cannot be followed")
    said = "; ".join(f"no {kind}: {cause}" for kind, cause in why.items())
    for attempt in range(TRIES):
        unit = draw(mover.policy, mix64_scalar(identity, mover.seed, mover.epoch, _SALT + attempt), sizes[0].final)
        if unit is None:
            return Moved(None, why=said)
        if kinds(unit) & why.keys():
            continue
        if not has_places(followed):
            return Moved(unit, why=said)
        new = move_record(followed, unit, chat.family, sizes)
        encoded = chat.encode(new, sizes) if new is not None else None
        # A number may have more digits than before. Plans count the widest; another tokenizer may surprise them.
        if encoded is not None and len(encoded.input_ids) <= most_tokens:
            return Moved(unit, encoded, said)
    return Moved(None, why=said or "no draw kept every box in the picture")


def _words(record: Record) -> str:
    """All that a conversation says, but for the keys of JSON: a "label" there does not speak of reading."""
    return _KEY.sub(" ", "\n".join(turn.text for turn in record.turns))


def has_places(record: Record) -> bool:
    return any(isinstance(part, BoxPart) for turn in record.turns for part in turn.parts)


def with_places(record: Record, bare_boxes: bool) -> Record | None:
    """The record with every coordinate of its texts as a part of its own; None: one of them cannot be followed."""
    turns: list[Turn] = []
    for turn in record.turns:
        parts: list[Part] = []
        for part in turn.parts:
            new = _split(part.text, bare_boxes) if isinstance(part, TextPart) else [part]
            if any(isinstance(p, TextPart | RefPart) and _UNKNOWN.search(p.text) for p in new):
                return None
            if any(isinstance(p, BoxPart) and len(p.numbers) not in (2, 4) for p in new):
                return None
            only = 0 if len(record.images) == 1 else None
            parts += [replace(p, image=only) if isinstance(p, BoxPart) and p.image is None else p for p in new]
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(record, turns=tuple(turns))


def _split(text: str, bare_boxes: bool) -> list[Part]:
    """A text cut at its coordinates, in the model's own convention, which keep the blanks between them."""
    found = [(m.start() + len(m.group(1)), m.end()) for m in JSON_BOX.finditer(text)]
    found += [m.span() for m in MARKED_BOX.finditer(text)]
    known = {end for _, end in found}
    found += [m.span() for m in _BARE.finditer(text) if bare_boxes and m.end() not in known]
    parts: list[Part] = []
    at = 0
    for start, end in sorted(found):
        numbers = tuple(float(n) for n in _NUMBER.findall(text[start:end]))
        parts.append(TextPart(text[at:start]))
        parts.append(BoxPart(numbers, "model", "json", None, _NUMBER.sub("{}", text[start:end])))
        at = end
    parts.append(TextPart(text[at:]))
    return [p for p in parts if not (isinstance(p, TextPart) and not p.text)]


def move_record(record: Record, unit: Matrix, family: Family, sizes: Sequence[PictureSize]) -> Record | None:
    """The record with every box and point where it is now; None: one of them is refused (`geometry.move_place`)."""
    turns: list[Turn] = []
    for turn in record.turns:
        parts: list[Part] = []
        for part in turn.parts:
            new = _moved_box(part, unit, family, sizes) if isinstance(part, BoxPart) else part
            if new is None:
                return None
            parts.append(new)
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(record, turns=tuple(turns))


def _moved_box(box: BoxPart, unit: Matrix, family: Family, sizes: Sequence[PictureSize]) -> BoxPart | None:
    fractions = _fractions(box, family, sizes)
    places = move_place(unit, fractions) if fractions is not None else None
    if places is None:
        return None
    if family.box_convention == "relative1000":  # thousandths ask for no picture: all of a sample move alike
        return replace(box, numbers=tuple(1000 * n for n in places), unit="norm1000")
    return replace(box, numbers=places, unit="norm1")


def _fractions(box: BoxPart, family: Family, sizes: Sequence[PictureSize]) -> tuple[float, ...] | None:
    """Coordinates as fractions of their picture; None: its size is not known, or they lie outside."""
    size = sizes[box.image] if box.image is not None else None
    pixels = family.box_convention == "resized_pixels"
    if box.unit == "norm1":
        ends: tuple[float, float] | None = (1.0, 1.0)
    elif box.unit == "norm1000" or (box.unit == "model" and not pixels):
        ends = (1000.0, 1000.0)
    elif size is None:
        ends = None
    else:
        ends = size.final if box.unit == "model" else (size.width, size.height)
    if ends is None or (pixels and size is None):
        return None
    fractions = [n / ends[k % 2] for k, n in enumerate(box.numbers)]
    if not all(-_OUTSIDE <= n <= 1 + _OUTSIDE for n in fractions):
        return None
    return tuple(min(max(n, 0.0), 1.0) for n in fractions)


# ------------------------------------------------------------------ lengths


def spare_tokens(
    tokens: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int32], digit_ids: Sequence[int], widest: int = 4
) -> npt.NDArray[np.int64]:
    """(N,) tokens by which each sample may grow when its coordinates move: every number might become a wide one.

    Qwen's tokenizers write each digit as a token of its own, so a number of d digits may grow by `widest` - d.

    Args:
        tokens: (T,) ids of all samples, end to end, as the index stores them without their highest bit.
        lengths: (N,) tokens of each.
        digit_ids: ids of the tokens 0 to 9.
        widest: digits: 1000 thousandths, or a side below 10,000 pixels.
    """
    owner_T = np.repeat(np.arange(len(lengths)), lengths)
    at = np.flatnonzero(np.isin(tokens, np.array(digit_ids, np.uint32)))
    if not len(at):
        return np.zeros(len(lengths), np.int64)
    opens = np.concatenate([[True], (np.diff(at) > 1) | (np.diff(owner_T[at]) > 0)])
    starts = np.flatnonzero(opens)
    digits = np.diff(np.concatenate([starts, [len(at)]]))
    grows = np.maximum(0, widest - digits)
    return np.bincount(owner_T[at[starts]], grows, minlength=len(lengths)).astype(np.int64)
