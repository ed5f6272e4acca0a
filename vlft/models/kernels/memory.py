"""What the layers of both towers keep for their backward pass, chosen for each row from the memory there is.

Everything kept is the fastest and the largest. What is dropped is computed again, and some of it is cheaper to compute
again than other: the order is by arithmetic for each byte. Results are the same whatever is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlft.models.kernels.block import Block, Keep
from vlft.models.kernels.install import Installed

MARGIN = 0.06
"""Of the memory, for what the allocator cannot use because it lies in pieces, and for libraries' workspaces."""


@dataclass(frozen=True)
class Drop:
    """One way to save memory in every layer of a tower."""

    tower: int
    keep: Keep
    """What the layers keep then."""
    bytes_each: int
    """Saved by one layer."""
    work_each: float
    """FLOPs that the same layer does again."""


def kept_bytes(block: Block, tokens: int, kind: torch.dtype, stream: torch.dtype) -> tuple[int, int, int]:
    """Bytes of a layer's (input, attention and the sum behind it, MLP's inner values) for so many tokens."""
    width = block.qkv.each[0].columns
    qkv = sum(p.rows for p in block.qkv.each) * (1 if block.q_norm is None else 2)
    attended = block.heads * block.size
    inner = sum(p.rows for p in block.inner.each)
    attention = (qkv + attended) * kind.itemsize + block.heads * 4 + width * stream.itemsize
    return tokens * width * stream.itemsize, tokens * attention, tokens * inner * kind.itemsize


def drops_of(block: Block, tower: int, tokens: int, longest: int, kind: torch.dtype, stream: torch.dtype) -> list[Drop]:
    """For the layers of one tower, which are alike: first the one, then the other."""
    _, attention, inner = kept_bytes(block, tokens, kind, stream)
    products = 2.0 * tokens * sum(p.rows * p.columns for group in (block.qkv, block.out) for p in group.each)
    # Half of it where it is causal; attention runs at about half a product's speed.
    products += 4.0 * tokens * longest * block.heads * block.size * (1 if block.causal else 2)
    again = 2.0 * tokens * sum(p.rows * p.columns for p in block.inner.each)
    return [Drop(tower, "attention", inner, again), Drop(tower, "input", attention, products)]


def choose(layers: Sequence[int], drops: Sequence[Sequence[Drop]], kept: float, room: float) -> list[list[Keep]]:
    """What each layer keeps, so that `kept` bytes with everything kept shrink to `room`, or as far as they can.

    Args:
        layers: of each tower.
        drops: of each tower, in the order in which they are possible.
    """
    chosen: list[list[Keep]] = [["all"] * n for n in layers]
    steps = [[(drop, i) for drop in some for i in range(n)] for n, some in zip(layers, drops, strict=True)]
    while kept > room and any(steps):
        drop, i = min((some[0] for some in steps if some), key=lambda step: step[0].work_each / step[0].bytes_each)
        steps[drop.tower].pop(0)
        chosen[drop.tower][i] = drop.keep
        kept -= drop.bytes_each
    return chosen


class Memory:
    """`--memory` for one model: says to every layer what it keeps, before each row."""

    def __init__(
        self,
        towers: Sequence[Sequence[nn.Module]],
        vocabulary: int,
        *,
        fixed: Sequence[Sequence[Keep]] | None = None,
        room: Callable[[], float] | None = None,
    ) -> None:
        """
        Args:
            towers: those layers of the vision tower that learn, and those of the language model.
            fixed: what each keeps, whatever the row.
            room: bytes that are free for a row now. Without it and `fixed` everything is kept.
        """
        self.towers = [list(layers) for layers in towers]
        self.vocabulary = vocabulary
        self.room = None if fixed is not None else room
        self.now: list[list[Keep]] = [list(row) for row in fixed or [["all"] * len(layers) for layers in towers]]
        self._tell()

    def before_row(
        self, patches: int, picture: int, tokens: int, sample: int, supervised: int, kind: torch.dtype
    ) -> None:  # fmt: skip
        """
        Args:
            picture, sample: the longest of each, in patches and tokens.
        """
        if self.room is None:
            return
        drops: list[list[Drop]] = []
        kept, passing = 0.0, 0.0
        for tower, (layers, n, longest) in enumerate(
            zip(self.towers, (patches, tokens), (picture, sample), strict=True)
        ):
            block: Any = layers[0].vlft_block if layers else None
            drops.append(drops_of(block, tower, n, longest, kind, kind) if layers else [])
            if layers:
                kept += len(layers) * sum(kept_bytes(block, n, kind, kind))
                # The inner values, their activation and the gradients of both, while a layer's backward runs.
                passing = max(passing, 3.0 * kept_bytes(block, n, kind, kind)[2])
        # Logits in the compute dtype and in fp32, the log of their softmax, and gradients of these.
        passing = max(passing, 14.0 * supervised * self.vocabulary)
        self.now = choose([len(layers) for layers in self.towers], drops, kept, self.room() - passing)
        self._tell()

    def _tell(self) -> None:
        for layers, keeps in zip(self.towers, self.now, strict=True):
            for layer, keep in zip(layers, keeps, strict=True):
                layer.keep = keep  # type: ignore[assignment]

    def __str__(self) -> str:
        said = []
        for name, keeps in zip(("vision", "language"), self.now, strict=True):
            again = {"attention": "the MLP's inner values", "input": "all but their input"}
            for keep, what in again.items():
                if n := keeps.count(keep):  # type: ignore[arg-type]
                    said.append(f"{n} of {len(keeps)} {name} layers compute {what} again")
        return "; ".join(said) or "no layer computes anything again in the backward pass"


def room_on_gpu(device: torch.device, pending: Callable[[], int]) -> Callable[[], float]:
    """Bytes that are free for a row, now.

    Args:
        pending: bytes of gradients and optimizer states that are not there yet and will be.
    """
    free, total = torch.cuda.mem_get_info(device)
    ours = free + torch.cuda.memory_reserved(device) - MARGIN * total
    return lambda: ours - torch.cuda.memory_allocated(device) - pending()


def memory_for(
    installed: Installed,
    vocabulary: int,
    plan: str | Mapping[Any, Mapping[Any, int]],
    room: Callable[[], float] | None,
) -> Memory:
    """By `plan`: "all", "low" (inputs alone), "auto" (by `room`), or how many layers of a tower keep which."""
    towers = installed.learning()
    if plan == "auto":
        return Memory(towers, vocabulary, room=room)
    fixed: list[list[Keep]] = []
    for name, layers in zip(("vision", "language"), towers, strict=True):
        if isinstance(plan, str):
            fixed.append(["input" if plan == "low" else "all"] * len(layers))
        else:
            numbers = plan.get(name, {})
            keeps: list[Keep] = ["input"] * numbers.get("input", 0)
            keeps += ["attention"] * numbers.get("attention", 0)
            fixed.append((keeps + ["all"] * len(layers))[: len(layers)])
    return Memory(towers, vocabulary, fixed=fixed)
