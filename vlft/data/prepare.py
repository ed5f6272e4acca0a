"""The whole data side of a run behind one object: registry, index, fit, split, plan, loaders, ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from vlft.augmentation.policy import Policy
from vlft.data import show
from vlft.data.budget import Budget
from vlft.data.collate import Row
from vlft.data.index import Index, open_index
from vlft.data.index import summary as index_summary
from vlft.data.largest import Planned, largest_rows
from vlft.data.ledger import LedgerEntry, check_bad_fraction
from vlft.data.loader import Step, eval_steps, lone_row, step_loader, surviving
from vlft.data.mixing import mix64
from vlft.data.plan import Plan, place
from vlft.data.registry import DatasetSpec, read_registry
from vlft.data.sample import Costs, Fitted, Limits, fit, room_to_move, split
from vlft.data.show import Described, Shown
from vlft.data.tokens import Chat
from vlft.errors import ConfigError, DataError, RecordError
from vlft.family import Family
from vlft.grids import Layout
from vlft.words import counted

_LIMIT_SALT = 0x11417


@dataclass(frozen=True)
class DataOptions:
    """What the data side needs of a run's options; units as in vlft.config."""

    registry: Path
    names: Sequence[str] | None
    folder: Path
    """The checkpoint's folder: tokenizer and chat template."""
    family: Family
    layout: Layout
    """Of the vision tower."""
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
    policy: Policy | None = None
    """Of augmentation, for training samples; None: they stay as they are."""
    eval_limit: int | None = None
    """Held-out samples of a data set that are answered."""
    use: Literal["train", "held_out", "all"] = "train"
    """Training with evaluations, or an evaluation alone: of what is held out, or of everything."""


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
        self.names = [spec.name for spec in index.specs]
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
        return [self.names[n] for n in np.unique(self.index.dataset[self._held_out])]

    @property
    def summary(self) -> list[str]:
        """Lines for the start of a run."""
        ids = self.plan.ids
        shrunk = f", pictures of {self.fitted.shrunk} made smaller to fit" if self.fitted.shrunk else ""
        long = sum(not e.counts_as_bad for e in self.fitted.ledger)
        left = f", {long} too long (ledger)" if long else ""
        samples = counted(self.plan.samples_per_epoch, "sample")
        total = f"{samples} an epoch, {len(self._held_out)} held out{shrunk}{left}"
        tokens, patches = _spread(self.fitted.length[ids], "token"), _spread(self.fitted.patches[ids], "patch")
        lines = [*index_summary(self.index), total, f"a sample has {tokens} and {patches}"]
        return [f"data: {line}" for line in lines]

    def steps(self, start: int, total: int, costs: Costs, budget: Budget) -> Iterator[Step]:
        """Training steps of this rank, from step number `start` (0-based) up to `total`.

        Args:
            costs: what the ranks are balanced by.
            budget: what rows may hold beside the options' own limit.
        """
        o, limit = self.options, self.limit(budget)
        return surviving(
            lambda first: step_loader(
                self.index, self.fitted, self.plan, self.chat, rank=o.rank, world_size=o.world_size, seed=o.seed,
                start_step=first, total_steps=total, rows_per_rank=o.rows_per_rank, token_budget=limit.tokens,
                patch_budget=limit.patches, without=limit.without, policy=o.policy, costs=costs,
                num_workers=o.num_workers, pin_memory=o.pin_memory,
            ),
            start,
        )  # fmt: skip

    def limit(self, budget: Budget) -> Budget:
        """What rows may hold: by the options, and by what failures have taught."""
        o = self.options
        return Budget(tokens=o.train_batch_size * o.max_seq_length).meet(budget)

    def largest(self, start: int, total: int, costs: Costs, budget: Budget) -> list[Planned]:
        """The row with the most tokens and that with the most patches, over all ranks, of an epoch of steps.

        Args:
            start, total, costs, budget: as for `steps`; the epoch begins at `start`.
        """
        steps, without = range(start, min(total, start + self.steps_per_epoch)), self.limit(budget).without
        fitted = self.fitted
        cost = fitted.cost(np.arange(len(fitted.length)), costs)
        return largest_rows(
            self.plan, fitted.length, fitted.patches, cost, steps, without=without, **self._placement(budget)
        )

    def placed(self, step: int, costs: Costs, budget: Budget) -> list[list[npt.NDArray[np.int64]]]:
        """Rank -> rows -> samples of a step, as the loader places them."""
        ids = self.plan.members(*self.plan.locate(step))
        ids = ids[~np.isin(ids, self.limit(budget).without)]
        fitted = self.fitted
        ranks = place(fitted.length[ids], fitted.patches[ids], fitted.cost(ids, costs), **self._placement(budget))
        return [[ids[np.array(row, np.int64)] for row in rows] for rows in ranks]

    def _placement(self, budget: Budget) -> dict[str, Any]:
        """Of `plan.place`, for training steps."""
        o, limit = self.options, self.limit(budget)
        return {
            "ranks": o.world_size, "rows_per_rank": o.rows_per_rank, "token_budget": limit.tokens,
            "patch_budget": limit.patches,
        }  # fmt: skip

    def row(self, planned: Planned) -> Row:
        """A row that the plan has, read and decoded by this process."""
        o = self.options
        epoch, _ = self.plan.locate(planned.step)
        row = lone_row(
            self.index, self.fitted, self.chat, planned.ids, step=planned.step, epoch=epoch, seed=o.seed,
            policy=o.policy,
        )  # fmt: skip
        return row.pin_memory() if o.pin_memory else row

    def eval_steps(self, datasets: Sequence[str], limit: int | None = None) -> Iterator[Step]:
        """Held-out rows of this rank; over all ranks each sample once, and the same number of rows everywhere.

        Args:
            limit: samples of each data set, always the same ones; None for all.
        """
        o, ids = self.options, self._chosen(datasets, limit)
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
        """Of this rank's part of a step: supervised tokens, samples, tokens, pictures, samples that failed, padding,
        rows whose pictures get a gradient.
        """
        real = [row for row in step.rows if row.sample_ids]
        tokens = sum(row.input_ids_T.shape[1] for row in real)
        pictures = sum(len(row.image_grid_thw) for row in real)
        padding = sum(row.input_ids_T.shape[1] for row in step.rows) - tokens
        reached = sum(row.reaches_pictures for row in real)
        counts = (step.supervised_tokens, step.samples, tokens, pictures, len(step.failures), padding, reached)
        return [float(n) for n in counts]

    def by_name(self, sums: Sequence[float]) -> dict[str, float | None]:
        """Mean loss of each data set that a step holds; None where it is not finite.

        Args:
            sums: (2 * data sets,) losses, then learnt tokens.
        """
        half = len(self.names)
        means = {name: sums[n] / sums[half + n] for n, name in enumerate(self.names) if sums[half + n]}
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}

    def account(self, failures: Sequence[LedgerEntry]) -> list[LedgerEntry]:
        """Remember samples that failed to decode, on any rank; returns those not seen before.

        Raises:
            DataError: with those before the run, more than `max_bad_fraction` of the data.
        """
        # Not by id: several records may share one. The message names the place, which no two share.
        found = {(e.dataset, e.message): e for e in failures}  # a sample may be in a step twice
        new = [entry for place, entry in found.items() if place not in self._bad]
        self._bad = found | self._bad
        check_bad_fraction([*self.ledger, *self._bad.values()], self.index.total, self.options.max_bad_fraction)
        return new

    @cached_property
    def fingerprint(self) -> str:
        """Of what a step's samples depend on: their numbers, which the order is drawn from, how often each data set is
        passed over, texts, pictures, and what became of their size.
        """
        ids, index = self.plan.ids, self.index
        sets = [[spec.name, spec.weight] for spec in index.specs]
        digest = xxhash.xxh3_128(json.dumps(sets).encode())
        digest.update(ids.tobytes())
        for array in (index.identity, index.text_hash, index.split_hash, self.fitted.length, self.fitted.patches):
            digest.update(np.ascontiguousarray(array[ids]).tobytes())
        return digest.hexdigest()

    @property
    def told(self) -> str:
        """What must be the same on all ranks, in one phrase."""
        digest = xxhash.xxh3_64(self.fingerprint.encode())
        for array in (self._held_out, self.index.text_hash[self._held_out]):
            digest.update(np.ascontiguousarray(array).tobytes())
        many = f"{self.plan.samples_per_epoch} samples an epoch, {len(self._held_out)} held out"
        return f"{many}, {len(self.ledger)} in the ledger, digest {digest.hexdigest()[:8]}"

    @property
    def bad(self) -> list[dict[str, Any]]:
        """What `account` remembers, for a checkpoint."""
        return [entry.json() for entry in self._bad.values()]

    def restore(self, bad: Sequence[dict[str, Any]]) -> None:
        self._bad = {(e["dataset"], e["message"]): LedgerEntry(**e) for e in bad}

    def dataset_of(self, sample: int) -> str:
        return self.names[int(self.index.dataset[sample])]

    def describe(self, sample: int) -> Described:
        return show.describe(self.index, self.fitted, self.chat, sample)

    def some_held_out(self, dataset: str, count: int) -> list[Described]:
        """The first held-out samples of a data set, in words; none whose record has changed since it was indexed."""
        found = []
        for i in self._chosen([dataset], count).tolist():
            with suppress(RecordError):
                found.append(self.describe(i))
        return found

    def gallery(self, count: int) -> Iterator[Shown]:
        """Up to `count` held-out samples of each data set with their pictures: of those that evaluations answer."""
        ids = self._chosen(self.names, self.options.eval_limit)
        return show.gallery(self.index, self.fitted, self.chat, ids, self.names, count)

    def statistics(self) -> dict[str, Any]:
        """What data.json holds."""
        return show.statistics(self.index, self.fitted, self.plan.ids, self._held_out, self.names, self.ledger)

    def _chosen(self, datasets: Sequence[str], limit: int | None) -> npt.NDArray[np.int64]:
        """Held-out samples, ascending; of more than `limit` in a data set those with the smallest hashes."""
        chosen = [np.zeros(0, np.int64)]
        for n, name in enumerate(self.names):
            mine = self._held_out[self.index.dataset[self._held_out] == n]
            if name in datasets:
                order = np.argsort(mix64(self.index.identity[mine], _LIMIT_SALT), kind="stable")
                chosen.append(mine if limit is None else np.sort(mine[order[:limit]]))
        return np.concatenate(chosen)


