"""Perceptual hashes, and which of many pictures are nearly the same, in bounded memory and time.

The hash is that of PDQ (Facebook 2019, "The TMK+PDQF video-hashing algorithm and the PDQ image-hashing algorithm"): a
64 x 64 grey picture, its 16 x 16 lowest frequencies but the mean, a bit for each above their median. The library
imagehash has the same idea in 64 bits (phash), at which two invoices of one template are one picture; it also brings
SciPy and PyWavelets along, for these ten lines. PDQ takes up to 31 of 256 bits for the same picture.

Equal hashes are not enough where pictures are documents: candidates are compared again by what they look like.

Legend: N pictures, U different hashes, H and W pixels.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

U64: TypeAlias = npt.NDArray[np.uint64]
Ints: TypeAlias = npt.NDArray[np.int64]

SIDE = 64
"""Pixels of the picture that is hashed."""
DISTANCE = 31
"""Bits in which the hashes of the same picture may differ."""
DETAIL = 256
"""Pixels of the pictures that are compared in the second look, where both have as many."""
_LEAST_DETAIL = 64
_BANDS = 16
"""Of 16 bits each. Pairs of up to 15 bits always share one; of 31 bits, all but about one in twenty do."""
_NEIGHBOURS = 64
"""How many of those that share a band each hash is compared with."""
_LOW = 16
_FLATTEST = 2.0
"""Standard deviation of grey values below which a picture has nothing to compare."""
_MOST_APART, _MEAN_APART = 24.0, 8.0
"""Grey values (of 255) by which 4 x 4 pixels of `DETAIL`, and colours on average, may differ in the same picture."""


def _dct_rows() -> npt.NDArray[np.float64]:
    """(16, 64) rows 1 to 16 of the orthonormal DCT-II."""
    k, n = np.arange(1, _LOW + 1)[:, None], np.arange(SIDE)[None, :]
    rows: npt.NDArray[np.float64] = np.sqrt(2 / SIDE) * np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))
    return rows


_DCT = _dct_rows()
_SHUFFLED = np.random.default_rng(20261124).permutation(_LOW * _LOW)
"""Each band gets bits of all frequencies: the lowest alone are the same in all white pages."""


def grey(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """(3, H, W) uint8 -> (H, W) luminance, 0 to 255."""
    return np.tensordot(np.array([0.299, 0.587, 0.114]), rgb.astype(np.float64), axes=1)


def signature(rgb: npt.NDArray[np.uint8]) -> U64 | None:
    """(3, 64, 64) uint8 -> (4,) the hash's 256 bits; None for a picture without anything in it."""
    light = grey(rgb)
    if light.std() < _FLATTEST:
        return None
    low = (_DCT @ light @ _DCT.T).ravel()[_SHUFFLED]
    return np.packbits(low > np.median(low)).view(np.uint64)


def distance(a: U64, b: U64) -> npt.NDArray[np.int64]:
    """(..., 4), (..., 4) -> (...,) bits that differ."""
    bits: npt.NDArray[np.int64] = np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int64)
    return bits


def near_pairs(hashes: U64, *, most: int = DISTANCE) -> tuple[Ints, int]:
    """Pairs of hashes that differ in at most `most` bits.

    Each of 16 bands sorts the hashes by 16 of their bits, then by the rest, and compares each with the next 64 that
    share these bits: 16 sorts and at most 1024 U comparisons, whatever the pictures are, in about 150 U bytes. A
    million different ones take 37 s on one core.

    Args:
        hashes: (U, 4) all different.
    Returns:
        (P, 2) positions, first < second, each pair once; and how many hashes had more neighbours than they were
        compared with in some band, so that pairs may be missing.
    """
    bands = hashes.view(np.uint16).reshape(len(hashes), _BANDS)
    found: list[Ints] = []
    crowded = np.zeros(len(hashes), np.bool_)
    for band in range(_BANDS):
        order = np.lexsort((hashes[:, 3], hashes[:, 2], hashes[:, 1], hashes[:, 0], bands[:, band]))
        key = bands[order, band]
        left = np.arange(len(order))
        for step in range(1, _NEIGHBOURS + 2):
            left = left[left + step < len(order)]
            left = left[key[left] == key[left + step]]
            if not len(left):
                break
            if step > _NEIGHBOURS:
                crowded[order[left]] = True
                break
            a, b = order[left], order[left + step]
            near = distance(hashes[a], hashes[b]) <= most
            found.append(np.sort(np.stack([a[near], b[near]], axis=1), axis=1))
    if not found:
        return np.zeros((0, 2), np.int64), 0
    return np.unique(np.concatenate(found), axis=0), int(crowded.sum())


def detail(*sizes: tuple[int, int]) -> int:
    """Side for the second look at pictures of these (width, height): what the smallest has, a multiple of 4.

    At more, a copy of fewer pixels would be blurred beside its original, and count as another picture.
    """
    return min(max(min(side for size in sizes for side in size) // 4 * 4, _LEAST_DETAIL), DETAIL)


def look_the_same(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> bool:
    """The second look at two pictures, both (3, S, S) with S from `detail`: is one a copy of the other?

    Another size or JPEG quality passes; other digits on the same form do not.
    """
    blocks = a.shape[1] // 4
    light = np.abs(grey(a) - grey(b)).reshape(blocks, 4, blocks, 4).mean(axis=(1, 3))
    # JPEG keeps colours at half the size, so that they differ at borders: on average alone.
    colours = np.abs(a.astype(np.float64) - b.astype(np.float64)).mean()
    return bool(light.max() <= _MOST_APART and colours <= _MEAN_APART)
