"""`vlft export`: a whole model ready to serve, from a run, one of its checkpoints, a result or any model folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from vlft import export, hub
from vlft.errors import ConfigError
from vlft.rebuild import is_run, rebuild
from vlft.tracking import RunFolder


def export_model(
    model: str,
    output: Path,
    *,
    checkpoint: str | None = None,
    base: Literal["trained", "original"] = "trained",
    dtype: str | None = None,
    max_shard_size: str = export.SHARD,
    push_to_hub: str | None = None,
    private: bool = False,
) -> str:
    """Write the model to `output`, and to the hub where asked; returns what was done.

    Args:
        model: a run folder, a result (adapter or whole), any Hugging Face folder, or a hub name.
        checkpoint: of a run folder: `best`, `latest` or `step-000200`; None: the run's result.
    Raises:
        ConfigError: `checkpoint` is given and `model` is no run folder.
        CheckpointError: there is no such checkpoint.
        ModelError: the model cannot be loaded, written or pushed.
    """
    root = Path(model)
    export.check_empty(output)  # before a model is loaded
    if push_to_hub:
        hub.check(push_to_hub)
    if checkpoint is None:
        found = str(RunFolder(root).model) if is_run(root) else model
        export.serve(found, output, base, dtype, max_shard_size)
    elif not is_run(root):
        raise ConfigError(f"--checkpoint {checkpoint}: {model} is no run folder (no run.yaml); give the run's own.")
    else:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=output.absolute().parent) as beside:
            result = Path(beside) / output.name
            rebuild(root, checkpoint).save(result)
            export.serve(str(result), output, base, dtype, max_shard_size)
        found = f"{checkpoint} of {root}"
    files = len(list(output.glob("*.safetensors")))
    said = f"{found} is a whole model in {output} ({files} file{'s' if files > 1 else ''} of weights)."
    if push_to_hub:
        said += f"\npushed to {hub.push(output, push_to_hub, private=private)}."
    return said
