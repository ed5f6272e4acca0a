"""Pictures are made ready beside what the GPU is at work on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vlft.augmentation.geometry import draw
from vlft.augmentation.ops import _always
from vlft.augmentation.policy import read_policy
from vlft.batch import ToInputs
from vlft.data.collate import Row
from vlft.grids import Layout, tower_inputs
from vlft.models.load import PictureFacts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYOUT = Layout(patch=14, merge=2, window=112)
FACTS = PictureFacts(LAYOUT, 2, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 1 / 255, 3136, 1 << 20)
PICTURES = 6
SIDES = (504, 700)


@pytest.fixture
def row() -> Row:
    height, width = SIDES
    grids = torch.tensor([[1, height // 14, width // 14]] * PICTURES)
    tokens = PICTURES * height * width // 784
    moved = draw(read_policy("document"), 5, (width, height))
    moves = np.stack([np.eye(3) if i % 2 or moved is None else np.asarray(moved) for i in range(PICTURES)])
    made = Row(
        input_ids_T=torch.arange(tokens)[None], position_ids_4T=torch.zeros(4, 1, tokens, dtype=torch.int64),
        labels_T=torch.full((1, tokens), -100), supervised_S=torch.zeros(0, dtype=torch.int64),
        pictured_M=torch.arange(tokens), cu_seqlens=torch.arange(PICTURES + 1, dtype=torch.int32),
        pixels_u8=torch.randint(0, 256, (PICTURES * 3 * height * width,), dtype=torch.uint8), image_grid_thw=grids,
        image_sample=torch.arange(PICTURES), sample_seeds=torch.arange(PICTURES) * 7919, moves=torch.from_numpy(moves),
        sample_ids=tuple(range(PICTURES)), dataset_ids=(0,) * PICTURES, tower=tower_inputs(grids, LAYOUT),
    )  # fmt: skip
    return made.pin_memory()


def test_the_host_does_not_wait_for_what_the_gpu_was_asked_for_before(row: Row) -> None:
    document = read_policy("document")
    # Each of them for every picture, but for the dearest.
    every = tuple(_always(op) for op in document.photometric if op.name != "RandomJPEG")
    to_inputs = ToInputs(FACTS, replace(document, photometric=every), torch.device("cuda"))
    to_inputs(row, True)  # kernels are loaded, which waits
    torch.cuda.synchronize()
    torch.cuda._sleep(8_000_000_000)  # some four seconds
    busy = torch.cuda.Event()
    busy.record()
    to_inputs(row, True)
    waiting = not busy.query()
    torch.cuda.synchronize()
    assert waiting


def test_it_is_used_only_when_it_is_there(row: Row) -> None:
    to_inputs = ToInputs(FACTS, None, torch.device("cuda"))  # without a policy nothing waits
    right = copies(to_inputs(row, True))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # or what was right before lies there
    assert to_inputs._aside is not None
    with torch.cuda.stream(to_inputs._aside):
        torch.cuda._sleep(500_000_000)
    found = copies(to_inputs(row, True))
    assert equal(found, right)


def test_its_memory_serves_nothing_else_before_it_is_read(row: Row) -> None:
    to_inputs = ToInputs(FACTS, read_policy("document"), torch.device("cuda"))
    right = copies(to_inputs(row, True))
    torch.cuda.synchronize()
    other = another(row)
    for _ in range(8):
        made = to_inputs(row, True)
        torch.cuda._sleep(50_000_000)  # so that the next row is made before this one is read
        found = copies(made)
        del made
        to_inputs(other, False)
        assert equal(found, right)


def copies(made: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of all tensors that a forward gets on the GPU, made there."""
    every = {**made, **made["tower"].tensors}
    return {name: x + 0 for name, x in every.items() if isinstance(x, torch.Tensor) and x.is_cuda}


def equal(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return found.keys() == right.keys() and all(x.equal(right[name]) for name, x in found.items())


def another(row: Row) -> Row:
    """Of the same sizes, with other values: its pictures stand where those lie."""
    grids = row.image_grid_thw[:, [0, 2, 1]]
    fields = {name: getattr(row, name) + 1 for name in ("input_ids_T", "position_ids_4T", "labels_T")}
    pixels = 255 - row.pixels_u8
    made = replace(row, **fields, pixels_u8=pixels, image_grid_thw=grids, tower=tower_inputs(grids, LAYOUT))
    return made.pin_memory()
