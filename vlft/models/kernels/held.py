"""Copies of parameters that layers use in their place, and whether the modules still hold what the copies are from.

What trains is copied anew for every row. A frozen weight is not: whoever writes other values into its place, and does
not replace it, must switch `Installed.holds` off and on again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch

from vlft.models.kernels.block import Block
from vlft.models.kernels.product import Copies, Product

_dtype = attrgetter("dtype")
_learns = attrgetter("requires_grad")
_address = methodcaller("data_ptr")
_state = attrgetter("disable_adapters", "merged_adapters", "active_adapters")


_OWN = ("weight", "bias")


class Sources:
    """Parameters, scales and dtypes that held copies are made from, remembered by the places where they lie.

    Thousands of attributes of modules take Python milliseconds, in which a GPU waits for a row. The dicts behind them
    are asked instead, in loops that run in C.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        products = [product for block in blocks for group in block.groups() for product in group.each]
        places = [place for product in products for place in _places(product)]
        places += [(norm.module._parameters, key) for block in blocks for norm in block.norms() for key in _OWN]
        self._dicts = [d for d, _ in places]
        self._keys = [key for _, key in places]
        self._values = list(map(dict.get, self._dicts, self._keys))
        self._parameters = [value for value in self._values if isinstance(value, torch.nn.Parameter)]
        self._learn = list(map(_learns, self._parameters))
        # A module is cast, and moved, without its parameters being replaced.
        self._dtypes, self._addresses = list(map(_dtype, self._parameters)), list(map(_address, self._parameters))
        self._wrapped = [product.outer for product in products if product.outer is not product.base]
        self._states = [(off, [*merged], [*active]) for off, merged, active in map(_state, self._wrapped)]
        self._seen = all(product.base._parameters.get("weight") is product.base.weight for product in products)
        """A weight that a module works out each time it is asked for lies nowhere."""

    def same(self) -> bool:
        """Whether all is where it was: adapters come, go, are switched off, and merged; parameters are replaced, frozen
        and thawed."""
        return (
            self._seen
            and all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
            and list(map(_dtype, self._parameters)) == self._dtypes
            and list(map(_address, self._parameters)) == self._addresses
            and list(map(_learns, self._parameters)) == self._learn
            and list(map(_state, self._wrapped)) == self._states
        )


def _places(product: Product) -> Iterator[tuple[dict[str, Any], str]]:
    """(dict, key) of each."""
    base, outer = product.base, product.outer
    yield from ((base._parameters, name) for name in _OWN)
    if outer is base:
        return
    yield from ((outer._modules, "lora_A"), (outer._modules, "lora_B"), (outer.__dict__, "scaling"))
    for name in outer.active_adapters:
        yield outer.scaling, name
        for some in (outer.lora_A, outer.lora_B):
            yield some._modules, name
            if name in some:
                yield some[name]._parameters, "weight"


@dataclass
class Held:
    """Copies of parameters, joined and in the compute dtype, that layers use in their place."""

    kind: torch.dtype
    sources: Sources
    """At the time."""
    trained: Copies
    """To be made anew for every row: that costs a thousandth of it, and a weight that was changed unseen would be
    trained against its old value."""
    _batches: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self._batches = _batches(self.trained)

    @classmethod
    @torch.no_grad()
    def make(cls, blocks: Sequence[Block], kind: torch.dtype, device: torch.device) -> Held:
        copies = [copy for block in blocks for copy in block.hold(kind, device)]
        still = [copy for copy in copies if not copy[1].requires_grad]
        _copy(_batches(still), still)
        # After `hold`, which takes merged adapters out of weights where they are switched off.
        return cls(kind, Sources(blocks), [copy for copy in copies if copy[1].requires_grad])

    def of(self, kind: torch.dtype) -> bool:
        """Whether they are up to date but for values."""
        return kind == self.kind and self.sources.same()

    def refresh(self) -> None:
        _copy(self._batches, self.trained)


def _batches(copies: Copies) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """(targets, sources) of one launch each."""
    # One launch for all that lie close; the list's slow way, one each, is taken if a single one does not.
    split = ([copy for copy in copies if copy[0].is_contiguous() == close] for close in (True, False))
    return [([target for target, _, _ in some], [p for _, p, _ in some]) for some in split if some]


@torch.no_grad()
def _copy(batches: list[tuple[list[torch.Tensor], list[torch.Tensor]]], copies: Copies) -> None:
    for targets, sources in batches:
        torch._foreach_copy_(targets, sources)
    for target, _, factor in copies:
        if factor != 1.0:
            target.mul_(factor)
