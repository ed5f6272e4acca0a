"""Pictures are augmented on the device, one at a time, by values drawn from the sample's seed: not from rank or row.

How a picture moves was decided in the worker that tokenised its text (vlft.data.moved); here the same matrix warps it
with Kornia. The picture keeps its size, and so its patch grid and its tokens. Values (light, colour, blur, noise) are
changed by Kornia's ops afterwards, each picture of a sample by draws of its own.

Kornia draws from torch's global generators. They are forked around a row and seeded anew for every picture, so that
neither dropout nor the next picture depends on how many values an augmentation drew. Which ops change a picture, and
how much, is drawn on the CPU; the pixels of noise on the pictures' device, so that they are others on another kind of
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlft.augmentation.ops import Op, certain, chance

_GOLDEN = 0x9E3779B9


def _fork_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def warp(x: Tensor, move: Tensor) -> Tensor:
    """Move a picture by a matrix; outside of it, its border is repeated.

    The matrix is inverted here on the CPU: Kornia's warp would do so on the device, and wait for it.

    Args:
        x: (1, 3, H, W) float.
        move: (3, 3) float64 on the CPU, on fractions of the picture, from where things were to where they are.
    """
    from kornia.geometry.transform import homography_warp

    height, width = x.shape[-2:]
    # Fractions of the picture -> positions of pixel centres from -1 to 1, the first centre at -1, as the grid counts.
    scale_x, scale_y = 2 * width / (width - 1), 2 * height / (height - 1)
    to_grid = torch.tensor(
        [[scale_x, 0, -scale_x / 2], [0, scale_y, -scale_y / 2], [0, 0, 1.0]], dtype=torch.float64
    )  # fmt: skip
    back = to_grid @ torch.linalg.inv(move) @ torch.linalg.inv(to_grid)
    out: Tensor = homography_warp(
        x, back.float()[None].to(x.device, non_blocking=True), (height, width), padding_mode="border",
        align_corners=True, normalized_coordinates=True, normalized_homography=True,
    )  # fmt: skip
    return out


def drawn(ops: Sequence[Op], seed: int) -> list[Op]:
    """Those that change a picture. Seeds torch's generators, from which they then draw: fork them before.

    Drawn here, since Kornia would apply every op and choose afterwards: for the policies that ship, seven of ten in
    vain, with each some dozen launches.
    """
    torch.manual_seed(seed % 2**63)
    return [op for op, value in zip(ops, torch.rand(len(ops)).tolist(), strict=True) if value < chance(op)]


def change(x: Tensor, ops: Sequence[Op]) -> Tensor:
    """Change the values of a picture, (1, 3, H, W) from 0 to 1, by all these."""
    for op in ops:
        made = certain(op, x.device)
        x = made(x).clamp(0.0, 1.0)
        made._params = {}  # Kornia would keep the last picture's noise until the next one
    return x


@torch.no_grad()
def augment_row(
    pictures: Sequence[Tensor],
    photometric: Sequence[Op],
    image_sample: Sequence[int],
    sample_seeds: Sequence[int],
    moves: Tensor,
) -> list[Tensor]:
    """Augment the pictures of a row; the k-th picture of a sample draws from the sample's seed plus k.

    Args:
        pictures: uint8 (3, H, W) each.
        photometric: ops that change values; none changes none.
        image_sample: for each picture, the index of its sample in the row.
        sample_seeds: for each sample, the mix of (seed, epoch, sample).
        moves: (B, 3, 3) float64 on the CPU, for each sample; identity: its pictures stay.
    Returns:
        uint8 (3, H, W) each on the same device. A picture that nothing changes is the one that was given.
    """
    still = torch.eye(3, dtype=moves.dtype)
    moving = [not torch.equal(move, still) for move in moves]
    if not photometric and not any(moving):
        return list(pictures)
    seen: dict[int, int] = {}
    out = []
    with torch.random.fork_rng(devices=_fork_devices(pictures[0].device)):
        for picture, sample in zip(pictures, image_sample, strict=True):
            k = seen[sample] = seen.get(sample, -1) + 1
            ops = drawn(photometric, int(sample_seeds[sample]) + k * _GOLDEN)
            if not ops and not moving[sample]:
                out.append(picture)
                continue
            x = picture.unsqueeze(0).float() / 255.0
            x = change(warp(x, moves[sample]) if moving[sample] else x, ops)
            out.append((x[0].clamp(0.0, 1.0) * 255.0).round().to(torch.uint8))
    return out
