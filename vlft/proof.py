"""The proof that a strategy trained what it said: checked before the run, shown as a table, checked on real steps.

Before: every trainable parameter is in exactly one group and no frozen one is in any. After the first step that was
not skipped: no frozen weight moved, and every part whose data was in a step received a finite, non-zero gradient and
moved. Judged per part, since LoRA's A has no gradient while B is zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlft.engine import Engine
from vlft.errors import StrategyError, TrainingError
from vlft.family import PARTS, Part, Parts
from vlft.models.load import is_quantised
from vlft.optim import group_rate
from vlft.strategy import ParamGroup
from vlft.terminal import table


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_groups(
    model: nn.Module,
    groups: Sequence[ParamGroup],
    strategy: str,
    parts: Parts,
    promised: Collection[Part],
    tied_head: bool,
) -> None:
    """Hold a strategy to its contract.

    Args:
        promised: the parts that the strategy's options say they train (its rates).
    Raises:
        StrategyError: names what is in no group, in two, frozen but grouped, unknown, under a wrong part, or promised
            and not grouped; all at once.
    """
    for group in groups:
        if not isinstance(group, ParamGroup):
            raise StrategyError(
                f"'{strategy}': param_groups gave a {type(group).__name__}; give vlft.ParamGroup objects."
            )
        if (odd := next((n for n in group.parameters if not isinstance(n, str)), None)) is not None:
            raise StrategyError(
                f"'{strategy}': the group '{group.name}' holds a {type(odd).__name__}; give names, as "
                "model.named_parameters() has them."
            )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    everything = {n for n, _ in model.named_parameters()}
    counts = Counter(name for group in groups for name in group.parameters)
    faults = [
        ("trains but is in no group", sorted(trainable - set(counts))),
        ("is in more than one group", sorted(n for n, k in counts.items() if k > 1)),
        ("is in a group but frozen", sorted((set(counts) & everything) - trainable)),
        ("is in a group but not in the model", sorted(set(counts) - everything)),
    ]
    problems = [f"{_some(names)} {what}" for what, names in faults if names]
    if not trainable:
        problems.append("nothing trains")
    unknown = sorted({str(g.part) for g in groups} - set(PARTS))
    if unknown:
        problems.append(f"unknown parts {_some(unknown)} (known: {', '.join(PARTS)})")
    problems += _part_problems(groups, everything, parts, promised, tied_head)
    if problems:
        raise StrategyError(f"strategy '{strategy}' broke its contract: {'; '.join(problems)}.")


def _part_problems(
    groups: Sequence[ParamGroup], known: set[str], parts: Parts, promised: Collection[Part], tied_head: bool
) -> list[str]:
    """Parameters under another part than they lie in (they would get its rate), and promises that do not fit."""
    wrong = [
        f"{name} (grouped under {group.part}, lies in {part})"
        for group in groups
        for name in group.parameters
        if name in known and (part := parts.part_of(name, tied_head=tied_head)) != group.part
    ]
    problems = [f"{_some(wrong)}: the part does not fit"] if wrong else []
    grouped = {g.part for g in groups} - {"head"}
    broken = sorted(set(promised) - grouped)
    problems += [f"its options promise to train '{part}', but no group holds any of it" for part in broken]
    problems += [f"it trains '{p}', which Config.rates() does not name" for p in sorted(grouped - set(promised))]
    return problems


def checksum(p: Tensor) -> int:
    """A sum over the raw bits: any optimizer step changes it, and it costs one pass over the memory."""
    raw = (
        p.detach().contiguous().view(torch.uint8)
        if p.element_size() != 4
        else p.detach().contiguous().view(torch.int32)
    )
    if raw.dtype == torch.uint8 and raw.numel() % 8 == 0:
        raw = raw.flatten().view(torch.int64)
    return int(raw.sum(dtype=torch.int64))


@dataclass
class PartRow:
    """One line of the proof table."""

    part: Part
    parameters: int = 0
    trainable: int = 0
    dtypes: str = ""
    quantised: int = 0
    """Weights held in 4 or 8 bits."""
    rate: float | None = None
    """Peak learning rate; None where the part is frozen."""


def logical_size(p: Tensor) -> int:
    """Numbers of a weight, however it is stored."""
    state = getattr(p, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(getattr(p, "ds_numel", p.numel()))  # ZeRO-3 leaves an empty tensor in place of a weight


def part_table(
    model: nn.Module, groups: Sequence[ParamGroup], parts: Parts, rates: Mapping[Part, float], tied_head: bool
) -> list[PartRow]:
    """What each part holds and trains. A tied head counts under "llm"."""
    rows = {part: PartRow(part) for part in PARTS}
    dtypes: dict[str, set[str]] = {part: set() for part in PARTS}
    packed = {id(m.weight) for m in model.modules() if is_quantised(m)}
    for name, p in model.named_parameters():
        part = parts.part_of(name, tied_head=tied_head)
        row, size = rows[part], logical_size(p)
        row.parameters += size
        row.trainable += size if p.requires_grad else 0
        row.quantised += size if id(p) in packed else 0
        kind = "nf4" if id(p) in packed else str(p.dtype).removeprefix("torch.")
        dtypes[part].add(kind + (" trained" if p.requires_grad else ""))
    for group in groups:
        rows[group.part].rate = max(rows[group.part].rate or 0.0, group_rate(group, rates))
    for part, row in rows.items():
        row.dtypes = ", ".join(sorted(dtypes[part]))
    return [row for row in rows.values() if row.parameters]


def render(rows: Sequence[PartRow]) -> str:
    """The table that is printed before the first step."""
    lines = [
        (
            r.part,
            f"{r.parameters:,}",
            f"{r.trainable:,}",
            r.dtypes,
            f"{r.quantised:,}",
            f"{r.rate:g}" if r.rate else "frozen",
        )
        for r in rows
    ]
    return table(("part", "parameters", "trainable", "dtype", "quantised", "rate"), lines)


class Moved(NamedTuple):
    """What was seen of a part."""

    step: int
    """The first step in which it had a finite gradient other than zero."""
    tensors: int
    """That should train."""
    moved: int
    """Of them, in that step."""


class Proof:
    """Watches the first steps of a run; `done` once every promise was seen kept."""

    def __init__(self, model: nn.Module, groups: Sequence[ParamGroup], engine: Engine | None = None) -> None:
        """With sharded weights every check is collective: all ranks watch alike."""
        self._engine = engine
        self._named = dict(model.named_parameters())
        self._members: dict[str, list[str]] = {}
        for group in groups:
            self._members.setdefault(group.part, []).extend(group.parameters)
        self._frozen = {n: self._sum(n) for n, p in self._named.items() if not p.requires_grad}
        self._before: dict[str, list[int]] = {}
        self._frozen_checked = False
        self.proved: dict[str, Moved] = {}
        """Parts that were seen to train."""

    def _sum(self, name: str) -> int:
        p = self._named[name]
        return checksum(self._engine.whole(p) if self._engine else p)

    def _has_gradient(self, name: str) -> bool:
        p = self._named[name]
        gradient = self._engine.gradient(p) if self._engine else p.grad
        return gradient is not None and bool(gradient.ne(0).any())

    @property
    def done(self) -> bool:
        return self._frozen_checked and set(self.proved) == set(self._members)

    @property
    def missing(self) -> list[str]:
        """Parts that should train and were not seen to."""
        return [part for part in self._members if part not in self.proved]

    def render(self) -> str:
        """The table that is printed once every part was seen to train."""
        rows = [(part, f"{m.tensors:,}", f"{m.moved:,}", str(m.step)) for part, m in self.proved.items()]
        rows += [("frozen", f"{len(self._frozen):,}", "0", "")] if self._frozen else []
        return table(("proved", "tensors", "moved", "in step"), rows)

    def state(self) -> dict[str, list[int]]:
        return {part: [m.step, m.tensors, m.moved] for part, m in self.proved.items()}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Go on with what an earlier part of the run has proved."""
        self.proved = {part: Moved(*facts) for part, facts in state.items()}

    def before_update(self, reached_pictures: bool) -> None:
        """Call with gradients in place. A step without pictures that a learnt token follows says nothing about ViT and
        projector.

        Raises:
            TrainingError: a part that the step's data reached has no gradient at all.
        """
        self._before = {}
        for part, names in self._members.items():
            if part in self.proved or (part in ("vit", "projector") and not reached_pictures):
                continue
            if not any(self._has_gradient(n) for n in names):
                raise TrainingError(
                    f"'{part}' should train, but no gradient reached any of its {len(names)} parameters "
                    f"(first: {names[0]}); the strategy or the forward cuts it off."
                )
            self._before[part] = [self._sum(n) for n in names]

    def after_update(self, step: int) -> bool:
        """Call after a step that was not skipped: its gradient was finite. Returns whether all is proved now.

        Raises:
            TrainingError: a frozen weight moved, or a part that had a gradient did not.
        """
        if not self._frozen_checked:
            changed = [n for n, before in self._frozen.items() if self._sum(n) != before]
            if changed:
                raise TrainingError(f"frozen weights moved in step {step}: {_some(changed)}.")
            self._frozen_checked = True
        for part, before in self._before.items():
            moved = sum(a != b for a, b in zip(before, [self._sum(n) for n in self._members[part]], strict=True))
            if not moved:
                raise TrainingError(f"'{part}' had a gradient in step {step} but none of its weights moved.")
            self.proved[part] = Moved(step, len(before), moved)
        return self.done
