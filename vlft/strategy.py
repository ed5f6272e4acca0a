"""The contract between vlft and a tuning strategy. No torch at import time: `--help` reads a strategy's `Config`.

docs/strategy-contract.md says the same in words; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from vlft.family import Part, Parts

if TYPE_CHECKING:
    import torch
    from torch import nn


class StrategyConfig(BaseModel):
    """Base of a strategy's options. Each field becomes a command-line flag and a YAML key of its own name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lighter: ClassVar[str | None] = None
    """A strategy that trains much the same with less memory: `vlft plan` proposes it where this does not fit."""

    def rates(self) -> dict[Part, float]:
        """Default learning rate of every part that these options train; a part that is absent stays frozen.

        Keys are "llm", "vit", "projector" ("head" takes the LLM's rate). The command line refuses a rate for a part
        that is absent here, before any model is loaded.
        """
        raise NotImplementedError(f"{type(self).__name__} must say which parts it trains: override rates().")

    def recommended(self) -> Mapping[Part, tuple[float, float]]:
        """Lowest and highest rate that the strategy's author recommends, for parts of which there is something to say.

        A rate above the highest one is remarked on when a run starts. The default rate need not lie inside.
        """
        return {}


@dataclass(frozen=True)
class ParamGroup:
    """Trainable parameters that share a rate."""

    name: str
    """Shown in logs and in the proof table."""
    parameters: tuple[str, ...]
    """Qualified parameter NAMES of the prepared model: sharding replaces the objects, names stay."""
    part: Part
    lr_scale: float = 1.0
    """Learning rate = learning_rate_<part> * lr_scale (head: the LLM's)."""
    weight_decay: float | None = None
    """None: the run's weight decay. Norms and biases never decay."""


@runtime_checkable
class ModelSource(Protocol):
    """What a strategy loads its model from."""

    @property
    def config(self) -> Any:
        """The Hugging Face config of the checkpoint."""

    @property
    def parts(self) -> Parts:
        """Real module paths of this family's parts."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which products run (bf16 under mixed precision bf16)."""

    @property
    def quant_storage(self) -> torch.dtype:
        """The dtype that packed 4-bit weights must be stored in: uint8, or the compute dtype under ZeRO-3 and FSDP."""

    @property
    def tied_head(self) -> bool:
        """The output head shares its weight with the token embeddings."""

    def load(self, **from_pretrained_overrides: Any) -> nn.Module:
        """Load the Hugging Face model; dtype, device and attention are already chosen, overrides are added."""


@runtime_checkable
class Strategy(Protocol):
    """How a model is loaded and which of its parameters train. Built once per process: `cls(cls.Config(**options))`.

    After `prepare_model` exactly the parameters named by `param_groups` have `requires_grad`. vlft checks that before
    anything is wrapped, casts trainable weights to fp32 masters, and proves after the first step what moved.
    """

    Config: ClassVar[type[StrategyConfig]]
    """Its options."""

    def prepare_model(self, source: ModelSource) -> nn.Module:
        """Load and return the model (plain, or wrapped by PEFT), with `requires_grad` set."""

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """Every trainable parameter in exactly one group, and no frozen one."""


@runtime_checkable
class Exporter(Protocol):
    """Second, optional protocol: for a strategy whose result is neither a plain nor a PEFT model."""

    def export(self, model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the trained model. `state` holds every trained parameter, gathered, by name."""

    def merge(self, folder: Path, base: str) -> nn.Module:
        """Load what `export` wrote into a plain Hugging Face model."""
