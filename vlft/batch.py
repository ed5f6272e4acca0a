"""From a collated row to the arguments of the packed forward, on the device: move, augment, normalise, cut patches.

The one place where data (bytes), vision (pictures) and models (arguments) meet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from vlft.augmentation.policy import Policy
from vlft.data.collate import Row
from vlft.data.loader import Step
from vlft.grids import TowerInputs
from vlft.models.load import PictureFacts
from vlft.vision.augment import augment_row
from vlft.vision.patches import cut_patches, normalisation_table, split_pictures


class ToInputs:
    """Callable (row, training) -> keyword arguments of `PackedVLM.forward`.

    On a GPU in a stream of its own, beside what the device is at work on: Kornia brings each number that it draws to
    the device and waits for it, which would be to wait for all that the device was asked for before.
    """

    def __init__(self, pictures: PictureFacts, policy: Policy | None, device: torch.device) -> None:
        self.pictures, self.policy, self.device = pictures, policy, device
        self.table = normalisation_table(pictures.mean, pictures.std, pictures.rescale_factor).to(device)
        # Before what waits for a free place: a chain of many small kernels would otherwise wait before each of them.
        self._aside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, row: Row, training: bool) -> dict[str, Any]:
        if self._aside is None:
            return self._made(row, training)
        with torch.cuda.stream(self._aside):
            made = self._made(row, training)
        user = torch.cuda.current_stream(self.device)
        user.wait_stream(self._aside)
        for value in made.values():
            _used_in(user, value)
        return made

    def _made(self, row: Row, training: bool) -> dict[str, Any]:
        row = row.to(self.device)
        return {
            "input_ids_T": row.input_ids_T,
            "position_ids_4T": row.position_ids_4T,
            "labels_T": row.labels_T,
            "cu_seqlens": row.cu_seqlens.to(self.device, non_blocking=True),
            "max_seqlen": int(row.cu_seqlens.diff().max()),
            "pixel_values": self._patches(row, self.policy if training else None),
            "image_grid_thw": row.image_grid_thw.numpy(),
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


def _used_in(stream: torch.cuda.Stream, value: Any) -> None:
    """The memory of these tensors serves nothing else before the stream is done with them."""

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            x.record_stream(stream)
        return x

    if isinstance(value, torch.Tensor):
        note(value)
    elif isinstance(value, TowerInputs):
        value.map(note)


class Feed:
    """The steps of a run, in order; the next one can be fetched, and its first row moved, while the device is at work.

    Otherwise the device waits between two steps until the host has done so.
    """

    def __init__(self, steps: Iterator[Step], inputs: ToInputs) -> None:
        self._steps, self._inputs = steps, inputs
        self._next: Step | None = None
        self._failed: Exception | None = None
        self._ready: tuple[Row, dict[str, Any]] | None = None
        self._waited = 0.0

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """
        Raises:
            StopIteration: there is none.
            DataError: as the loader does, also where `look_ahead` met it.
        """
        if self._failed is not None:
            raise self._failed
        step = self._fetch() if self._next is None else self._next
        self._next = None
        return step

    def _fetch(self) -> Step:
        began, busy = time.monotonic(), _mark(self._inputs.device)
        try:
            return next(self._steps)
        finally:
            # Where the device is still at work on what it was asked for before, nobody has waited.
            if busy is None or busy.query():  # type: ignore[no-untyped-call]
                self._waited += time.monotonic() - began

    def look_ahead(self) -> None:
        """Fetch the step after the one that was taken last, and bring its first row to the device."""
        try:
            self._next = self._fetch()
        except StopIteration:
            return
        except Exception as error:
            # It belongs to the next step: this one must be written down, and saved where that is due, before.
            self._failed = error
            return
        row = self._next.rows[0]
        try:
            self._ready = row, self._inputs(row, True)
        except Exception:
            self._ready = None  # it is made again in its own step: with more memory, or it fails there

    def inputs(self, row: Row) -> dict[str, Any]:
        """Of a row of the step that was taken last; once."""
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] is row else self._inputs(row, True)

    def waited(self) -> float:
        """Seconds in which steps were waited for since this was asked."""
        found, self._waited = self._waited, 0.0
        return found


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Behind all that a GPU has been asked for."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
