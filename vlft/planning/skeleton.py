"""The model that a strategy would train, on PyTorch's meta device: shapes, dtypes and what trains, but no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlft.models.load import Source, quieten
from vlft.strategy import ParamGroup, Strategy


@dataclass(frozen=True)
class SkeletonSource(Source):
    """The `ModelSource` that gives a model without weights, from the config alone."""

    def load(self, **overrides: Any) -> nn.Module:
        quieten()
        from transformers import AutoModelForImageTextToText
        from transformers.initialization import no_init_weights

        with torch.device("meta"), no_init_weights():  # nothing is there to be drawn, which takes its time all the same
            model: Any = AutoModelForImageTextToText.from_config(self.config, dtype=self.compute_dtype)
        quantisation = overrides.get("quantization_config")
        if quantisation is not None:
            from transformers.integrations import replace_with_bnb_linear

            kept = quantisation.llm_int8_skip_modules or []
            with torch.device("meta"):
                model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=quantisation)
        model.tie_weights()  # which transformers leaves out together with drawing them
        assert isinstance(model, nn.Module)
        return model


def prepared(strategy: Strategy, source: SkeletonSource) -> tuple[nn.Module, list[ParamGroup]]:
    """What the strategy makes of it. Adapters that it adds have no numbers either."""
    with torch.device("meta"), _nothing_compiled(), _nothing_drawn():
        model = strategy.prepare_model(source)
    return model, list(strategy.param_groups(model))


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Nothing of a skeleton is ever run. But bitsandbytes has four functions compiled where it is imported, for which
    PyTorch imports its whole compiler: a quarter of the time of a plan."""
    real: Any = torch.compile
    torch.compile = _as_it_is
    try:
        yield
    finally:
        torch.compile = real


def _as_it_is(model: Any = None, **_: Any) -> Any:
    return _as_it_is if model is None else model


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """The first numbers of adapters are nowhere, but to find that out takes as long as the adapters themselves."""
    real = {name: each for name, each in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}
    vars(nn.init).update(dict.fromkeys(real, _undrawn))
    try:
        yield
    finally:
        vars(nn.init).update(real)


def _undrawn(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor
