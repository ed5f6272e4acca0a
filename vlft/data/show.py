"""What people are shown of the data: a sample in words, pictures for a gallery, histograms. Nothing here trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlft.data.formats import Record, TextPart
from vlft.data.index import Index
from vlft.data.ledger import LedgerEntry
from vlft.data.loader import decode_sample
from vlft.data.sample import IGNORE, Fitted, Sample, build_sample
from vlft.data.tokens import Chat
from vlft.errors import RecordError

BINS = 24


@dataclass(frozen=True)
class Described:
    """A held-out sample as predictions show it."""

    id: str
    question: str
    """The user turn before the last learnt answer."""
    reference: str
    """The last learnt answer; empty where nothing of the sample is learnt."""
    images: tuple[str, ...]
    """Paths or addresses, as the record gives them."""
    sizes: tuple[tuple[int, int], ...]
    """(width, height) in pixels of each picture as the model sees it."""
    record: Any
    """The raw record."""


@dataclass(frozen=True)
class Shown:
    """A sample of the gallery."""

    dataset: str
    about: Described
    pictures: list[npt.NDArray[np.uint8]]
    """(3, H, W) each, as the model sees them."""


def describe(index: Index, fitted: Fitted, chat: Chat, i: int) -> Described:
    """Sample `i` in words.

    Raises:
        RecordError: the record no longer reads as it did when it was indexed.
    """
    images = tuple(str(s) if isinstance(s, str) else "(bytes)" for s in index.sources(i))
    sample = build_sample(index, fitted, chat, i)
    return Described(
        index.sample_id(i), _question(index.parsed(i)), _reference(sample, chat), images,
        tuple(sample.final_wh), index.record(i),
    )  # fmt: skip


def _question(record: Record) -> str:
    learnt = [n for n, turn in enumerate(record.turns) if turn.role == "assistant" and turn.loss]
    turns = [turn for turn in record.turns[: learnt[-1] if learnt else None] if turn.role == "user"]
    return "".join(part.text for part in turns[-1].parts if isinstance(part, TextPart)).strip() if turns else ""


def last_answer(labels_T: npt.NDArray[np.int64]) -> tuple[int, int]:
    """[start, end) of the last learnt run of tokens, (0, 0) without any; labels are shifted: label t is token t + 1."""
    learnt = np.flatnonzero(labels_T != IGNORE)
    if not len(learnt):
        return 0, 0
    breaks = np.flatnonzero(np.diff(learnt) > 1)
    start = learnt[breaks[-1] + 1] if len(breaks) else learnt[0]
    return int(start) + 1, int(learnt[-1]) + 2


def _reference(sample: Sample, chat: Chat) -> str:
    start, end = last_answer(sample.labels)
    return str(chat.tokenizer.decode(sample.input_ids[start:end], skip_special_tokens=True))


def gallery(
    index: Index, fitted: Fitted, chat: Chat, ids: npt.NDArray[np.int64], names: Sequence[str], count: int
) -> Iterator[Shown]:
    """The first `count` of `ids` of each data set that can be decoded; the others are told where they are used."""
    for n, name in enumerate(names):
        found = 0
        for i in ids[index.dataset[ids] == n].tolist():
            if found == count:
                break
            try:
                about = describe(index, fitted, chat, i)
                pictures = decode_sample(build_sample(index, fitted, chat, i))
            except RecordError:
                continue
            found += 1
            yield Shown(name, about, pictures)


def statistics(
    index: Index,
    fitted: Fitted,
    train: npt.NDArray[np.int64],
    held_out: npt.NDArray[np.int64],
    names: Sequence[str],
    ledger: Sequence[LedgerEntry],
) -> dict[str, Any]:
    """What data.json holds: counts, histograms of tokens and of picture sizes (megapixels as the model sees them)."""
    used = np.concatenate([train, held_out])
    owner = np.repeat(np.arange(len(index)), index.n_images)
    mine = np.isin(owner, used)
    megapixels = (fitted.final_width[mine] * fitted.final_height[mine]) / 1e6
    pictures = Counter(index.n_images[used].tolist())
    sides = {"train": index.dataset[train], "held_out": index.dataset[held_out]}
    return {
        "schema": 1,
        "datasets": {
            name: {side: int((owners == n).sum()) for side, owners in sides.items()} for n, name in enumerate(names)
        },
        "tokens": _histogram(fitted.length[used]),
        "pictures": _histogram(megapixels),
        "pictures_per_sample": {str(k): pictures[k] for k in sorted(pictures)},
        "unused": dict(Counter(entry.reason for entry in ledger)),
    }  # fmt: skip


def _histogram(values: npt.NDArray[Any]) -> dict[str, list[float]]:
    """Bins of tokens are whole numbers of them; equal values have one bin, which begins above 0."""
    if not len(values):
        return {"edges": [], "counts": []}
    low, high = values.min().item(), values.max().item()
    bins: Any = BINS
    if isinstance(low, int):
        width = -(-(high - low + 1) // BINS)
        bins = np.arange(low, high + width + 1, width)
    elif low == high:
        bins = [0.95 * low, 1.05 * low]
    counts, edges = np.histogram(values, bins=bins)
    return {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()}
