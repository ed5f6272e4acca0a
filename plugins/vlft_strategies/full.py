"""Train the weights of every part. The recipe of the Qwen authors is `--no-train_vit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vlft import ModelSource, ParamGroup
from vlft_strategies.parts import PartsConfig, groups, unfreeze

if TYPE_CHECKING:
    from torch import nn


class FullConfig(PartsConfig):
    lighter: ClassVar[str | None] = "lora_llm_full_vit"


class Full:
    """All weights, or all weights of the chosen parts."""

    Config: ClassVar[type[PartsConfig]] = FullConfig

    def __init__(self, config: PartsConfig) -> None:
        self.config = config

    def prepare_model(self, source: ModelSource) -> nn.Module:
        self.source = source
        model = source.load()
        unfreeze(model, source.parts, self.config, self._trains_in_llm, source.tied_head)
        return model

    def _trains_in_llm(self, name: str) -> bool:  # noqa: ARG002  (a subclass asks it)
        """Whether the LLM's parameter `name` trains, given that the LLM does."""
        return True

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        return groups(model, self.source.parts, self.source.tied_head)
