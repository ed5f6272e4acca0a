"""Position ids of one sample: text counts up, a picture spans a (t, h, w) grid. Plain numpy, for the workers.

Legend: T tokens (expanded), I images.
Source: M-RoPE, Wang et al. 2024, Qwen2-VL (arXiv 2409.12191); equal to `get_rope_index` of the three Hugging Face
models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def mrope(
    input_ids_T: npt.NDArray[np.integer[Any]],
    image_token_id: int,
    grids: npt.NDArray[np.integer[Any]],
    merge: int = 2,
) -> npt.NDArray[np.int64]:
    """Positions of one sample.

    Args:
        input_ids_T: (T,) with the image token repeated t*h*w / merge^2 times for each picture.
        image_token_id: id of that token.
        grids: (I, 3) the patch grid (t, h, w) of each picture, in order.
        merge: patches per token along one side.
    Returns:
        (4, T) int64: row 0 counts 0..T-1 (for masks and packing), rows 1 to 3 are the M-RoPE (t, h, w).
    Raises:
        ValueError: the image tokens do not fit the grids.
    """
    n = len(input_ids_T)
    out = np.empty((4, n), np.int64)
    out[0] = np.arange(n)
    is_image = np.asarray(input_ids_T) == image_token_id
    at, position = 0, 0
    for t, h, w in np.asarray(grids, np.int64).reshape(-1, 3).tolist():
        gh, gw = h // merge, w // merge
        count = t * gh * gw
        rest = is_image[at:]
        start = at + int(rest.argmax()) if rest.any() else n
        if not is_image[start : start + count].sum() == count or start + count > n:
            raise ValueError(f"the grid ({t}, {h}, {w}) needs {count} image tokens at {start}; the sequence has fewer.")
        out[1:, at:start] = np.arange(position, position + start - at)
        position += start - at
        grid = np.indices((t, gh, gw)).reshape(3, -1)
        out[1:, start : start + count] = grid + position
        position += max(gh, gw)
        at = start + count
    if is_image[at:].any():
        raise ValueError("there are more image tokens than the grids account for.")
    out[1:, at:] = np.arange(position, position + n - at)
    return out
