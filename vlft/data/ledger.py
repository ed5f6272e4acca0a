"""The ledger: every sample that is not used, with its reason. used + ledger = total, always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlft.errors import DataError

LENGTH_REASONS = frozenset({"too_long"})
"""Reasons that say nothing against the data: such a sample is right, only larger than this run takes."""


@dataclass(frozen=True)
class LedgerEntry:
    dataset: str
    id: str
    reason: str
    """A short stable word for counting."""
    message: str
    step: int = 0
    """Optimizer step in which it was met; 0: before the first."""

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def counts_as_bad(self) -> bool:
        return self.reason not in LENGTH_REASONS


def check_bad_fraction(entries: Sequence[LedgerEntry], total: int, max_bad_fraction: float) -> None:
    """Stop when too large a part of the data cannot be used.

    Args:
        entries: what the ledger holds; lengths do not count.
        total: records of all data sets.
        max_bad_fraction: 0 to 1.
    Raises:
        DataError: naming the reasons and the first records.
    """
    bad = [entry for entry in entries if entry.counts_as_bad]
    if not bad or len(bad) <= max_bad_fraction * total:
        return
    counts: dict[str, int] = {}
    for entry in bad:
        counts[entry.reason] = counts.get(entry.reason, 0) + 1
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items(), key=lambda item: -item[1]))
    first = "".join(f"\n  {entry.dataset}, {entry.id}: {entry.message}" for entry in bad[:5])
    raise DataError(
        f"{len(bad)} of {total} records cannot be used ({reasons}), more than --max_bad_fraction {max_bad_fraction:g}; "
        f"repair them or raise it. The first:{first}"
    )
