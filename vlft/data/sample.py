"""From the index to samples: final picture sizes and lengths of everything at once, the split, and one sample's arrays.

Legend: N samples, I images, T tokens (each picture's token repeated as often as the model sees it), P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vlft.data.images import Source, smart_resize_batch
from vlft.data.index import BOXED, HAS_BOXES, LEARNT, Index
from vlft.data.ledger import LedgerEntry, check_bad_fraction
from vlft.data.mixing import mix64
from vlft.data.moved import Moved, Mover, move, spare_tokens
from vlft.data.registry import DatasetSpec
from vlft.data.tokens import Chat, PictureSize
from vlft.errors import DataError, RecordError
from vlft.grids import Layout

__all__ = [
    "BY_TOKENS", "Costs", "Fitted", "LedgerEntry", "Limits", "Mover", "Sample", "build_sample", "check_bad_fraction",
    "fit", "room_to_move", "split",
]  # fmt: skip

Ints: TypeAlias = npt.NDArray[np.int64]
_SPLIT_SALT, _SUBSET_SALT = 0x5B117, 0x5AB5E7
_AT_ONCE = 65_536
"""Samples."""
IGNORE = -100
"""Label of a token that is not learnt."""


@dataclass(frozen=True)
class Limits:
    min_pixels: int
    """Pixels of a resized picture."""
    max_pixels: int
    """Pixels of a resized picture; a data set may have its own."""
    max_seq_length: int
    """Tokens of a sample."""
    on_too_long: Literal["shrink", "drop", "error"]
    factor: int
    """Pixels that both final sides are multiples of: patch size x merge size."""
    merge: int = 2
    """Patches per token along one side."""
    layout: Layout | None = None
    """Of the vision tower, for which rows shall bring their `TowerInputs`; None: they bring none."""


@dataclass(frozen=True)
class Costs:
    """What ranks are balanced by, in any one unit: what a sample takes of a device."""

    token: float = 1.0
    """of the language model"""
    learnt: float = 0.0
    """of a token that is learnt, beside it: the head"""
    token_pair: float = 0.0
    """of a token and one that it attends to"""
    patch: float = 0.0
    """of the vision tower"""
    patch_pair: float = 0.0
    """of two patches of one picture"""

    def of(self, length: Ints, learnt: Ints, patches: Ints, patch_pairs: Ints) -> npt.NDArray[np.float64]:
        """Of samples, whose sizes are as in `Fitted`."""
        text = length * self.token + length * (length + 1) // 2 * self.token_pair + learnt * self.learnt
        found: npt.NDArray[np.float64] = text + patches * self.patch + patch_pairs * self.patch_pair
        return found


BY_TOKENS = Costs()


@dataclass(frozen=True)
class Fitted:
    """The size of every sample under some limits."""

    limits: Limits
    final_width: Ints
    """(I,) pixels"""
    final_height: Ints
    """(I,) pixels"""
    length: Ints
    """(N,) tokens"""
    learnt: Ints
    """(N,) tokens that are learnt"""
    patches: Ints
    """(N,) patches of all its pictures"""
    patch_pairs: Ints
    """(N,) sum over its pictures of patches^2"""
    usable: npt.NDArray[np.bool_]
    """(N,) False: too long"""
    shrunk: int
    """Samples whose pictures were made smaller to fit."""
    ledger: list[LedgerEntry]

    def sizes(self, index: Index, i: int) -> list[tuple[int, int]]:
        """Final (width, height) of the pictures of sample `i`."""
        span = slice(int(index.image_starts[i]), int(index.image_starts[i + 1]))
        return list(zip(self.final_width[span].tolist(), self.final_height[span].tolist(), strict=True))

    def cost(self, ids: Ints, costs: Costs) -> npt.NDArray[np.float64]:
        """Of each of these samples."""
        return costs.of(self.length[ids], self.learnt[ids], self.patches[ids], self.patch_pairs[ids])


# ------------------------------------------------------------------ fitting


def room_to_move(index: Index, chat: Chat) -> Ints:
    """(N,) tokens by which the coordinates of each sample may grow when its pictures move; 0 for one without any.

    Lengths that hold this room stay upper bounds, so that a plan is the same whatever an epoch's movements are.
    """
    digits = [chat.token_id(digit) for digit in "0123456789"]
    room = np.zeros(len(index), np.int64)
    for shard, first in zip(index.shards, index.starts.tolist(), strict=False):
        placed = (shard.flags & HAS_BOXES) != 0
        for at in range(0, len(shard), _AT_ONCE):  # the tokens of millions of samples are mapped, not read at once
            here = slice(at, min(at + _AT_ONCE, len(shard)))
            if placed[here].any():
                tokens = shard.tokens[int(shard.token_starts[here.start]) : int(shard.token_starts[here.stop])]
                spare = spare_tokens(np.asarray(tokens) & ~LEARNT, shard.n_tokens[here], digits)
                room[first + here.start : first + here.stop] = spare * placed[here]
    return room


def fit(index: Index, limits: Limits, room: Ints | None = None) -> Fitted:
    """Final size of every picture and length of every sample, and what does not fit.

    Args:
        room: (N,) tokens to count in addition, from `room_to_move`.
    Raises:
        DataError: `on_too_long` is "error" and a sample is too long; it is named.
    """
    high_N = _max_pixels(index, limits)
    high_I = np.repeat(high_N, index.n_images)
    height_I, width_I = smart_resize_batch(index.height, index.width, limits.factor, limits.min_pixels, high_I)
    text_N = index.n_tokens.astype(np.int64) - index.n_images + (0 if room is None else room)
    length_N = text_N + _image_tokens(index, height_I, width_I, limits.factor)
    long_ids = np.flatnonzero(length_N > limits.max_seq_length)
    usable_N = np.ones(len(index), np.bool_)
    ledger: list[LedgerEntry] = []
    shrunk = 0
    if len(long_ids) and limits.on_too_long == "error":
        raise DataError(
            _too_long(index, int(long_ids[0]), length_N, limits)
            + " (--on_too_long error); raise it or shorten the record."
        )
    if len(long_ids):
        fits = np.zeros(len(long_ids), np.bool_)
        if limits.on_too_long == "shrink":
            fits = _shrink(index, limits, long_ids, text_N, high_N, height_I, width_I)
        length_N = text_N + _image_tokens(index, height_I, width_I, limits.factor)
        usable_N[long_ids[~fits]] = False
        shrunk = int(fits.sum())
        ledger = [_entry(index, int(i), length_N, limits) for i in long_ids[~fits]]
    patches_N = (length_N - text_N) * limits.merge**2
    squares_I = (height_I * width_I // (limits.factor // limits.merge) ** 2) ** 2
    pairs_N = _by_sample(index, squares_I)
    learnt_N = index.n_learnt.astype(np.int64)
    return Fitted(limits, width_I, height_I, length_N, learnt_N, patches_N, pairs_N, usable_N, shrunk, ledger)


def _max_pixels(index: Index, limits: Limits) -> Ints:
    """(N,) cap of each sample's data set."""
    caps = [spec.max_pixels or limits.max_pixels for spec in index.specs]
    caps_N: Ints = np.array(caps, np.int64)[index.dataset]
    return caps_N


