"""DoRA (Liu et al. 2024, Weight-Decomposed Low-Rank Adaptation) on the LLM's linear layers, as a strategy of vlft.

A template for strategies of your own. It imports the names of `vlft` itself, torch and peft; torch and peft inside
methods only, because `vlft --tuning_strategy dora --help` imports this module to read its options.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from vlft import ModelSource, ParamGroup, Part, StrategyConfig

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Dora", "DoraConfig"]


class DoraConfig(StrategyConfig):
    dora_rank: int = Field(16, ge=1, description="Rank of the adapters.")
    dora_alpha: float = Field(32, gt=0, description="Scaling of the adapters.")
    dora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability before the adapters.")
    train_projector: bool = Field(False, description="Train the projector's weights too.")

    def rates(self) -> dict[Part, float]:
        return {"llm": 1e-4, "projector": 1e-4} if self.train_projector else {"llm": 1e-4}


class Dora:
    """DoRA adapters on the LLM, optionally all weights of the projector."""

    Config: ClassVar[type[DoraConfig]] = DoraConfig

    def __init__(self, config: DoraConfig) -> None:
        self.config = config

    def prepare_model(self, source: ModelSource) -> nn.Module:
        import peft
        from torch import nn

        self.parts = source.parts
        model = source.load()
        # Full paths from `source.parts`: a bare "gate_proj" also hits the vision tower of Qwen2.5-VL.
        layers = source.parts.layers
        linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{layers}."))
        adapters = peft.LoraConfig(
            r=self.config.dora_rank,
            lora_alpha=self.config.dora_alpha,
            lora_dropout=self.config.dora_dropout,
            target_modules="|".join(re.escape(name) for name in linears),
            use_dora=True,
            task_type="CAUSAL_LM",
        )
        prepared: nn.Module = peft.get_peft_model(model, adapters)
        # After get_peft_model, which freezes all that is not an adapter.
        for name, parameter in prepared.named_parameters():
            if self.config.train_projector and self.parts.part_of(name) == "projector":
                parameter.requires_grad_(True)
        return prepared

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        # The magnitudes are vectors, so they do not decay; vlft sees to that for everything with one dimension.
        magnitudes = tuple(n for n in trained if "magnitude" in n)
        matrices = tuple(n for n in trained if self.parts.part_of(n) == "llm" and n not in set(magnitudes))
        projector = tuple(n for n in trained if self.parts.part_of(n) == "projector")
        found = [
            ParamGroup(name="directions", parameters=matrices, part="llm"),
            ParamGroup(name="magnitudes", parameters=magnitudes, part="llm"),
            ParamGroup(name="projector", parameters=projector, part="projector"),
        ]
        return [group for group in found if group.parameters]
