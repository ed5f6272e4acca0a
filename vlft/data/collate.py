"""Samples and their pictures as one padding-free row.

Legend: T tokens, I images, B samples of the row, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlft.data.mixing import mix64_scalar
from vlft.data.positions import mrope
from vlft.data.sample import IGNORE, Sample
from vlft.grids import Layout, TowerInputs, tower_inputs

if TYPE_CHECKING:
    import torch

# What the device needs; the rest is read by Python code, which must not wait for a copy back.
_ON_DEVICE = ("input_ids_T", "position_ids_4T", "labels_T", "supervised_S", "pictured_M", "pixels_u8")
_STILL = np.eye(3)


@dataclass(frozen=True)
class Row:
    """One row for one forward. Tensors that no kernel reads stay on the CPU."""

    input_ids_T: torch.Tensor
    """(1, T) int64: samples laid end to end"""
    position_ids_4T: torch.Tensor
    """(4, 1, T) int64: row 0 restarts at 0 in each sample; rows 1 to 3 are M-RoPE (t, h, w)"""
    labels_T: torch.Tensor
    """(1, T) int64: shifted within each sample; -100 where nothing is learnt"""
    supervised_S: torch.Tensor
    """(S,) int64: places of the labels that are learnt; to look for them on the device would wait for it"""
    pictured_M: torch.Tensor
    """(M,) int64: places of the image tokens"""
    cu_seqlens: torch.Tensor
    """(B + 1,) int32: sample borders, on the CPU"""
    pixels_u8: torch.Tensor
    """(sum of 3*H*W,) uint8: pictures at their final size, channels first, end to end"""
    image_grid_thw: torch.Tensor
    """(I, 3) int64: patches, on the CPU"""
    image_sample: torch.Tensor
    """(I,) int64: which sample of the row a picture belongs to, on the CPU"""
    sample_seeds: torch.Tensor
    """(B,) int64: seed of each sample's augmentation, on the CPU"""
    moves: torch.Tensor
    """(B, 3, 3) float64: how each sample's pictures move, on fractions of a picture; identity: they stay. On the CPU"""
    sample_ids: tuple[int, ...]
    """(B) numbers in the index; empty for an empty row"""
    dataset_ids: tuple[int, ...]
    """(B) numbers of the data sets; empty for an empty row"""
    tower: TowerInputs | None = None
    """What the vision tower is told of the pictures, or of the blank in a row without; None: the forward finds out"""

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        # To another process, small tensors go as bytes: each shared tensor would hold a file descriptor while it lives.
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        small = {n: v.numpy() for n, v in state.items() if hasattr(v, "numpy") and n != "pixels_u8"}
        return (_received, ({**state, **small},))

    @property
    def supervised(self) -> int:
        """Tokens that are learnt."""
        return len(self.supervised_S)

    def sample_of_supervised(self) -> torch.Tensor:
        """(S,) int64: which sample of the row each learnt token belongs to, on the CPU."""
        import torch

        # Not by repeating over all tokens: PyTorch wakes all threads for that, while the device waits for the step.
        ends = self.cu_seqlens[1:].numpy()
        return torch.from_numpy(np.searchsorted(ends, self.supervised_S.cpu().numpy(), side="right"))

    @property
    def reaches_pictures(self) -> bool:
        """Whether a gradient gets to a picture: a learnt token of the same sample stands behind it."""
        ends = self.cu_seqlens[1:].numpy()
        learnt, pictured = self.supervised_S.cpu().numpy(), self.pictured_M.cpu().numpy()
        last = np.full(len(ends), -1)
        np.maximum.at(last, np.searchsorted(ends, learnt, side="right"), learnt)
        return bool((last[np.searchsorted(ends, pictured, side="right")] >= pictured).any())

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Row:
        """The row with the tensors of the forward on `device`."""
        return self._mapped(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Row:
        """The row in page-locked memory, which copies to a GPU asynchronously."""
        # The borders stay on the CPU for Python code, but are copied too.
        return replace(self._mapped(lambda x: x.pin_memory()), cu_seqlens=self.cu_seqlens.pin_memory())

    def _mapped(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Row:
        mapped: dict[str, Any] = {n: f(getattr(self, n)) for n in _ON_DEVICE}
        return replace(self, **mapped, tower=None if self.tower is None else self.tower.map(f))

    def same_as(self, other: Row) -> bool:
        """Equality of everything, for tests."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(a.equal(b) if hasattr(a, "equal") else a == b for a, b in pairs)


def _received(state: dict[str, Any]) -> Row:
    import torch

    values: dict[str, Any] = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in state.items()}
    return Row(**values)


def sample_seed(identity: int, seed: int, epoch: int) -> int:
    """Seed of a sample's augmentation, a signed 64-bit number: the same on every rank and in every row."""
    mixed = mix64_scalar(identity, seed, epoch)
    return mixed - (1 << 64) if mixed >= 1 << 63 else mixed


def collate(
    samples: Sequence[Sample],
    decoded: Sequence[Sequence[npt.NDArray[np.uint8]]],
    *,
    image_token_id: int,
    pad_token_id: int,
    seed: int = 0,
    epoch: int = 0,
    merge: int = 2,
    layout: Layout | None = None,
) -> Row:
    """One row of some samples; without any, an empty row.

    Args:
        decoded: for each sample its pictures, (3, H, W) uint8 at their final size.
        seed, epoch: of the run, for the augmentation's seeds.
        layout: of the vision tower whose inputs the row shall bring.
    """
    import torch

    if not samples:
        return empty_row(pad_token_id, layout)
    lengths = [len(s.input_ids) for s in samples]
    ids, labels = (np.concatenate([getattr(s, name) for s in samples]) for name in ("input_ids", "labels"))
    positions = [mrope(s.input_ids, image_token_id, s.grid_thw, merge) for s in samples]
    pixels = [picture.reshape(-1) for pictures in decoded for picture in pictures]
    owners = [n for n, s in enumerate(samples) for _ in range(len(s.grid_thw))]
    seeds = [sample_seed(s.identity, seed, epoch) for s in samples]
    grids = np.concatenate([s.grid_thw for s in samples])
    return Row(
        input_ids_T=torch.from_numpy(ids)[None],
        position_ids_4T=torch.from_numpy(np.concatenate(positions, axis=1))[:, None],
        labels_T=torch.from_numpy(labels)[None],
        supervised_S=torch.from_numpy(np.flatnonzero(labels != IGNORE)),
        pictured_M=torch.from_numpy(np.flatnonzero(ids == image_token_id)),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        pixels_u8=torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *pixels])),
        image_grid_thw=torch.from_numpy(grids),
        image_sample=torch.tensor(owners, dtype=torch.int64),
        sample_seeds=torch.tensor(seeds, dtype=torch.int64),
        moves=torch.from_numpy(np.stack([_STILL if s.moved.unit is None else s.moved.unit for s in samples])),
        sample_ids=tuple(s.index for s in samples),
        dataset_ids=tuple(s.dataset for s in samples),
        tower=None if layout is None else tower_inputs(grids, layout),
    )


def empty_row(pad_token_id: int, layout: Layout | None = None) -> Row:
    """A row for a rank that has nothing to do while others do: one pad token, nothing learnt, no picture."""
    import torch

    return Row(
        input_ids_T=torch.tensor([[pad_token_id]]),
        position_ids_4T=torch.zeros(4, 1, 1, dtype=torch.int64),
        labels_T=torch.tensor([[IGNORE]]),
        supervised_S=torch.zeros(0, dtype=torch.int64),
        pictured_M=torch.zeros(0, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        pixels_u8=torch.zeros(0, dtype=torch.uint8),
        image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        image_sample=torch.zeros(0, dtype=torch.int64),
        sample_seeds=torch.zeros(1, dtype=torch.int64),
        moves=torch.from_numpy(_STILL[None].copy()),
        sample_ids=(),
        dataset_ids=(),
        tower=None if layout is None else tower_inputs((), layout),
    )
