"""What the layers of both towers keep for their backward pass, chosen for each row from the memory there is.

Everything kept is the fastest and the largest. What is dropped is computed again, and some of it is cheaper to compute
again than other: the order is by arithmetic for each byte. Results are the same whatever is kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from vlft.allocator import CONTEXT
from vlft.models.kernels.block import Block, Keep
from vlft.models.kernels.install import Installed
from vlft.optim import gradient_dtype

MARGIN, MARGIN_WITHOUT_RETRY = 0.045, 0.06
"""Of the memory, for what the allocator cannot use because it lies in pieces, and for libraries' workspaces; the second
where a row that does not fit ends the run."""
TOWERS = ("vision", "language")
KEEPS: tuple[Keep, ...] = get_args(Keep)
SHARE = 8
"""A row that did not fit is to keep less by at least one part in so many of what could be spared."""


@dataclass(frozen=True)
class Cost:
    """A layer of one tower for one row: bytes, and FLOPs."""

    input: int
    """kept whatever else is"""
    attended: int
    """what the attention gives, and the sum behind it"""
    queries: int
    """what it gets, keys and values too"""
    inner: int
    """before the MLP's activation"""
    again_attended: float
    """FLOPs that `attended` costs when it is computed again"""
    again_queries: float
    again_inner: float

    def kept(self, keep: Keep) -> int:
        """Bytes until the layer's backward."""
        return self._by_keep[keep][0]

    def again(self, keep: Keep) -> float:
        """FLOPs that the layer's backward does a second time."""
        return self._by_keep[keep][1]

    @property
    def parts(self) -> tuple[tuple[int, float], ...]:
        """(bytes, FLOPs when it is computed again) of what goes with each of `KEEPS` behind the first."""
        return (
            (self.inner, self.again_inner), (self.queries, self.again_queries), (self.attended, self.again_attended)
        )  # fmt: skip

    @cached_property
    def _by_keep(self) -> dict[Keep, tuple[int, float]]:
        """A row asks a dozen times, and the GPU waits for the answer."""
        kept, again = self.input + sum(size for size, _ in self.parts), 0.0
        found: dict[Keep, tuple[int, float]] = {}
        for keep, (size, flops) in zip(KEEPS, [(0, 0.0), *self.parts], strict=True):
            kept, again = kept - size, again + flops
            found[keep] = kept, again
        return found

    @property
    def passing(self) -> int:
        """While the layer's backward runs: its inner values, their activation, and the gradients of both."""
        return 3 * self.inner

    @classmethod
    def of(cls, shape: Sizes, n: int, longest: int, kind: int) -> Cost:
        """
        Args:
            n: tokens or patches; longest: of a segment that attends to itself.
            kind: bytes of a number in the compute dtype, which the residual stream has too.
        """
        again = 2.0 * n * shape.heads_width * shape.width
        # Half of the pairs where it is causal; attention runs at about half a product's speed.
        again += 4.0 * n * longest * shape.heads_width * (1 if shape.causal else 2)
        return cls(
            input=n * shape.width * kind,
            attended=n * ((shape.heads_width + shape.width + shape.ranks) * kind + 4 * shape.heads),
            queries=n * shape.qkv * (2 if shape.head_norms else 1) * kind,
            inner=n * shape.inner * kind,
            again_attended=again,
            again_queries=2.0 * n * shape.qkv * shape.width,
            again_inner=2.0 * n * shape.inner * shape.width,
        )


