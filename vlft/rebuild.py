"""A run's model, built again from its folder: run.yaml's strategy and base, with a checkpoint's trained weights.

On one process, whatever the run used: checkpoints hold whole tensors by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlft import checkpoint as checkpoints
from vlft import export
from vlft.config import Run
from vlft.engine.base import Engine
from vlft.errors import CheckpointError
from vlft.models.load import Source, cast, source_of
from vlft.parse import load_run
from vlft.setup import base_checkpoint, data_options, prepare_strategy, result_facts
from vlft.strategy import Strategy
from vlft.tracking import RunFolder


def is_run(folder: Path) -> bool:
    return (folder / "run.yaml").is_file()


def checkpoint_of(folder: RunFolder, wanted: str) -> Path:
    """The checkpoint that a word means: `latest`, `best` (best.json), or a name such as step-000200.

    Raises:
        CheckpointError: there is none such; those that there are, are named.
    """
    there = {path.name: path for path in checkpoints.complete(folder.checkpoints)}
    name = wanted
    if wanted == "best":
        name = _best(folder.root / "best.json", there)
    elif wanted == "latest" and there:
        name = list(there)[-1]
    if name not in there:
        found = f"it has {', '.join(there)}" if there else "it has none"
        raise CheckpointError(f"{folder.checkpoints} has no complete checkpoint '{name}' ({found}); give one of them.")
    return there[name]


def _best(path: Path, there: dict[str, Path]) -> str:
    advice = f"give one of {', '.join(['latest', *there])}"
    try:
        step = int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: the run kept no best checkpoint; {advice}.") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}.") from error
    return f"step-{step:06d}"


@dataclass(frozen=True)
class Rebuilt:
    run: Run
    engine: Engine
    folder: RunFolder
    source: Source
    strategy: Strategy
    model: nn.Module
    """What the strategy prepared, with the checkpoint's weights: masters in fp32, the rest in the compute dtype."""
    state: dict[str, Any]
    """Of the checkpoint: state.json."""

    @property
    def limits(self) -> dict[str, int]:
        """Smallest and largest picture of the training, in pixels."""
        options = data_options(self.run, self.engine, self.source.checkpoint, int(self.state["global_batch"]))
        return {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}

    def save(self, folder: Path) -> None:
        """Write what the run would have written as its result after this step."""
        names = export.needed(self.strategy, self.model, self.source)
        unproved = [part for part in self.run.rates if part not in self.state["proved"]]
        facts = result_facts(self.run, self.folder, unproved, int(self.state["step"]))
        whole = self.engine.weights(self.model, names)
        export.save_result(self.strategy, self.model, self.source, whole, folder, facts=facts, **self.limits)


def rebuild(root: Path, wanted: str = "latest", *, untrained: bool = False) -> Rebuilt:
    """The model of the run in `root` after one of its checkpoints.

    Args:
        untrained: as the strategy prepared it, without the checkpoint's weights.
    Raises:
        CheckpointError: no such checkpoint, or one that is damaged or of another strategy.
        ConfigError: run.yaml cannot be read, or its options do not fit this machine.
        ModelError: the base cannot be loaded.
    """
    folder = RunFolder(root)
    path = checkpoint_of(folder, wanted)
    state = checkpoints.read_state(path)
    run = load_run(root / "run.yaml")
    gpu = torch.cuda.is_available()
    engine = Engine("no" if state["precision"] == "fp16" and not gpu else state["precision"], max_grad_norm=0.0)
    source = source_of(base_checkpoint(run, engine, folder, fresh=False), engine.precision, engine.device)
    strategy, model, _ = prepare_strategy(run, source)
    cast(model, source.compute_dtype)
    if not untrained:
        engine.restore_weights(model, checkpoints.load_weights(path, model))
    model.eval()
    return Rebuilt(run, engine, folder, source, strategy, model, state)
