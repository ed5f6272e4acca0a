"""What a vision tower is told of a row's pictures beside their pixels: borders, positions, windows.

All of it follows from the patch grids. The tower would work it out on the device, and wait for it several times; on the
CPU it takes the host longer than a GPU needs for some layers. So the data workers do it, as part of the row; whoever
comes without (chat, tests) has the forward do it. The formulas are transformers' own (`transformers.vision_utils`).

I images, P patches. Torch is imported where it is used: commands read this module at their start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

BLANK = ((1, 2, 2),)
"""The grid that a tower sees in a row without pictures: one merged patch."""


@dataclass(frozen=True)
class Layout:
    """How a tower divides pictures."""

    merge: int
    """Patches of a merged token's side."""
    patch: int
    """Pixels of a patch's side."""
    window: int = 0
    """Pixels of the side of the windows that attend to themselves; 0: there are none."""
    table: int = 0
    """Side of the square table of learnt positions, of which a picture's are interpolated; 0: there is none."""

    @property
    def factor(self) -> int:
        """Pixels that both sides of a picture are multiples of."""
        return self.patch * self.merge


@dataclass(frozen=True)
class TowerInputs:
    """Made for pictures, or for `BLANK`.

    A class, not a dict: engines look into the dicts that a forward is called with, and FSDP would round the weights of
    the interpolation to bf16.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    """The tower's arguments by name, the (I, 3) grid itself among them."""
    longest: dict[str, int]
    """Likewise; read by Python code."""

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.tensors, **self.longest}

    def map(self, f: Callable[[Tensor], Tensor]) -> TowerInputs:
        """With `f` of each tensor."""
        return replace(self, tensors={name: f(x) for name, x in self.tensors.items()})

    def equal(self, other: object) -> bool:
        """Equality of everything, for tests."""
        return (
            isinstance(other, TowerInputs)
            and (self.layout, self.longest, [*self.tensors]) == (other.layout, other.longest, [*other.tensors])
            and all(x.equal(other.tensors[name]) for name, x in self.tensors.items())
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # As bytes to another process: each shared tensor would hold a file descriptor while it lives.
        return _received, (self.layout, {name: x.numpy() for name, x in self.tensors.items()}, self.longest)


def _received(layout: Layout, arrays: dict[str, Any], longest: dict[str, int]) -> TowerInputs:
    import torch

    return TowerInputs(layout, {name: torch.from_numpy(x) for name, x in arrays.items()}, longest)


def tower_inputs(grids: Tensor | npt.NDArray[np.int64] | Sequence[Sequence[int]], layout: Layout) -> TowerInputs:
    """
    Args:
        grids: (I, 3) patches (t, h, w) of each picture, on the CPU; without any, of `BLANK`.
    """
    import torch
    from transformers import vision_utils as vu

    grid_thw = torch.as_tensor(np.asarray(grids if len(grids) else BLANK))
    borders = vu.get_vision_cu_seqlens(grid_thw)
    tensors = {
        "grid_thw": grid_thw,
        "cu_seqlens": borders,
        "position_ids": vu.get_vision_position_ids(grid_thw, layout.merge),
    }
    longest = {"max_seqlen": _longest(borders)}
    if layout.window:
        index, windows = vu.get_vision_window_index(
            grid_thw, spatial_merge_size=layout.merge, window_size=layout.window, patch_size=layout.patch
        )
        tensors |= {"window_index": index, "cu_window_seqlens": windows}
        longest["max_window_seqlen"] = _longest(windows)
    if layout.table:
        places, weights = vu.get_vision_interpolation_indices_and_weights(
            grid_thw, num_grid_per_side=layout.table, mode="bilinear", align_corners=True,
            spatial_merge_size=layout.merge,
        )  # fmt: skip
        tensors |= {"interp_indices": places, "interp_weights": weights}
    return TowerInputs(layout, tensors, longest)


def _longest(borders: Tensor) -> int:
    return int(borders.diff().max())
