from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlft.data import images
from vlft.models.load import open_checkpoint
from vlft.testing.tiny import FAMILIES
from vlft.vision.patches import cut_patches, normalisation_table, split_pictures


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_pixel_values_equal_hugging_faces_pil_processor_bit_for_bit(
    tiny: Callable[..., Path], family: str, mode: str, tmp_path: Path
) -> None:
    folder = tiny(family)
    p = open_checkpoint(str(folder)).pictures
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    rng = np.random.default_rng(0)
    table = normalisation_table(p.mean, p.std, p.rescale_factor)
    for number, size in enumerate([(151, 97), (64, 300), (200, 200)]):
        channels = {"L": 1, "P": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
        raw = rng.integers(0, 256, (*size, channels), dtype=np.uint8).squeeze()
        picture = Image.fromarray(raw, "L" if mode == "P" else mode)
        path = tmp_path / f"{number}.{'tiff' if mode == 'CMYK' else 'png'}"
        (picture.convert("P") if mode == "P" else picture).save(path)
        shown = Image.open(path)
        if mode == "RGBA" and "alpha_composite" not in inspect.getsource(convert_to_rgb):
            # Older versions of transformers drop the alpha channel and show what lies under transparent pixels.
            shown = images.to_rgb(shown)
        expected = processor(shown, return_tensors="pt")
        _, rows, columns = expected["image_grid_thw"][0].tolist()
        height, width = rows * p.patch_size, columns * p.patch_size
        decoded = torch.from_numpy(images.decode(str(path), (width, height)))
        found = cut_patches([decoded], table, p.patch_size, p.merge_size, p.temporal_patch_size)
        assert torch.equal(found, expected["pixel_values"])


def test_pictures_are_split_as_they_were_laid() -> None:
    grids = torch.tensor([[1, 2, 4], [1, 4, 2]])
    pixels = torch.arange(2 * 3 * 8 * 14 * 14, dtype=torch.int64).to(torch.uint8)
    views = list(split_pictures(pixels, grids, 14))
    assert [tuple(v.shape) for v in views] == [(3, 28, 56), (3, 56, 28)]
    assert torch.equal(torch.cat([v.flatten() for v in views]), pixels)


@pytest.mark.parametrize("size", [10, 3 * 28 * 28 + 1])
def test_bytes_that_do_not_match_the_grids_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="do not match"):
        list(split_pictures(torch.zeros(size, dtype=torch.uint8), torch.tensor([[1, 2, 2]]), 14))
