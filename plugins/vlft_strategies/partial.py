"""Freeze the lower LLM layers and the embeddings; train the upper ones, final norm, untied head, ViT and projector."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from vlft import ModelSource, VlftError
from vlft_strategies.full import Full
from vlft_strategies.parts import PartsConfig

if TYPE_CHECKING:
    from torch import nn


class PartialConfig(PartsConfig):
    lighter: ClassVar[str | None] = "lora_llm_full_vit"

    llm_frozen_layers: int | None = Field(
        None,
        ge=0,
        description="LLM layers to freeze, counted from layer 0.",
        json_schema_extra={"shown": "the lower half"},
    )


class PartialLlmFullVit(Full):
    """All weights but the lower LLM layers and the embeddings."""

    Config = PartialConfig
    config: PartialConfig

    def prepare_model(self, source: ModelSource) -> nn.Module:
        total = source.config.get_text_config().num_hidden_layers
        wanted = self.config.llm_frozen_layers
        if wanted is not None and wanted > total:
            raise VlftError(f"--llm_frozen_layers is {wanted}, but this model's LLM has {total} layers; give fewer.")
        self.first_trained = total // 2 if wanted is None else wanted
        return super().prepare_model(source)

    def _trains_in_llm(self, name: str) -> bool:
        layer = re.search(rf"{re.escape(self.source.parts.layers)}\.(\d+)\.", name)
        if layer:
            return int(layer[1]) >= self.first_trained
        # Embeddings stay: with a tied head that keeps the head too.
        return self.source.parts.embed not in name
