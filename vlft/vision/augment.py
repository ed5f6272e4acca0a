"""Pictures are augmented on the device with Kornia, one at a time, seeded by (seed, epoch, sample): not by rank or row.

`photometric` changes values only: colour, blur, noise, JPEG-like artefacts. `geometric` adds horizontal flips and
crops. A sample whose conversation holds boxes or points gets only photometric changes, because its coordinates would
no longer be true. The picture keeps its size: its patch grid and token count were planned before.

The generator of Kornia is torch's global one; it is forked, seeded and restored around every picture, so that neither
dropout nor the next picture depends on how many values an augmentation drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Policy = Literal["photometric", "geometric"]


@lru_cache(maxsize=4)
def _photometric() -> nn.Module:
    import kornia.augmentation as ka

    ops: list[Any] = [
        ka.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02, p=0.8),
        ka.RandomGaussianBlur((3, 3), (0.1, 1.5), p=0.2),
        ka.RandomGaussianNoise(mean=0.0, std=0.02, p=0.3),
        ka.RandomJPEG(jpeg_quality=(40.0, 95.0), p=0.3),
    ]
    made: nn.Module = ka.AugmentationSequential(*ops, data_keys=["input"])
    return made


@lru_cache(maxsize=64)
def _geometric(height: int, width: int) -> nn.Module:
    import kornia.augmentation as ka

    # Crops keep most of the picture: an answer must stay visible.
    crop = ka.RandomResizedCrop((height, width), scale=(0.8, 1.0), ratio=(0.9, 1.1), resample="bicubic", p=0.5)
    made: nn.Module = ka.AugmentationSequential(ka.RandomHorizontalFlip(p=0.5), crop, data_keys=["input"])
    return made


def _fork_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


@torch.no_grad()
def augment(picture: Tensor, seed: int, policy: Policy, *, values_only: bool) -> Tensor:
    """One augmented picture.

    Args:
        picture: uint8 (3, H, W).
        seed: 63-bit; equal seeds and pictures give equal results on one device.
        values_only: the sample has boxes or points, so nothing may move.
    Returns:
        uint8 (3, H, W) on the same device.
    """
    _, height, width = picture.shape
    with torch.random.fork_rng(devices=_fork_devices(picture.device)):
        torch.manual_seed(seed)
        x = (picture.unsqueeze(0).float() / 255.0).contiguous()
        if policy == "geometric" and not values_only:
            x = _geometric(height, width)(x).clamp(0.0, 1.0)
        x = _photometric()(x)
    out: Tensor = (x[0].clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return out


def augment_row(
    pictures: Sequence[Tensor],
    policy: Policy | None,
    image_sample: Sequence[int],
    sample_seeds: Sequence[int],
    photometric_only: Sequence[bool],
) -> list[Tensor]:
    """Augment the pictures of a row; the k-th picture of a sample draws from the sample's seed plus k.

    Args:
        pictures: uint8 (3, H, W) each.
        policy: None returns the pictures as they are.
        image_sample: for each picture, the index of its sample in the row.
        sample_seeds: for each sample, the mix of (seed, epoch, sample).
        photometric_only: for each sample, whether it has boxes or points.
    """
    if policy is None:
        return list(pictures)
    seen: dict[int, int] = {}
    out = []
    for picture, sample in zip(pictures, image_sample, strict=True):
        k = seen[sample] = seen.get(sample, -1) + 1
        seed = (int(sample_seeds[sample]) + k * 0x9E3779B9) % 2**63
        out.append(augment(picture, seed, policy, values_only=bool(photometric_only[sample])))
    return out
