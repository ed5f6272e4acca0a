"""What a row may hold on this device, and layers may keep of it, as far as failures have taught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlft.data.collate import Row


@dataclass(frozen=True)
class Load:
    """How large a row is that did not fit."""

    tokens: int
    patches: int
    samples: tuple[int, ...]
    """Their numbers in the index."""
    spare: int | None = None
    """Bytes by which layers should keep less of it; None: they keep no more than they must."""

    @classmethod
    def of(cls, row: Row, spare: int | None = None) -> Load:
        patches = int(row.image_grid_thw.prod(dim=1).sum()) if len(row.image_grid_thw) else 0
        return cls(int(row.input_ids_T.shape[1]), patches, tuple(int(i) for i in row.sample_ids), spare)


@dataclass(frozen=True)
class Budget:
    """Limits of every row; a sample beyond them lies alone in its row."""

    tokens: int | None = None
    patches: int | None = None
    without: tuple[int, ...] = ()
    """Samples that do not fit even alone, by their numbers in the index."""
    short: int = 0
    """Bytes of the room for a row that is not really there: what layers keep is chosen for so much less."""

    def halved(self, rows: Sequence[Load]) -> Budget:
        """Small enough to cut each of `rows` in two."""
        tokens = max(1, min(row.tokens for row in rows) // 2)
        patches = max(1, min(row.patches for row in rows) // 2) if all(row.patches for row in rows) else self.patches
        return replace(self, tokens=_least(self.tokens, tokens), patches=_least(self.patches, patches))

    def keeping_less(self, rows: Sequence[Load]) -> Budget:
        """With layers that keep less of each of `rows`, those that can."""
        return replace(self, short=self.short + max((row.spare for row in rows if row.spare is not None), default=0))

    def excluding(self, samples: Sequence[int]) -> Budget:
        return replace(self, without=tuple(sorted({*self.without, *samples})))

    def meet(self, other: Budget) -> Budget:
        """What satisfies both."""
        low = replace(self, tokens=_least(self.tokens, other.tokens), patches=_least(self.patches, other.patches))
        return replace(low, short=max(self.short, other.short)).excluding(other.without)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Budget:
        # Runs of before vlft chose what layers keep have no "short".
        return cls(found["tokens"], found["patches"], tuple(found["without"]), found.get("short", 0))

    def __str__(self) -> str:
        parts = [f"{self.tokens} tokens"] if self.tokens else []
        parts += [f"{self.patches} patches"] if self.patches else []
        return " and ".join(parts) or "any number of tokens"


def _least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)
