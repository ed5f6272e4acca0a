"""The whole data side of a run behind one object: registry, index, fit, split, plan, loaders, ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from vlft.data.budget import Budget
from vlft.data.formats import Record, TextPart
from vlft.data.index import Index, open_index
from vlft.data.index import summary as index_summary
from vlft.data.ledger import LedgerEntry, check_bad_fraction
from vlft.data.loader import Step, eval_steps, step_loader, surviving
from vlft.data.plan import Plan
from vlft.data.registry import read_registry
from vlft.data.sample import Fitted, Limits, fit, split
from vlft.data.tokens import Chat
from vlft.errors import ConfigError, DataError
from vlft.family import Family


@dataclass(frozen=True)
class DataOptions:
    """What the data side needs of a run's options; units as in vlft.config."""

    registry: Path
    names: Sequence[str] | None
    folder: Path
    """The checkpoint's folder: tokenizer and chat template."""
    family: Family
    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    max_seq_length: int
    on_too_long: Literal["shrink", "drop", "error"]
    train_split_ratio: float
    max_bad_fraction: float
    allow_remote_images: bool
    cache_dir: Path
    seed: int
    global_batch: int
    train_batch_size: int
    """Samples of one forward on one rank."""
    eval_batch_size: int
    rows_per_rank: int
    """Forwards of one optimizer step on one rank."""
    rank: int
    world_size: int
    num_workers: int
    pin_memory: bool
    progress: bool


@dataclass
class Described:
    """A held-out sample as predictions show it."""

    id: str
    question: str
    images: tuple[str, ...]
    record: Any


class Data:
    """What the loop asks of the data."""

    def __init__(
        self,
        options: DataOptions,
        index: Index,
        fitted: Fitted,
        chat: Chat,
        plan: Plan,
        held_out: npt.NDArray[np.int64],
    ) -> None:
        self.options, self.index, self.fitted, self.chat, self.plan = options, index, fitted, chat, plan
        self._held_out = held_out
        self._names = [spec.name for spec in index.specs]
        self._bad: dict[tuple[str, str], LedgerEntry] = {}

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def ledger(self) -> list[LedgerEntry]:
        """What was left out before the first step."""
        return [*self.index.ledger, *self.fitted.ledger]

    @property
    def eval_datasets(self) -> list[str]:
        """Data sets that have held-out samples."""
        return [self._names[n] for n in np.unique(self.index.dataset[self._held_out])]

    @property
    def summary(self) -> list[str]:
        """Lines for the start of a run."""
        shrunk = f", pictures of {self.fitted.shrunk} made smaller to fit" if self.fitted.shrunk else ""
        long = sum(not e.counts_as_bad for e in self.fitted.ledger)
        left = f", {long} too long (ledger)" if long else ""
        total = f"{self.plan.samples_per_epoch} samples an epoch, {len(self._held_out)} held out{shrunk}{left}"
        return [*(f"data: {line}" for line in index_summary(self.index)), f"data: {total}"]

    def steps(self, start: int, total: int, costs: tuple[float, float], budget: Budget) -> Iterator[Step]:
        """Training steps of this rank, from step number `start` (0-based) up to `total`.

        Args:
            costs: of one LLM token and of one ViT patch, in any unit.
            budget: what rows may hold beside the options' own limit.
        """
        o = self.options
        limit = Budget(tokens=o.train_batch_size * o.max_seq_length).meet(budget)
        return surviving(
            lambda first: step_loader(
                self.index, self.fitted, self.plan, self.chat, rank=o.rank, world_size=o.world_size, seed=o.seed,
                start_step=first, total_steps=total, rows_per_rank=o.rows_per_rank, token_budget=limit.tokens,
                patch_budget=limit.patches, without=limit.without, costs=costs, num_workers=o.num_workers,
                pin_memory=o.pin_memory,
            ),
            start,
        )  # fmt: skip

    def eval_steps(self, datasets: Sequence[str]) -> Iterator[Step]:
        """Held-out rows of this rank; over all ranks each sample once, and the same number of rows everywhere."""
        o = self.options
        wanted = [n for n, name in enumerate(self._names) if name in datasets]
        ids = self._held_out[np.isin(self.index.dataset[self._held_out], wanted)]
        return surviving(
            lambda first: eval_steps(
                self.index, self.fitted, self.chat, ids, rank=o.rank, world_size=o.world_size,
                batch_size=o.eval_batch_size, start_step=first, num_workers=min(o.num_workers, 2),
                pin_memory=o.pin_memory,
            )
        )  # fmt: skip

    def unfit(self, i: int, step: int) -> LedgerEntry:
        """The ledger's line about sample `i`, which does not fit into the device's memory even alone in a row."""
        size = f"{self.fitted.length[i]} tokens and {self.fitted.patches[i]} patches"
        text = f"{self.index.place(i)}: {size} do not fit into the device's memory, even alone in a row"
        return LedgerEntry(self.dataset_of(i), self.index.sample_id(i), "out_of_memory", text, step)

    def not_finite(self, i: int, why: str, step: int) -> LedgerEntry:
        """The ledger's line about sample `i` of a step that was skipped."""
        text = f"{self.index.place(i)}: {why}; step {step} was skipped"
        return LedgerEntry(self.dataset_of(i), self.index.sample_id(i), "not_finite", text, step)

    def counts(self, step: Step) -> list[float]:
        """Of this rank's part of a step: supervised tokens, samples, tokens, pictures, samples that failed."""
        real = [row for row in step.rows if row.sample_ids]
        tokens = sum(row.input_ids_T.shape[1] for row in real)
        pictures = sum(len(row.image_grid_thw) for row in real)
        return [float(n) for n in (step.supervised_tokens, step.samples, tokens, pictures, len(step.failures))]

    def account(self, failures: Sequence[LedgerEntry]) -> list[LedgerEntry]:
        """Remember samples that failed to decode, on any rank; returns those not seen before.

        Raises:
            DataError: with those before the run, more than `max_bad_fraction` of the data.
        """
        # Not by id: several records may share one. The message names the place, which no two share.
        new = [e for e in failures if (e.dataset, e.message) not in self._bad]
        self._bad |= {(e.dataset, e.message): e for e in new}
        check_bad_fraction([*self.ledger, *self._bad.values()], self.index.total, self.options.max_bad_fraction)
        return new

    @cached_property
    def fingerprint(self) -> str:
        """Of what membership depends on: which samples train, with their content, and what became of their size."""
        ids = self.plan.ids
        digest = xxhash.xxh3_128()
        for array in (self.index.identity, self.index.split_hash, self.fitted.length, self.fitted.patches):
            digest.update(np.ascontiguousarray(array[ids]).tobytes())
        return digest.hexdigest()

    @property
    def bad(self) -> list[dict[str, Any]]:
        """What `account` remembers, for a checkpoint."""
        return [entry.json() for entry in self._bad.values()]

    def restore(self, bad: Sequence[dict[str, Any]]) -> None:
        self._bad = {(e["dataset"], e["message"]): LedgerEntry(**e) for e in bad}

    def dataset_of(self, sample: int) -> str:
        return self._names[int(self.index.dataset[sample])]

    def describe(self, sample: int) -> Described:
        record = self.index.parsed(sample)
        images = tuple(str(s) if isinstance(s, str) else "(bytes)" for s in self.index.sources(sample))
        return Described(self.index.sample_id(sample), _question(record), images, self.index.record(sample))


