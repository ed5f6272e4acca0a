"""From a collated row to the arguments of the packed forward, on the device: move, augment, normalise, cut patches.

The one place where data (bytes), vision (pictures) and models (arguments) meet.
"""

from __future__ import annotations

from typing import Any

import torch

from vlft.augmentation.policy import Policy
from vlft.data.collate import Row
from vlft.models.load import PictureFacts
from vlft.vision.augment import augment_row
from vlft.vision.patches import cut_patches, normalisation_table, split_pictures


class ToInputs:
    """Callable (row, training) -> keyword arguments of `PackedVLM.forward`."""

    def __init__(self, pictures: PictureFacts, policy: Policy | None, device: torch.device) -> None:
        self.pictures, self.policy, self.device = pictures, policy, device
        self.table = normalisation_table(pictures.mean, pictures.std, pictures.rescale_factor).to(device)

    def __call__(self, row: Row, training: bool) -> dict[str, Any]:
        row = row.to(self.device)
        return {
            "input_ids_T": row.input_ids_T,
            "position_ids_4T": row.position_ids_4T,
            "labels_T": row.labels_T,
            "cu_seqlens": row.cu_seqlens.to(self.device, non_blocking=True),
            "max_seqlen": int(row.cu_seqlens.diff().max()),
            "pixel_values": self._patches(row, self.policy if training else None),
            "image_grid_thw": row.image_grid_thw,
            "supervised_S": row.supervised_S,
            "pictured_M": row.pictured_M,
            "tower": row.tower,
        }

    def _patches(self, row: Row, policy: Policy | None) -> torch.Tensor | None:
        if not len(row.image_grid_thw):
            return None
        p = self.pictures
        views = split_pictures(row.pixels_u8, row.image_grid_thw, p.patch_size)
        shown = augment_row(
            list(views),
            policy.photometric if policy else (),
            row.image_sample.tolist(),
            row.sample_seeds.tolist(),
            row.moves,
        )
        return cut_patches(shown, self.table, p.patch_size, p.merge_size, p.temporal_patch_size)
