"""Train the vision tower and the projector; the LLM stays as it is, the gradient passes through it."""

from __future__ import annotations

from pydantic import Field

from vlft_strategies.full import Full
from vlft_strategies.parts import PartsConfig


class VitOnlyConfig(PartsConfig):
    train_llm: bool = Field(False, description="Train the LLM's weights too, which makes this `full`.")


class VitOnly(Full):
    """All weights of ViT and projector; the LLM stays as it is."""

    Config = VitOnlyConfig
