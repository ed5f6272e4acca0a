"""Thumbnails for the page: of pictures as the model sees them, with the boxes of their texts."""

from __future__ import annotations

import io

from PIL import Image

from vlft import boxes
from vlft.data.images import decode
from vlft.data.show import describe
from vlft.doctor.findings import Mark, Shot
from vlft.doctor.records import Records, line
from vlft.errors import RecordError

THUMBNAIL = 200
"""Pixels of the longer side."""


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
    ends = boxes.ends(data.chat.family.box_convention, about.sizes[0])
    marks = []
    for box in boxes.parse(text):
        x1, x2 = (min(max(100 * x / ends[0], 0.0), 100.0) for x in (box.x1, box.x2))
        y1, y2 = (min(max(100 * y / ends[1], 0.0), 100.0) for y in (box.y1, box.y2))
        if x2 > x1 and y2 > y1:
            marks.append(Mark(x1, y1, x2 - x1, y2 - y1))
    return tuple(marks)


def captioned(data: Records, i: int) -> Shot | None:
    """The first picture of sample `i` with its question and answer."""
    try:
        about = describe(data.index, data.fitted, data.chat, i)
    except RecordError:
        return None
    return shot(data, i, 0, f"{line(about.question, 70)} → {line(about.reference, 70)}", marked=True)
