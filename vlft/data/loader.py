"""Whole optimizer steps for one rank: planned, decoded in worker processes, in order.

A worker gets the number of a step and does everything for it, so the result depends on neither the number of workers
nor on what was loaded before; a loader made for a resume starts at its step and decodes nothing earlier.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlft.augmentation.policy import Policy
from vlft.data import images
from vlft.data.collate import Row, collate
from vlft.data.index import Index
from vlft.data.ledger import LedgerEntry
from vlft.data.plan import Plan, place
from vlft.data.sample import BY_TOKENS, Costs, Fitted, Mover, Sample, build_sample
from vlft.data.tokens import Chat
from vlft.errors import DataError, RecordError

WORKER_DEATHS = 3
"""How often in a row a step's workers may die."""

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Step:
    """One optimizer step's rows of one rank."""

    number: int
    """From 0: the steps that are done before it. Ledger entries carry number + 1, the step as metrics.jsonl counts."""
    epoch: int
    """From 0."""
    rows: list[Row]
    """As many on every rank; some may be empty."""
    failures: list[LedgerEntry]
    """Samples of this rank that could not be decoded; they are in no row."""
    supervised_tokens: int
    """Of the rows above, after decoding."""
    samples: int
    """In the rows above, after decoding."""

    def pin_memory(self) -> Step:
        return replace(self, rows=[row.pin_memory() for row in self.rows])


@dataclass
class _Steps:
    """The data set behind the loader: number of a step (from 0) -> Step."""

    index: Index
    fitted: Fitted
    chat: Chat
    members: Callable[[int], tuple[int, npt.NDArray[np.int64]]]
    """step from 0 -> (epoch, sample ids)"""
    rank: int
    world_size: int
    seed: int
    costs: Costs = BY_TOKENS
    placement: Mapping[str, Any] = field(default_factory=dict)
    """Of `plan.place`."""
    without: tuple[int, ...] = ()
    """Samples that this device cannot hold: left out of their steps."""
    policy: Policy | None = None
    """How pictures move; None: they stay."""

    def __getitem__(self, step: int) -> Step:
        epoch, ids = self.members(step)
        ids = ids[~np.isin(ids, self.without)]
        fitted, cost = self.fitted, self.fitted.cost(ids, self.costs)
        placed = place(fitted.length[ids], fitted.patches[ids], cost, ranks=self.world_size, **self.placement)
        failures: list[LedgerEntry] = []
        rows = [self._row(ids[positions].tolist(), step, epoch, failures) for positions in placed[self.rank]]
        rows = _one_buffer(rows)
        return Step(
            number=step,
            epoch=epoch,
            rows=rows,
            failures=failures,
            supervised_tokens=sum(row.supervised for row in rows),
            samples=sum(len(row.sample_ids) for row in rows),
        )

    def _row(self, ids: Sequence[int], step: int, epoch: int, failures: list[LedgerEntry]) -> Row:
        samples: list[Sample] = []
        decoded: list[list[npt.NDArray[np.uint8]]] = []
        mover = Mover(self.policy, self.seed, epoch) if self.policy and self.policy.geometric else None
        for i in ids:
            try:
                sample = build_sample(self.index, self.fitted, self.chat, i, mover)
                pictures = decode_sample(sample)
            except RecordError as error:
                failures.append(self._failure(i, step, error))
                continue
            samples.append(sample)
            decoded.append(pictures)
        return collate(
            samples,
            decoded,
            image_token_id=self.chat.image_token_id,
            pad_token_id=self.chat.pad_token_id,
            seed=self.seed,
            epoch=epoch,
            merge=self.fitted.limits.merge,
            layout=self.fitted.limits.layout,
        )

    def _failure(self, i: int, step: int, error: RecordError) -> LedgerEntry:
        shard, _ = self.index.locate(i)
        message = f"{self.index.place(i)}: {error}"
        return LedgerEntry(shard.spec.name, self.index.sample_id(i), error.reason, message, step + 1)


def _one_buffer(rows: list[Row]) -> list[Row]:
    """In a worker, rows whose pixels are views of one tensor: it crosses in shared memory, one descriptor a step."""
    import torch
    from torch.utils.data import get_worker_info

    if get_worker_info() is None or len(rows) < 2:
        return rows
    whole = torch.cat([row.pixels_u8 for row in rows])
    views = torch.split(whole, [len(row.pixels_u8) for row in rows])
    return [replace(row, pixels_u8=view) for row, view in zip(rows, views, strict=True)]


def decode_sample(sample: Sample) -> list[npt.NDArray[np.uint8]]:
    """The pictures of a sample, (3, H, W) uint8 at their final size.

    Raises:
        RecordError: one of them cannot be decoded.
    """
    pictures = zip(sample.sources, sample.final_wh, sample.stored_wh, strict=True)
    return [images.decode(source, final, expect_wh=stored) for source, final, stored in pictures]


