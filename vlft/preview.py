"""`vlft augment-preview`: a contact sheet of what training would see of its first samples, epoch by epoch.

Samples, movements, texts and pixels come from the same functions that a run calls, with the same seeds. Boxes and
points are read back from the rewritten text, as the model would be taught them, and drawn on the moved picture: where
the two disagree, it shows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vlft import boxes
from vlft.augmentation.policy import Policy, read_policy
from vlft.data.collate import collate
from vlft.data.formats import BoxPart
from vlft.data.loader import decode_sample
from vlft.data.moved import Mover, with_places
from vlft.data.prepare import Data, DataOptions, prepare_data
from vlft.data.sample import Sample, build_sample
from vlft.errors import DataError, RecordError
from vlft.models.load import PictureFacts, open_checkpoint
from vlft.vision.augment import augment_row
from vlft.vision.patches import split_pictures

CELL, GAP, LINE = 224, 10, 13
"""Pixels: a cell's side, the space between cells, a line of text."""
_INK, _PAPER, _BOX = "#1f2328", "#ffffff", "#d1242f"


def preview(
    model: str,
    registry: Path,
    output: Path,
    *,
    augmentation: str,
    dataset_names: Sequence[str] | None,
    samples: int,
    epochs: int,
    seed: int,
    **limits: Any,
) -> str:
    """Write the sheet; returns a sentence about it.

    Args:
        samples: rows, those that training with this seed takes first.
        epochs: columns after that of the untouched picture.
        limits: fields of `DataOptions` that bound pictures and samples.
    Raises:
        ConfigError: the policy or the registry is wrong.
        DataError: no sample has a picture.
    """
    policy = read_policy(augmentation)
    checkpoint = open_checkpoint(model)
    facts = checkpoint.pictures
    data = prepare_data(
        DataOptions(
            registry=registry, names=dataset_names, folder=checkpoint.folder, family=checkpoint.family,
            layout=facts.layout, min_pixels=facts.min_pixels, on_too_long="shrink",
            max_bad_fraction=1.0, allow_remote_images=False, seed=seed, global_batch=1, train_batch_size=1,
            eval_batch_size=1, rows_per_rank=1, rank=0, world_size=1, num_workers=0, pin_memory=False, progress=False,
            policy=policy, **limits,
        )
    )  # fmt: skip
    order = data.plan.order(0)
    pictured = order[data.index.n_images[order] > 0][:samples].tolist()
    if not pictured:
        raise DataError(f"no sample of {registry} has a picture to show; give --dataset_names of one that has.")
    rows = [sheet_row(data, facts, policy, i, epochs) for i in pictured]
    sheet = _stacked(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, quality=85)  # of a JPEG; a PNG has none
    return f"{output}: {len(rows)} samples as they are and in {epochs} epochs under {policy.name}, seed {seed}."


def sheet_row(data: Data, facts: PictureFacts, policy: Policy, i: int, epochs: int) -> Image.Image:
    """A sample: its picture untouched, then as each epoch shows it, with what is said below."""
    cells = []
    for epoch in (None, *range(epochs)):
        try:
            sample, pictures = shown(data, facts, policy, i, epoch)
        except RecordError as error:
            cells.append(_cell([], "", str(error)))
            continue
        places = places_of(data, sample)
        head = "as it is" if epoch is None else f"epoch {epoch}: {_movement(sample)}"
        drawn = [draw_places(picture, [p for at, p in places if at == k]) for k, picture in enumerate(pictures)]
        cells.append(_cell(drawn, head, said(data, sample)))
    row = Image.new("RGB", (sum(c.width + GAP for c in cells), max(c.height for c in cells)), _PAPER)
    for k, cell in enumerate(cells):
        row.paste(cell, (k * (CELL + GAP), 0))
    return row


