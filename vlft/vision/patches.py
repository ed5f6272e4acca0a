"""uint8 pictures -> `pixel_values`, on the device, equal to Hugging Face's PIL image processor bit for bit.

The bus carries one byte a value instead of eight (fp32, doubled in time). Normalisation is a table of 256 values a
channel, computed as the processor computes it (rescale in float64, normalise in float32), so equality holds on every
device by construction.

P patches, I images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def normalisation_table(mean: Sequence[float], std: Sequence[float], rescale_factor: float) -> Tensor:
    """(3, 256) fp32: channel c's value v becomes table[c, v]."""
    values = (np.arange(256).astype(np.float64) * rescale_factor).astype(np.float32)
    rows = [(values - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    return torch.from_numpy(np.stack(rows))


def split_pictures(pixels_u8: Tensor, image_grid_thw: Tensor, patch_size: int) -> Iterator[Tensor]:
    """Views (3, H, W) of the pictures that lie end to end in `pixels_u8`.

    Raises:
        ValueError: the grids and the bytes do not add up.
    """
    start = 0
    for _, grid_h, grid_w in image_grid_thw.tolist():
        height, width = grid_h * patch_size, grid_w * patch_size
        end = start + 3 * height * width
        if end > len(pixels_u8):
            break
        yield pixels_u8[start:end].view(3, height, width)
        start = end
    else:
        if start == len(pixels_u8):
            return
    raise ValueError(f"{len(pixels_u8)} bytes of pixels do not match the grids {image_grid_thw.tolist()}.")


def cut_patches(
    pictures: Sequence[Tensor], table: Tensor, patch_size: int, merge_size: int, temporal_patch_size: int
) -> Tensor:
    """(P, 3 * temporal * patch * patch) fp32 `pixel_values` of all pictures, in the order the towers expect.

    Args:
        pictures: uint8 (3, H, W) each; H and W are multiples of patch_size * merge_size.
        table: from `normalisation_table`, on the pictures' device.
    """
    # One launch a picture, and three for the row: the host is not yet ahead of the device here.
    side = patch_size * patch_size
    cut = torch.empty(sum(x.numel() for x in pictures) // (3 * side), 3, side, dtype=torch.uint8, device=table.device)
    end = 0
    for picture in pictures:
        _, height, width = picture.shape
        rows, columns = height // patch_size // merge_size, width // patch_size // merge_size
        x = picture.view(3, rows, merge_size, patch_size, columns, merge_size, patch_size)
        # Patches of one merged token lie together: (rows, columns, merge, merge, 3, patch, patch).
        x = x.permute(1, 4, 2, 5, 0, 3, 6)
        start, end = end, end + picture.numel() // (3 * side)
        cut[start:end].view(x.shape).copy_(x)
    firsts = torch.arange(0, table.numel(), table.shape[1], dtype=torch.int32, device=table.device).view(1, 3, 1)
    values = table.flatten().index_select(0, (cut.int() + firsts).flatten()).view(cut.shape)
    # A still picture fills all temporal slots.
    return values.unsqueeze(2).expand(-1, -1, temporal_patch_size, -1).flatten(1)
