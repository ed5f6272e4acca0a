"""Checkpoints that do not depend on the layout: named full tensors, written atomically, checked when read.

    checkpoints/step-000200/
        weights.safetensors     every trained parameter, by name
        optimizer.safetensors   "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"
        state.json              step, global batch, options, and size + checksum of the files above

A save is written beside and renamed into place, so a kill at any moment leaves the previous one whole. state.json is
written last: a folder without it is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlft.errors import CheckpointError

SCHEMA = 1
_STATE = ("step", "global_batch", "options", "bad", "scaler")
"""What a resume reads from state.json."""


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(root: Path, step: int, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write one checkpoint; call on one process.

    Args:
        tensors: file stem -> named tensors.
        state: JSON-able; `step`, `schema` and the files' checksums are added.
    Raises:
        CheckpointError: it could not be written; the previous checkpoints are as they were.
    """
    target, beside = step_folder(root, step), root / f".writing-step-{step:06d}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        files: dict[str, dict[str, Any]] = {}
        for stem, named in tensors.items():
            path = beside / f"{stem}.safetensors"
            save_file(named, path)
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}
        whole = {"schema": SCHEMA, "step": step, **state, "files": files}
        (beside / "state.json").write_text(json.dumps(whole, indent=1))
        _sync(beside / "state.json")
        _sync(beside)
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {root}: {error}; "
            "free some space and go on with --resume_from_checkpoint latest."
        ) from error
    return target


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in root.glob("step-*/state.json"))


def keep_newest(root: Path, limit: int) -> None:
    """Delete all but the newest `limit` complete checkpoints, and what interrupted saves left behind."""
    for old in complete(root)[:-limit]:
        # state.json first: a half-deleted folder must not look complete.
        (old / "state.json").unlink()
        shutil.rmtree(old)
    for left in (*root.glob(".writing-*"), *(p for p in root.glob("step-*") if not (p / "state.json").exists())):
        shutil.rmtree(left, ignore_errors=True)


def find(wanted: str | None, root: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: None for none, or `latest` where there is none yet.

    Raises:
        CheckpointError: the path is not a complete checkpoint.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        found = complete(root)
        return found[-1] if found else None
    path = Path(wanted)
    if not (path / "state.json").exists():
        others = ", ".join(str(p) for p in complete(root)) or "none"
        raise CheckpointError(
            f"{path} is not a complete checkpoint (no state.json); complete ones in this run: {others}; "
            "give one of them."
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """state.json, after checking that every file is there, whole and unaltered.

    Raises:
        CheckpointError: names the file that is not, and the checkpoint before it.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        files = {name: (facts["bytes"], facts["xxh3_128"]) for name, facts in state["files"].items()}
        if missing := [key for key in _STATE if key not in state]:
            raise ValueError(f"there is no {', '.join(missing)} in it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be read ({error}).{_offer(path)}") from error
    for name, (size, checksum) in files.items():
        file = path / name
        if not file.exists() or file.stat().st_size != size or _checksum(file) != checksum:
            raise CheckpointError(f"{file} is missing, truncated or altered.{_offer(path)}")
    return dict(state)


def _offer(path: Path) -> str:
    before = [p for p in complete(path.parent) if p.name < path.name]
    return (
        f" Give the checkpoint before it: --resume_from_checkpoint {before[-1]}."
        if before
        else " There is none before it: start again in a new --output_dir."
    )


def load_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    return load_file(path / f"{stem}.safetensors")


def load_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The saved weights of exactly the parameters that train in `model`.

    Raises:
        CheckpointError: names or shapes differ: another strategy, other options or another model.
    """
    saved = load_tensors(path, "weights")
    now = {n: p for n, p in model.named_parameters() if p.requires_grad}
    odd = sorted(set(now) ^ set(saved)) or sorted(n for n, p in now.items() if _shape(p) != saved[n].shape)
    if odd:
        raise CheckpointError(f"{path} holds other trained parameters than this run: {', '.join(odd[:4])} ... differ.")
    return saved


def _shape(p: nn.Parameter) -> tuple[int, ...]:
    """ZeRO-3 keeps a cut-up weight's real shape beside it."""
    return tuple(getattr(p, "ds_shape", p.shape))
