"""A strategy with a format of its own: its result merges, and starts a second stage, like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlft import ParamGroup, StrategyConfig, export
from vlft.models.load import load_hf, open_checkpoint, source_of


class Own:
    """Trains the final norm and keeps it in a file of its own name."""

    class Config(StrategyConfig):
        def rates(self) -> dict[Any, float]:
            return {"llm": 1e-4}

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare_model(self, source: Any) -> Any:
        model = source.load()
        for name, p in model.named_parameters():
            p.requires_grad = name == "model.language_model.norm.weight"
        return model

    def param_groups(self, model: Any) -> list[ParamGroup]:
        return [ParamGroup("norm", [n for n, p in model.named_parameters() if p.requires_grad], "llm")]

    def export(self, model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
        save_file(state, folder / "own.safetensors")

    def merge(self, folder: Path, base: str) -> Any:
        model = load_hf(Path(base), "cpu")
        model.load_state_dict(load_file(folder / "own.safetensors"), strict=False)
        return model


def test_its_result_merges(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(source="own 1.0")
    monkeypatch.setattr(export, "load_strategy", lambda name: (Own, found))
    source = source_of(open_checkpoint(str(tiny())), "no", torch.device("cpu"))
    strategy = Own(Own.Config())
    model = strategy.prepare_model(source)
    name = "model.language_model.norm.weight"
    whole = {name: torch.full_like(model.get_parameter(name), 0.5)}
    facts = {"strategy": "own", "options": {}, "distribution": "own 1.0"}
    result = tmp_path / "model"
    export.save_result(strategy, model, source, whole, result, min_pixels=3136, max_pixels=10**6, facts=facts)
    assert open_checkpoint(str(result)).is_adapter, "a second stage merges it first"
    export.merge(result, tmp_path / "merged")
    merged = load_hf(tmp_path / "merged", "cpu")
    assert bool((merged.get_parameter(name) == 0.5).all())
    assert not open_checkpoint(str(tmp_path / "merged")).is_adapter