def _image_tokens(index: Index, height_I: Ints, width_I: Ints, factor: int) -> Ints:
    """(N,) tokens of all pictures of each sample."""
    return _by_sample(index, (height_I // factor) * (width_I // factor))


def _by_sample(index: Index, values_I: Ints) -> Ints:
    """(N,) sums over the pictures of each sample."""
    sums: Ints = np.concatenate([np.zeros(1, np.int64), np.cumsum(values_I)])
    sums_N: Ints = sums[index.image_starts[1:]] - sums[index.image_starts[:-1]]
    return sums_N


def _images_of(index: Index, ids: Ints) -> tuple[Ints, Ints]:
    """The pictures of some samples: (position in the image arrays, position in `ids`)."""
    counts = index.n_images[ids].astype(np.int64)
    owner = np.repeat(np.arange(len(ids)), counts)
    before = np.cumsum(counts) - counts
    return index.image_starts[ids][owner] + np.arange(len(owner)) - before[owner], owner


def _shrink(
    index: Index, limits: Limits, ids: Ints, text_N: Ints, high_N: Ints, height_I: Ints, width_I: Ints
) -> npt.NDArray[np.bool_]:
    """Lower the pixel cap of each too long sample to the largest that fits; writes the new sizes of those that do.

    All are bisected at once, so the result depends on the sample alone. Pictures below the cap keep their size.

    Returns:
        (len(ids),) whether the sample fits now. No picture is made smaller than `min_pixels` (or than it was).
    """
    where, owner = _images_of(index, ids)
    h, w = index.height[where], index.width[where]
    room = limits.max_seq_length - text_N[ids]
    high = high_N[ids]
    low = np.minimum(limits.min_pixels, high)

    def sized(cap: Ints) -> tuple[Ints, Ints, Ints]:
        new_h, new_w = smart_resize_batch(h, w, limits.factor, limits.min_pixels, cap[owner])
        tokens = (new_h // limits.factor) * (new_w // limits.factor)
        return new_h, new_w, np.bincount(owner, tokens, minlength=len(ids)).astype(np.int64)

    while (high - low > 1).any():  # `low` is tried at the end, whether it fits or not
        middle = (low + high) // 2
        fits = sized(middle)[2] <= room
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    new_h, new_w, tokens = sized(low)
    floor = np.minimum(limits.min_pixels, height_I[where] * width_I[where])
    too_small = np.bincount(owner, new_h * new_w < floor, minlength=len(ids)) > 0
    fits = (tokens <= room) & ~too_small & (index.n_images[ids] > 0)
    kept = fits[owner]
    height_I[where[kept]], width_I[where[kept]] = new_h[kept], new_w[kept]
    return fits


def _too_long(index: Index, i: int, length_N: Ints, limits: Limits) -> str:
    pictures = int(index.n_images[i])
    return (
        f"{index.place(i)}: {int(length_N[i])} tokens with {pictures} pictures, "
        f"more than --max_seq_length {limits.max_seq_length}"
    )


def _entry(index: Index, i: int, length_N: Ints, limits: Limits) -> LedgerEntry:
    tried = limits.on_too_long == "shrink" and index.n_images[i]
    even = ", and pictures of --min_pixels would still be too many tokens" if tried else ""
    shard, _ = index.locate(i)
    return LedgerEntry(
        shard.spec.name,
        index.sample_id(i),
        "too_long",
        f"{_too_long(index, i, length_N, limits)}{even}; raise it or shorten the record.",
    )


# ------------------------------------------------------------------ split


def split(
    index: Index,
    specs: Sequence[DatasetSpec],
    ratio: float,
    *,
    usable: npt.NDArray[np.bool_] | None = None,
) -> tuple[Ints, Ints]:
    """(train ids, eval ids), both ascending.

    A sample's side depends on its pictures (or its text) alone, so it stays there whatever is added later, and several
    questions about one picture stay together.

    Args:
        specs: those of `index`; `split` forces a side, `max_samples` takes the samples with the smallest hashes.
        ratio: part that trains, 0 to 1.
        usable: (N,) samples that may be taken, as `Fitted.usable`; default all.
    """
    taken = np.ones(len(index), np.bool_) if usable is None else usable.copy()
    train = (mix64(index.split_hash, _SPLIT_SALT) >> np.uint64(11)) * 2.0**-53 < ratio
    for n, spec in enumerate(specs):
        span = slice(int(index.starts[n]), int(index.starts[n + 1]))
        if spec.split is not None:
            train[span] = spec.split == "train"
        if spec.max_samples is not None:
            mine = np.flatnonzero(taken[span])
            hashes = mix64(index.split_hash[span][mine], _SUBSET_SALT)
            order = np.lexsort((mix64(index.identity[span][mine], _SUBSET_SALT), hashes))
            taken[span][mine[order[spec.max_samples :]]] = False
    return np.flatnonzero(taken & train), np.flatnonzero(taken & ~train)


# ------------------------------------------------------------------ one sample


@dataclass(frozen=True)
class Sample:
    index: int
    """Its number in the index."""
    dataset: int
    input_ids: Ints
    """(T,) the picture token repeated as often as the model sees it"""
    labels: Ints
    """(T,) the token that follows, where it is learnt; -100 elsewhere and at the end"""
    sources: list[Source]
    """(I) checked paths, or encoded files"""
    stored_wh: list[tuple[int, int]]
    """(I) pixels as the index knows them"""
    final_wh: list[tuple[int, int]]
    """(I) pixels"""
    grid_thw: Ints
    """(I, 3) patches"""
    identity: int
    """64 bits: (data set, row)"""
    moved: Moved
    """How its pictures move; the coordinates in `input_ids` and `labels` are those after it."""


def build_sample(index: Index, fitted: Fitted, chat: Chat, i: int, mover: Mover | None = None) -> Sample:
    """The arrays of sample `i`; no picture is decoded.

    Args:
        mover: where its pictures may move.
    Raises:
        RecordError: the record no longer reads as it did when it was indexed.
    """
    limits = fitted.limits
    stored, final = index.sizes(i), fitted.sizes(index, i)
    both = [PictureSize(*old, *new) for old, new in zip(stored, final, strict=True)]
    moved = _move(index, fitted, chat, i, both, mover) if mover is not None and final else Moved(None)
    if moved.encoded is not None or index.flags[i] & BOXED:
        encoded = moved.encoded or chat.encode(index.parsed(i), both)
        ids, learnt = encoded.input_ids, encoded.supervised
    else:
        ids, learnt = index.tokens(i)
    patch = limits.factor // limits.merge
    grid = np.array([(1, h // patch, w // patch) for w, h in final], np.int64).reshape(-1, 3)
    repeats = np.ones(len(ids), np.int64)
    is_image = ids == chat.image_token_id
    if int(is_image.sum()) != len(final):
        raise RecordError("record_changed", f"the text has {int(is_image.sum())} pictures, the index {len(final)}.")
    repeats[is_image] = grid[:, 1] * grid[:, 2] // limits.merge**2
    long_ids = np.repeat(ids.astype(np.int64), repeats)
    long_learnt = np.repeat(learnt, repeats)
    labels = np.full(len(long_ids), IGNORE, np.int64)
    labels[:-1] = np.where(long_learnt[1:], long_ids[1:], IGNORE)
    return Sample(
        index=i,
        dataset=int(index.dataset[i]),
        input_ids=long_ids,
        labels=labels,
        sources=index.sources(i),
        stored_wh=stored,
        final_wh=final,
        grid_thw=grid,
        identity=int(index.identity[i]),
        moved=moved,
    )


def _move(index: Index, fitted: Fitted, chat: Chat, i: int, sizes: Sequence[PictureSize], mover: Mover) -> Moved:
    return move(
        index.parsed(i), mover, chat, sizes, identity=int(index.identity[i]),
        bare_boxes=index.specs[int(index.dataset[i])].box_format == "model",
        most_tokens=int(fitted.length[i]) - sum((w // fitted.limits.factor) * (h // fitted.limits.factor) - 1
                                                for w, h in fitted.sizes(index, i)),
    )  # fmt: skip
