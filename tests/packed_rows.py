"""Made-up samples as one row for `PackedVLM`, where no data set is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlft.data.positions import mrope
from vlft.models.forward import IGNORE

Grids = list[tuple[int, int, int]]


class Example:
    """One sample: tokens, labels, pictures."""

    def __init__(self, family: str, source: Any, grids: Grids, seed: int) -> None:
        rng = np.random.default_rng(seed)
        image = source.config.image_token_id
        ids: list[int] = rng.integers(20, 400, 5).tolist()
        for _, h, w in grids:
            ids += [9, *[image] * (h * w // 4), 10]
        ids += rng.integers(20, 400, 9).tolist()
        self.ids = torch.tensor([ids])
        self.grids = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
        vision = source.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        generator = torch.Generator().manual_seed(seed)
        patches = sum(h * w for _, h, w in grids)
        self.pixels = torch.randn(patches, width, generator=generator) if grids else None
        self.labels = torch.full_like(self.ids, IGNORE)
        self.labels[:, -6:-1] = self.ids[:, -5:]
        self.positions = torch.from_numpy(mrope(self.ids[0].numpy(), image, self.grids.numpy()))


def packed_row(examples: list[Example]) -> dict[str, Any]:
    lengths = [e.ids.shape[1] for e in examples]
    pixels = [e.pixels for e in examples if e.pixels is not None]
    return {
        "input_ids_T": torch.cat([e.ids for e in examples], 1),
        "position_ids_4T": torch.cat([e.positions for e in examples], 1).unsqueeze(1),
        "labels_T": torch.cat([e.labels for e in examples], 1),
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
        "pixel_values": torch.cat(pixels) if pixels else None,
        "image_grid_thw": torch.cat([e.grids for e in examples]),
    }


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])