@dataclass
class _TrainMembers:
    plan: Plan

    def __call__(self, step: int) -> tuple[int, npt.NDArray[np.int64]]:
        epoch, k = self.plan.locate(step)
        return epoch, self.plan.members(epoch, k)


def lone_row(
    index: Index,
    fitted: Fitted,
    chat: Chat,
    ids: Sequence[int],
    *,
    step: int,
    epoch: int,
    seed: int,
    policy: Policy | None,
) -> Row:
    """One row of training samples, made here and now as a worker would. Those that cannot be decoded are not in it."""
    maker = _Steps(index, fitted, chat, _nobody, 0, 1, seed, policy=policy)
    return maker._row(ids, step, epoch, [])


def _nobody(_: int) -> tuple[int, npt.NDArray[np.int64]]:
    return 0, np.zeros(0, np.int64)


@dataclass
class _EvalMembers:
    ids: npt.NDArray[np.int64]
    block: int

    def __call__(self, step: int) -> tuple[int, npt.NDArray[np.int64]]:
        return 0, self.ids[step * self.block : (step + 1) * self.block]


def step_loader(
    index: Index,
    fitted: Fitted,
    plan: Plan,
    chat: Chat,
    *,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    costs: Costs,
    rows_per_rank: int = 1,
    token_budget: int | None = None,
    patch_budget: int | None = None,
    without: Sequence[int] = (),
    policy: Policy | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Step]:
    """Training steps `start_step` to `total_steps - 1` of this rank, in order.

    Args:
        start_step: steps already done.
        costs: what the ranks are balanced by.
        rows_per_rank, token_budget, patch_budget: see `plan.place`.
        without: samples, by number, that are left out of their steps.
        policy: of augmentation; pictures and the coordinates in texts move by it.
    """
    index.warm()
    placement = {"rows_per_rank": rows_per_rank, "token_budget": token_budget, "patch_budget": patch_budget}
    members = _TrainMembers(plan)
    steps = _Steps(index, fitted, chat, members, rank, world_size, seed, costs, placement, tuple(without), policy)
    return _loader(steps, range(start_step, total_steps), num_workers, pin_memory)


def eval_steps(
    index: Index,
    fitted: Fitted,
    chat: Chat,
    ids: npt.ArrayLike,
    *,
    rank: int,
    world_size: int,
    batch_size: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Step]:
    """This rank's part of held-out samples, as steps of `batch_size` samples a rank.

    Over all ranks every id comes exactly once; every rank has the same number of steps and of rows, empty ones among
    them, so collectives stay in step. `Row.dataset_ids` tells whose loss a sample's is.
    """
    ordered = np.asarray(ids, np.int64)
    block = batch_size * world_size
    steps = _Steps(index, fitted, chat, _EvalMembers(ordered, block), rank, world_size, 0)
    return _loader(steps, range(start_step, -(-len(ordered) // block)), num_workers, pin_memory)


def _loader(steps: _Steps, numbers: range, num_workers: int, pin_memory: bool) -> DataLoader[Step]:
    from torch.utils.data import DataLoader

    return DataLoader(
        steps,  # type: ignore[arg-type]
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C reaches every process of the terminal: a worker that dies of it would cost the step that is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Forked, it would write the parent's signals a second time.
    signal.set_wakeup_fd(-1)


def surviving(make: Callable[[int], DataLoader[Step]], start: int = 0) -> Iterator[Step]:
    """Steps of `make(start)`; when the system kills one of its workers, of a new loader from where it stopped.

    Args:
        make: step -> loader that begins there.
    Raises:
        DataError: the workers of one step died again and again.
    """
    number, deaths = start, 0
    while True:
        loader = make(number)
        try:
            steps = iter(loader)
            # PyTorch's handler would raise in whatever line the main thread is at, the middle of a forward say. Without
            # it a death is found where a step is waited for.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for step in steps:
                yield step
                number, deaths = number + 1, 0
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not (loader.num_workers and _tells_of_a_death(error)):
                raise
            deaths += 1
            what = f"step {number + 1}: {' '.join((str(error) or type(error).__name__).split())[:160]}"
            if deaths > WORKER_DEATHS:
                raise DataError(
                    f"data workers of {what}, {deaths} times; the memory of this machine may not do for them: lower "
                    "--num_workers (0: none) and go on with --resume_from_checkpoint latest."
                ) from error
            print(f"vlft: {what}; starting the workers anew, nothing is lost.", file=sys.stderr, flush=True)


def _tells_of_a_death(error: Exception) -> bool:
    """Of a worker. A step's tensors come through a connection to it, which may break, or be gone, before the system
    says that it is dead; PyTorch then raises what the connection did.
    """
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    broken = isinstance(error, (ConnectionError, FileNotFoundError, EOFError))
    return broken and "in DataLoader worker process" not in str(error)  # what a worker itself has met
