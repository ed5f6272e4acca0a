"""64-bit mixing: choices that depend on what they are about and on nothing else, the same under every version of
numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def mix64(values: npt.ArrayLike, *salts: int) -> npt.NDArray[np.uint64]:
    """An even 64-bit hash of each value under some salts.

    Args:
        values: integers, any shape; negative ones count modulo 2^64.
        salts: integers; their order matters.
    Source: SplitMix64's finaliser, Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators.
    """
    out: npt.NDArray[Any] = np.asarray(values).astype(np.uint64)
    with np.errstate(over="ignore"):  # wrapping is the point
        for salt in (*salts, 0):
            out = out + np.uint64((salt * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) % (1 << 64))
            out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            out = out ^ (out >> np.uint64(31))
    return out


def mix64_scalar(value: int, *salts: int) -> int:
    """`mix64` of one value."""
    return int(mix64(np.array(value % (1 << 64), np.uint64), *salts))
