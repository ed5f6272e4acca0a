"""What the built-in strategies share: options for the parts, switching them on, and naming what trains.

No torch at import time: `vlft --help` reads the options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from vlft import ParamGroup, Part, Parts, StrategyConfig, VlftError

if TYPE_CHECKING:
    from torch import nn

VIT_RATE = 1e-5
PROJECTOR_RATE = 1e-4
WEIGHTS_RATE = 2e-5
"""Default rate of the LLM's own weights."""
ADAPTER_RATE = 1e-4
"""Default rate of adapters in the LLM."""
Range = tuple[float, float]
VISION_RANGE: Range = (1e-4, 2e-4)
"""What the tuning guide recommends for the weights of ViT and projector; docs/tuning-guide.md has others' beside it."""
WEIGHTS_RANGE: Range = (1e-5, 5e-5)
ADAPTER_RANGE: Range = (1e-4, 2e-4)


class PartsConfig(StrategyConfig):
    """Which parts train. Subclasses set the defaults of `train_*` and the LLM's rates."""

    llm_rate: ClassVar[float] = WEIGHTS_RATE
    llm_range: ClassVar[Range] = WEIGHTS_RANGE

    train_vit: bool = Field(True, description="Train the vision tower's weights.")
    # Not "as train_vit" here: the recipe of the Qwen authors freezes the vision tower and trains the projector.
    train_projector: bool | None = Field(True, description="Train the projector's weights.")
    train_llm: bool = Field(True, description="Train the LLM's weights.")

    @property
    def trains_projector(self) -> bool:
        return self.train_vit if self.train_projector is None else self.train_projector

    @model_validator(mode="after")
    def _something_trains(self) -> PartsConfig:
        if not self.rates():
            raise ValueError("no part is left to train: switch on one of train_llm, train_vit, train_projector")
        return self

    def rates(self) -> dict[Part, float]:
        chosen: dict[Part, float] = {}
        if self.train_llm:
            chosen["llm"] = self.llm_rate
        if self.train_vit:
            chosen["vit"] = VIT_RATE
        if self.trains_projector:
            chosen["projector"] = PROJECTOR_RATE
        return chosen

    def recommended(self) -> Mapping[Part, Range]:
        ranges: dict[Part, Range] = {"llm": self.llm_range, "vit": VISION_RANGE, "projector": VISION_RANGE}
        return {part: ranges[part] for part in self.rates()}


def unfreeze(model: nn.Module, parts: Parts, config: PartsConfig, llm: Callable[[str], bool], tied_head: bool) -> None:
    """Set `requires_grad` of every parameter: ViT and projector by the options, the LLM and head by `llm(name)`."""
    wanted: dict[Part, bool] = {"vit": config.train_vit, "projector": config.trains_projector}
    for name, p in model.named_parameters():
        part = parts.part_of(name, tied_head=tied_head)
        train = wanted[part] if part in wanted else config.train_llm and llm(name)
        if train and not p.is_floating_point():
            raise VlftError(f"'{name}' should train but is stored as {p.dtype}; keep its layer out of quantisation.")
        p.requires_grad_(train)


def groups(model: nn.Module, parts: Parts, tied_head: bool) -> list[ParamGroup]:
    """One group a part, of everything that has `requires_grad`."""
    names: dict[Part, list[str]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            names.setdefault(parts.part_of(name, tied_head=tied_head), []).append(name)
    return [ParamGroup(name=part, parameters=tuple(found), part=part) for part, found in names.items()]