def _spread(sizes: npt.NDArray[Any], what: str) -> str:
    """How many tokens or patches samples have, in words."""
    low, high, half = int(sizes.min()), int(sizes.max()), int(np.median(sizes))
    most = counted(high, what)
    return most if low == high else f"{low:,} to {most} (half of them up to {half:,})"


def check_specs(options: DataOptions, specs: Sequence[DatasetSpec]) -> None:
    """Raise a ConfigError about data sets whose largest picture would be smaller than the smallest."""
    if small := [s for s in specs if s.max_pixels is not None and s.max_pixels < options.min_pixels]:
        raise ConfigError(
            [
                f"{options.registry}: data set '{s.name}', key 'max_pixels': {s.max_pixels} is below the "
                f"{options.min_pixels} pixels of the smallest picture; raise it or give --min_pixels."
                for s in small
            ]
        )


def fitted_of(o: DataOptions, index: Index, chat: Chat) -> Fitted:
    """Sizes and lengths under the options' limits, with room for coordinates that a policy may move."""
    layout = o.layout
    limits = Limits(
        o.min_pixels, o.max_pixels, o.max_seq_length, o.on_too_long, layout.factor, layout.merge, layout
    )  # fmt: skip
    moves = o.policy is not None and bool(o.policy.geometric)
    return fit(index, limits, room_to_move(index, chat) if moves else None)


def nothing_left(o: DataOptions, index: Index, fitted: Fitted, held_out: int) -> DataError:
    return DataError(
        f"no sample is left to train on: of {index.total} records {len(index.ledger)} cannot be used, "
        f"{len(fitted.ledger)} are longer than --max_seq_length {o.max_seq_length}, {held_out} are held out; "
        "add records, or raise --max_seq_length or --train_split_ratio."
    )


def prepare_data(options: DataOptions, load_chat: Callable[[Path, Family], Chat] = Chat.load) -> Data:
    """Read the registry, index (or find in the cache), fit, split and plan.

    Args:
        load_chat: from the model's folder; another one may keep what it has loaded.
    Raises:
        ConfigError: the registry is wrong; all its problems.
        DataError: a file cannot be read, too much of it cannot be used, or nothing is left to train on.
    """
    o = options
    specs = read_registry(o.registry, o.names)
    check_specs(o, specs)
    chat = load_chat(o.folder, o.family)
    index = open_index(
        specs, chat, cache_dir=o.cache_dir, workers=max(1, o.num_workers), allow_remote=o.allow_remote_images,
        progress=o.progress,
    )  # fmt: skip
    check_bad_fraction(index.ledger, index.total, o.max_bad_fraction)
    fitted = fitted_of(o, index, chat)
    train, held_out = split(index, specs, o.train_split_ratio, usable=fitted.usable)
    if o.use == "all":
        train, held_out = train[:0], np.sort(np.concatenate([train, held_out]))
    if o.use != "train" and not len(held_out) and not fitted.usable.any():
        raise DataError(
            f"no sample is left to evaluate: of {index.total} records {len(index.ledger)} cannot be used and "
            f"{len(fitted.ledger)} are longer than --max_seq_length {o.max_seq_length}; raise it."
        )
    if o.use != "train" and not len(held_out):
        raise DataError(
            f"no sample of {', '.join(s.name for s in specs)} is held out; lower --train_split_ratio, or give "
            "--split all."
        )
    if not len(train) and o.use == "train":
        raise nothing_left(o, index, fitted, len(held_out))
    # An evaluation alone never asks for a training step; a plan needs samples all the same.
    planned, weights = (train, [s.weight for s in specs]) if o.use == "train" else (held_out, [1.0] * len(specs))
    plan = Plan(planned, index.dataset[planned], weights, seed=o.seed, global_batch=o.global_batch)
    return Data(o, index, fitted, chat, plan, held_out)
