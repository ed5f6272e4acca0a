"""The samples that are looked into, before anything is said of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlft.doctor import contents
from vlft.doctor.contents import Chosen, Seen
from vlft.doctor.records import Ints, Records


@dataclass(frozen=True)
class Sampled:
    data: Records
    chosen: Chosen
    seen: list[Seen]
    keys: npt.NDArray[np.uint64]
    """Every picture of the chosen samples (see `contents.picture_keys`)."""
    owners: Ints
    places: Ints


def look(data: Records, limit: int | None) -> Sampled:
    """Decode and read up to `limit` samples."""
    chosen = contents.choose(data.index, data.train, data.held_out, limit)
    keys, owners, places = contents.picture_keys(data.index, chosen.ids)
    todo = contents.tasks(chosen.ids, keys, owners, places)
    seen = contents.see_all(
        data.index, data.fitted, data.chat.family.box_convention, todo,
        workers=contents.workers(data.options.num_workers), progress=data.options.progress,
    )  # fmt: skip
    return Sampled(data, chosen, list(seen), keys, owners, places)
