"""LoRA adapters on the LLM's linear layers (Hu et al. 2021), with or without the weights of ViT and projector."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from vlft import ModelSource, ParamGroup, VlftError
from vlft_strategies.parts import ADAPTER_RANGE, ADAPTER_RATE, PartsConfig, Range, groups, unfreeze

if TYPE_CHECKING:
    from torch import nn


class LoraConfig(PartsConfig):
    lighter: ClassVar[str | None] = "qlora"
    llm_rate: ClassVar[float] = ADAPTER_RATE
    llm_range: ClassVar[Range] = ADAPTER_RANGE

    lora_rank: int = Field(64, ge=1, description="Rank of the adapters; usual: 32, 64, 128.")
    lora_alpha: float = Field(16, gt=0, description="Scaling of the adapters; the tuning guide: rank/4 to rank/2.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout probability before the adapters.")
    lora_target_modules: tuple[str, ...] | None = Field(
        None,
        description="Linear modules of the LLM's layers to adapt, by name.",
        json_schema_extra={"shown": "all of them"},
    )
    use_rslora: bool = Field(False, description="Scale by alpha/sqrt(rank) instead of alpha/rank.")
    train_vit: bool = Field(False, description="Train the vision tower's weights in full precision.")
    train_projector: bool | None = Field(
        None, description="Train the projector's weights.", json_schema_extra={"shown": "as train_vit"}
    )
    train_llm: bool = Field(True, description="Put adapters on the LLM.")

    @model_validator(mode="after")
    def _has_adapters(self) -> LoraConfig:
        if not self.train_llm:
            raise ValueError("without train_llm there are no adapters to train; choose the strategy vit_only")
        return self


class LoraFullVitConfig(LoraConfig):
    train_vit: bool = Field(True, description="Train the vision tower's weights in full precision.")
    train_projector: bool | None = Field(True, description="Train the projector's weights.")


def linear_names(model: nn.Module, layers: str) -> set[str]:
    """Last names of the linear modules in the decoder layers: `q_proj`, `gate_proj`, ..."""
    from torch import nn

    return {
        name.rsplit(".", 1)[-1]
        for name, m in model.named_modules()
        if name.startswith(layers) and isinstance(m, nn.Linear)
    }


class Lora:
    """Adapters on the LLM; everything else by `--train_vit` and `--train_projector`."""

    Config: ClassVar[type[LoraConfig]] = LoraConfig

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def prepare_model(self, source: ModelSource) -> nn.Module:
        self.source = source
        return self.adapt(source.load())

    def adapter_options(self) -> dict[str, Any]:
        """Keyword arguments of PEFT's LoraConfig; a plugin built on this one adds its own."""
        c = self.config
        options = {"r": c.lora_rank, "lora_alpha": c.lora_alpha, "lora_dropout": c.lora_dropout}
        return options | {"use_rslora": c.use_rslora, "bias": "none", "task_type": "CAUSAL_LM"}

    def adapt(self, model: nn.Module) -> nn.Module:
        import peft

        if self.config.train_llm:
            target = self._target_pattern(model)
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=target, **self.adapter_options()))
        # After get_peft_model, which freezes everything else again.
        unfreeze(model, self.source.parts, self.config, lambda name: ".lora_" in name, self.source.tied_head)
        return model

    def _target_pattern(self, model: nn.Module) -> str:
        layers = self.source.parts.layers
        known = linear_names(model, layers)
        wanted = set(self.config.lora_target_modules or known)
        if unknown := wanted - known:
            raise VlftError(
                f"--lora_target_modules names {', '.join(sorted(unknown))}, which this LLM's layers do not have; "
                f"they have {', '.join(sorted(known))}."
            )
        # The full path: a bare `gate_proj` also hits the ViT of Qwen2.5-VL.
        return rf"{re.escape(layers)}\.\d+\..*\.({'|'.join(sorted(wanted))})"

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        return groups(model, self.source.parts, self.source.tied_head)


class LoraLlmFullVit(Lora):
    """Adapters on the LLM, all weights of ViT and projector."""

    Config = LoraFullVitConfig