def _question(record: Record) -> str:
    """Text of the last user turn."""
    turns = [turn for turn in record.turns if turn.role == "user"]
    return "".join(part.text for part in turns[-1].parts if isinstance(part, TextPart)).strip() if turns else ""


def prepare_data(options: DataOptions) -> Data:
    """Read the registry, index (or find in the cache), fit, split and plan.

    Raises:
        ConfigError: the registry is wrong; all its problems.
        DataError: a file cannot be read, too much of it cannot be used, or nothing is left to train on.
    """
    o = options
    specs = read_registry(o.registry, o.names)
    if small := [s for s in specs if s.max_pixels is not None and s.max_pixels < o.min_pixels]:
        raise ConfigError(
            [
                f"{o.registry}: data set '{s.name}', key 'max_pixels': {s.max_pixels} is below the {o.min_pixels} "
                "pixels of the smallest picture; raise it or give --min_pixels."
                for s in small
            ]
        )
    chat = Chat.load(o.folder, o.family)
    index = open_index(
        specs, chat, cache_dir=o.cache_dir, workers=max(1, o.num_workers), allow_remote=o.allow_remote_images,
        progress=o.progress,
    )  # fmt: skip
    check_bad_fraction(index.ledger, index.total, o.max_bad_fraction)
    factor = o.patch_size * o.merge_size
    limits = Limits(o.min_pixels, o.max_pixels, o.max_seq_length, o.on_too_long, factor, o.merge_size)
    fitted = fit(index, limits)
    train, held_out = split(index, specs, o.train_split_ratio, usable=fitted.usable)
    if not len(train):
        raise DataError(
            f"no sample is left to train on: of {index.total} records {len(index.ledger)} cannot be used, "
            f"{len(fitted.ledger)} are longer than --max_seq_length {o.max_seq_length}, {len(held_out)} are held out; "
            "add records, or raise --max_seq_length or --train_split_ratio."
        )
    plan = Plan(train, index.dataset[train], [s.weight for s in specs], seed=o.seed, global_batch=o.global_batch)
    return Data(o, index, fitted, chat, plan, held_out)