NOTHING = Cost(0, 0, 0, 0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Sizes:
    """What `Cost` needs to know of a tower's layers, which are alike."""

    width: int
    qkv: int
    heads: int
    heads_width: int
    inner: int
    """columns before the activation, gates included"""
    head_norms: bool
    causal: bool
    ranks: int = 0
    """of all adapters"""

    @classmethod
    def of(cls, block: Block) -> Sizes:
        return cls(
            width=block.qkv.each[0].columns, qkv=sum(p.rows for p in block.qkv.each), heads=block.heads,
            heads_width=block.heads * block.size, inner=sum(block.inner.widths(block.norm_1.weight.device)),
            head_norms=block.q_norm is not None, causal=block.causal,
            ranks=sum(_rows(a.a_rD) for group in block.groups() for p in group.each for a in p.adapters()),
        )  # fmt: skip


def _rows(weight: nn.Parameter) -> int:
    """ZeRO-3 leaves an empty tensor in place of a weight."""
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@dataclass(frozen=True)
class Tower:
    """The layers of one tower through which a gradient flows."""

    cost: Cost
    gradients: tuple[int, ...]
    """Bytes of each layer's gradients that come up in its backward: 0 where they are there already, and where the layer
    is frozen"""

    @property
    def layers(self) -> int:
        return len(self.gradients)


def peak(towers: Sequence[Tower], keeps: Sequence[Sequence[Keep]], head: float) -> float:
    """Bytes above what is there before a row, at the worst moment of its backward pass.

    What layers keep goes as their gradients come, from the last layer to the first.

    Args:
        towers: in the order of the forward.
        head: bytes of the logits, and of what the head needs beside them.
    """
    kept: list[float] = []
    passing: list[float] = []
    gradients: list[int] = []
    for tower, each in zip(towers, keeps, strict=True):
        cost = tower.cost
        of = {keep: cost.kept(keep) for keep in KEEPS}
        # What was dropped is there again while the layer's backward runs.
        again = {keep: cost.passing + of["all"] - of[keep] for keep in KEEPS}
        kept += [of[keep] for keep in each]
        passing += [again[keep] for keep in each]
        gradients += tower.gradients
    if not kept:
        return head
    held = np.cumsum(kept)
    behind = np.cumsum(gradients[::-1])[::-1]  # of the layer itself and all behind it
    return float(max(held[-1] + head, (held + behind + passing).max()))


def choose(towers: Sequence[Tower], head: float, room: float) -> list[list[Keep]]:
    """What each layer keeps so that `peak` is within `room`, or as small as it can be.

    The next to go is what costs the least arithmetic for a byte: the vision tower's inner values, as it is narrower.
    """
    order = _order(towers)

    def after(gone: int) -> list[list[Keep]]:
        chosen: list[list[Keep]] = [["all"] * tower.layers for tower in towers]
        for t, i, keep in order[:gone]:
            chosen[t][i] = keep
        return chosen

    def fits(gone: int) -> bool:
        return peak(towers, after(gone), head) <= room

    # The GPU waits for this. Mostly all fits; and as no peak rises by what goes, few need to be worked out.
    return after(0 if fits(0) else bisect_left(range(len(order)), True, lo=1, key=fits))


def _order(towers: Sequence[Tower]) -> list[tuple[int, int, Keep]]:
    """(tower, layer, what it keeps from then on), in the order in which values go."""
    runs: list[tuple[float, int, int, Keep]] = []
    for t, tower in enumerate(towers):
        dearest = 0.0
        for at, (size, flops) in enumerate(tower.cost.parts):
            # None goes before the one that comes first; one that is cheaper follows that at once.
            dearest = max(dearest, flops / max(size, 1))
            runs.append((dearest, t, at, KEEPS[at + 1]))
    return [(t, i, keep) for _, t, _, keep in sorted(runs) for i in range(towers[t].layers)]


class Memory:
    """`--memory` for one model: says to every layer what it keeps, before each row."""

    def __init__(
        self,
        towers: Sequence[Sequence[nn.Module]],
        vocabulary: int,
        *,
        fixed: Sequence[Sequence[Keep]] | None = None,
        room: Callable[[], float] | None = None,
        gradients_stay: bool = True,
        beside: Callable[[], int] = int,
    ) -> None:
        """
        Args:
            towers: those layers of the vision tower that learn, and those of the language model.
            fixed: what each keeps, whatever the row.
            room: bytes that are free for a row now, with all gradients there. Without it and `fixed` all is kept.
            gradients_stay: on the parameters, from their backward to the step; no engine takes them away.
            beside: bytes that the head takes in this row beside its weight, its gradient and the logits.
        """
        self.gradients_stay, self.beside = gradients_stay, beside
        self.towers = [list(layers) for layers in towers]
        self.vocabulary = vocabulary
        self.room = None if fixed is not None else room
        self.short = 0
        """Bytes of the room that are not really there, as rows that did not fit have taught."""
        self._trained: list[list[tuple[nn.Parameter | None, int]]] | None = None
        """What `_gradients` says of each layer; parameters are too many to be asked for every row."""
        self._row: tuple[list[Tower], float, float] = ([], 0.0, 0.0)
        """Of the last row: towers, and in bytes what the head needs for it, and the room."""
        self._measure()
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
        towers, coming = [], 0
        missing = self._missing()
        for sizes, each, n, longest in zip(self._sizes, missing, (patches, tokens), (picture, sample), strict=True):
            cost = Cost.of(sizes, n, longest, kind.itemsize) if sizes else NOTHING
            towers.append(Tower(cost, each))
            coming += sum(each)
        head = float(kind.itemsize * supervised * self.vocabulary + self.beside())
        room = self.room() + coming - self.short
        self.now = choose(towers, head, room)
        self._row = towers, head, room
        self._tell()

    @property
    def reckoned(self) -> float:
        """Bytes of the last row's peak."""
        towers, head, _ = self._row
        return peak(towers, self.now, head)

    def _missing(self) -> list[tuple[int, ...]]:
        """Bytes of each layer's gradients that are not there before this row."""
        if not self.gradients_stay:
            return [(0,) * len(layers) for layers in self.towers]
        if self._trained is None:
            self._trained = [[_gradients(layer) for layer in layers] for layers in self.towers]
        # A layer's gradients come together, in its backward, and go together, with the step: one look tells of all.
        return [tuple(0 if p is None or p.grad is not None else size for p, size in tower) for tower in self._trained]

    def look_again(self) -> None:
        """The gradients of layers have another size than before."""
        self._trained = None

    def leave(self, layers: Sequence[nn.Module]) -> None:
        """These run their own forward from now on; it asks for no plan."""
        self.look_again()  # of those that stay, too: adapters may have come
        gone = {id(layer) for layer in layers}
        for t, (tower, keeps) in enumerate(zip(self.towers, self.now, strict=True)):
            stay = [(layer, keep) for layer, keep in zip(tower, keeps, strict=True) if id(layer) not in gone]
            self.towers[t], self.now[t] = [layer for layer, _ in stay], [keep for _, keep in stay]
        if self.gradients_stay:
            self._measure()

    def _measure(self) -> None:
        """Not while a row runs, where weights are cut up: to ZeRO-3 one that is read then is one that the whole model
        needs."""
        self._sizes = [Sizes.of(layers[0].vlft_block) if layers else None for layers in self.towers]  # type: ignore[arg-type]

    def spare(self, asked: int) -> int | None:
        """Bytes that the room must shrink by after a row that did not fit, so that layers keep less of it.

        By all that was thought to be free beside the row, what the allocator was `asked` for last, and a margin. The
        next try does less each time, so that the tries end; but no more is given up than was short, since what is
        learnt here slows every row that follows.

        Returns:
            None: layers keep nothing but their input, or what a fixed plan says; the row must be smaller.
        """
        if self.room is None or all(keep == "input" for tower in self.now for keep in tower):
            return None
        towers, head, room = self._row
        used, least = self.reckoned, peak(towers, [["input"] * tower.layers for tower in towers], head)
        return int(max(room - used, 0.0) + max(asked + MARGIN * used, (used - least) / SHARE)) + 1

    def _tell(self) -> None:
        for layers, keeps in zip(self.towers, self.now, strict=True):
            for layer, keep in zip(layers, keeps, strict=True):
                if layer.keep != keep:  # a module takes its time to set an attribute
                    layer.keep = keep  # type: ignore[assignment]

    def __str__(self) -> str:
        if again := said(self.now):
            return again
        if self.room is not None:
            return "what layers compute again in the backward pass is chosen for each row"
        return "no layer computes anything again in the backward pass"


def room_on_gpu(
    device: torch.device, pending: Callable[[], int], size: int | None = None, margin: float = MARGIN
) -> Callable[[], float]:
    """Bytes that are free for a row, now.

    Args:
        pending: bytes that will be taken whatever a row keeps.
        size: of the GPU, as far as this process may use it; the allocator gives no more.
        margin: share of either that is left alone.
    """
    index: int | None = device.index
    if index is None:  # as of a process that has the machine for itself; torch's limit wants to know which
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    ours = free + torch.cuda.memory_reserved(device) - margin * total
    if size is not None and size < total:
        ours = min(ours, size - CONTEXT - margin * size)
        # Otherwise a row that takes more than was reckoned would take it from those who share the GPU.
        torch.cuda.set_per_process_memory_fraction(max(size - CONTEXT, 0) / total, device)
    return lambda: ours - torch.cuda.memory_allocated(device) - pending()


def memory_for(
    installed: Installed,
    vocabulary: int,
    plan: str | int | Mapping[Any, Mapping[Any, int]],
    room: Callable[[], float] | None,
    *,
    gradients_stay: bool = True,
    beside: Callable[[], int] = int,
) -> Memory:
    """By `plan`: "all", "low" (inputs alone), "auto" or bytes (by `room`), or how many layers of a tower keep which."""
    towers = installed.learning()
    if plan == "auto" or isinstance(plan, int):
        return Memory(towers, vocabulary, room=room, gradients_stay=gradients_stay, beside=beside)
    return Memory(towers, vocabulary, fixed=fixed_by(plan, [len(layers) for layers in towers]))


def fixed_by(plan: str | Mapping[Any, Mapping[Any, int]], layers: Sequence[int]) -> list[list[Keep]]:
    """What each layer keeps under a plan that asks for no row; `layers`: those that learn, of either tower."""
    if isinstance(plan, str):
        return [["input" if plan == "low" else "all"] * n for n in layers]
    fixed: list[list[Keep]] = []
    for name, n in zip(TOWERS, layers, strict=True):
        numbers = plan.get(name, {})
        keeps: list[Keep] = [keep for keep in KEEPS[:0:-1] for _ in range(numbers.get(keep, 0))]
        fixed.append((keeps + ["all"] * n)[:n])
    return fixed


def said(keeps: Sequence[Sequence[Keep]]) -> str:
    """What layers compute again, in words; empty where none does."""
    inner = "the MLP's inner values"
    words: dict[Keep, str] = {
        "attention": inner, "attended": f"{inner}, queries, keys and values", "input": "all but their input"
    }  # fmt: skip
    return "; ".join(
        f"{n} of {len(each)} {name} layers compute {what} again"
        for name, each in zip(TOWERS, keeps, strict=True)
        for keep, what in words.items()
        if (n := sum(one == keep for one in each))
    )


def _gradients(layer: nn.Module) -> tuple[nn.Parameter | None, int]:
    """A parameter that trains, and the bytes of the gradients of all that do."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    return (trained[0] if trained else None), sum(p.numel() * gradient_dtype(p).itemsize for p in trained)