def shown(
    data: Data, facts: PictureFacts, policy: Policy, i: int, epoch: int | None
) -> tuple[Sample, list[torch.Tensor]]:
    """A sample and its pictures, uint8 (3, H, W), as an epoch's forward sees them; None: untouched.

    Raises:
        RecordError: a picture cannot be decoded.
    """
    seed = data.options.seed
    mover = Mover(policy, seed, epoch) if epoch is not None and policy.geometric else None
    sample = build_sample(data.index, data.fitted, data.chat, i, mover)
    chat = data.chat
    row = collate(
        [sample], [decode_sample(sample)], image_token_id=chat.image_token_id, pad_token_id=chat.pad_token_id,
        seed=seed, epoch=epoch or 0, merge=data.fitted.limits.merge,
    )  # fmt: skip
    pictures = list(split_pictures(row.pixels_u8, row.image_grid_thw, facts.patch_size))
    ops = policy.photometric if epoch is not None else ()
    return sample, augment_row(pictures, ops, row.image_sample.tolist(), row.sample_seeds.tolist(), row.moves)


def said(data: Data, sample: Sample) -> str:
    """What is learnt of the sample, as tokens say it."""
    text: str = data.chat.tokenizer.decode(sample.labels[sample.labels >= 0])
    return text.replace(data.chat.end_token, " ").strip()


def places_of(data: Data, sample: Sample) -> list[tuple[int, tuple[float, ...]]]:
    """(picture, box or point as fractions of it) of the sample's tokens, in the order of the text."""
    tokens = sample.input_ids[sample.input_ids != data.chat.image_token_id]
    found = boxes.places(data.chat.tokenizer.decode(tokens))
    record = data.index.parsed(sample.index)
    parts = with_places(record, data.index.specs[sample.dataset].box_format == "model") or record
    owners = [part.image or 0 for turn in parts.turns for part in turn.parts if isinstance(part, BoxPart)]
    owners = owners if len(owners) == len(found) else [0] * len(found)
    convention = data.chat.family.box_convention
    out = []
    for owner, numbers in zip(owners, found, strict=True):
        ends = boxes.ends(convention, sample.final_wh[owner])
        out.append((owner, tuple(n / ends[k % 2] for k, n in enumerate(numbers))))
    return out


# ------------------------------------------------------------------ drawing


def draw_places(pixels: torch.Tensor, places: Sequence[tuple[float, ...]]) -> Image.Image:
    """A picture, (3, H, W) uint8, with boxes and points given as fractions of it."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0)))
    picture.thumbnail((CELL, CELL))
    pen = ImageDraw.Draw(picture)
    for numbers in places:
        ends = [n * (picture.width, picture.height)[k % 2] for k, n in enumerate(numbers)]
        if len(ends) == 4:
            x1, x2 = sorted(ends[::2])
            y1, y2 = sorted(ends[1::2])
            pen.rectangle((x1, y1, x2 - 1, y2 - 1), outline=_BOX, width=2)
        else:
            x, y = ends
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=_BOX, width=2)
    return picture


def _movement(sample: Sample) -> str:
    moved = sample.moved
    return ("moved" if moved.unit is not None else "stays") + (f" ({moved.why})" if moved.why else "")


def _cell(pictures: Sequence[Image.Image], head: str, text: str) -> Image.Image:
    """One column of a row: what happened, the pictures side by side, what is said."""
    font = ImageFont.load_default(10)
    above, below = textwrap.wrap(head, 42)[:3], textwrap.wrap(text, 42)[:4]
    size = (max(1, sum(p.width + 4 for p in pictures) - 4), max([p.height for p in pictures] or [1]))
    joined = Image.new("RGB", size, "#ddd")
    at = 0
    for picture in pictures:
        joined.paste(picture, (at, 0))
        at += picture.width + 4
    joined.thumbnail((CELL, CELL))
    cell = Image.new("RGB", (CELL, 3 * LINE + joined.height + 4 * LINE + 8), _PAPER)
    pen = ImageDraw.Draw(cell)
    for k, line in enumerate(above):
        pen.text((0, k * LINE), line, fill=_INK, font=font)
    cell.paste(joined, (0, 3 * LINE + 2))
    for k, line in enumerate(below):
        pen.text((0, 3 * LINE + joined.height + 4 + k * LINE), line, fill=_INK, font=font)
    return cell


def _stacked(rows: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(r.width for r in rows) + GAP, sum(r.height + GAP for r in rows) + GAP), _PAPER)
    y = GAP
    for row in rows:
        sheet.paste(row, (GAP, y))
        y += row.height + GAP
    return sheet
