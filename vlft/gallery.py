"""Held-out pictures for people to look at: gallery/ of a run, which the report and the trackers show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from vlft.data.show import Shown

LONGEST = 640
"""Pixels of a thumbnail's longer side."""


def write_gallery(folder: Path, samples: Iterable[Shown], *, boxes: str) -> None:
    """Write thumbnails and gallery.json (docs/run-folder.md).

    Args:
        boxes: the family's convention, which says what a coordinate in an answer means.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for n, sample in enumerate(samples):
        pictures = []
        for k, pixels in enumerate(sample.pictures):
            name = f"{n:04d}-{k}.jpg"
            picture = Image.fromarray(pixels.transpose(1, 2, 0))
            size = {"width": picture.width, "height": picture.height}
            picture.thumbnail((LONGEST, LONGEST))
            picture.save(folder / name, quality=85)
            pictures.append({"file": name, **size})
        about = sample.about
        shown.append(
            {"dataset": sample.dataset, "id": about.id, "question": about.question, "reference": about.reference,
             "pictures": pictures}
        )  # fmt: skip
    text = json.dumps({"schema": 1, "boxes": boxes, "samples": shown}, ensure_ascii=False, indent=1)
    # Last: it says that all is there. A path that is no UTF-8 holds half surrogates, which JSON writes as an escape.
    (folder / "gallery.json").write_bytes(text.encode("utf-8", "backslashreplace"))


def thumbnails(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """(dataset, id) -> the thumbnails of its pictures; empty without a gallery."""
    path = folder / "gallery.json"
    if not path.exists():
        return {}
    samples = json.loads(path.read_text(encoding="utf-8"))["samples"]
    return {(s["dataset"], s["id"]): [folder / p["file"] for p in s["pictures"]] for s in samples}
