"""Checkpoints that do not depend on the layout: named whole tensors, written atomically, checked when read.

    checkpoints/step-000200/
        weights-000-00.safetensors     every trained parameter, by name
        optimizer-000-00.safetensors   "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"
        state.json                     step, global batch, options, and size + checksum of the files above

Every rank writes a share (the numbers are its rank and its file), so that a large model is neither in one process's
memory nor waits for one process's disk. A save is written beside and renamed into place, so a kill at any moment leaves
the previous one whole. state.json is written last: a folder without it is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlft.errors import CheckpointError

SCHEMA = 1
_STATE = ("step", "global_batch", "options", "bad", "scaler", "skipped", "budget", "proved", "data", "precision")
"""What a resume reads from state.json."""
FILE_BYTES = 1 << 30
"""A rank starts another file beyond this size. It holds about two in memory, one that is written and one that is read,
and the tensor that comes next; a tensor may be larger."""
Facts = dict[str, Any]
"""`bytes` and `xxh3_128` of a file."""


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def checksum(path: Path) -> str:
    """Of a file's content."""
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


def _beside(root: Path, step: int) -> Path:
    return root / f".writing-step-{step:06d}"


def _unwritten(root: Path, step: int, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {root}: {error}; earlier ones are as they were, "
        "free some space and go on with --resume_from_checkpoint latest."
    )


def begin(root: Path, step: int) -> None:
    """Make an empty folder for the ranks' files; call on one process, before `write`.

    Raises:
        CheckpointError: it could not be made.
    """
    try:
        shutil.rmtree(_beside(root, step), ignore_errors=True)
        _beside(root, step).mkdir(parents=True)
    except OSError as error:
        raise _unwritten(root, step, error) from error


def _write_file(path: Path, tensors: dict[str, Tensor]) -> tuple[str, Facts]:
    save_file(tensors, path)
    _sync(path)
    return path.name, {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}


def write(root: Path, step: int, rank: int, tensors: Iterable[tuple[str, str, Tensor]]) -> dict[str, Facts]:
    """Write this rank's share; call on every process.

    Args:
        tensors: (file stem, name, whole tensor on the CPU). Always read to its end: reading may be collective.
    Returns:
        File name -> size and checksum.
    Raises:
        CheckpointError: it could not be written.
    """
    beside = _beside(root, step)
    files: dict[str, Facts] = {}
    held: dict[str, Tensor] = {}
    writing: list[Future[tuple[str, Facts]]] = []
    failed: Exception | None = None
    last = ""

    def settle() -> None:
        nonlocal failed
        while writing:
            try:
                name, facts = writing.pop().result()
                files[name] = facts
            except Exception as error:  # whatever it was, the other ranks still read with this one
                failed = error

    def flush(pool: Executor) -> None:
        nonlocal held
        settle()
        if held and not failed:
            path = beside / f"{last}-{rank:03d}-{sum(name.startswith(last) for name in files):02d}.safetensors"
            writing.append(pool.submit(_write_file, path, held))
        held = {}

    # The next tensors are read, and other ranks wait for that, while the disk takes a file.
    with ThreadPoolExecutor(1) as pool:
        for stem, name, tensor in tensors:
            if held and (stem != last or sum(t.nbytes for t in held.values()) + tensor.nbytes > FILE_BYTES):
                flush(pool)
            last = stem
            if not failed:
                held[name] = tensor
        flush(pool)
        settle()
    if failed:
        # A disk that is full needs the space; other ranks remove theirs.
        for path in beside.glob(f"*-{rank:03d}-*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            beside.rmdir()
        raise _unwritten(root, step, failed) from failed
    return files


def finish(
    root: Path, step: int, files: Mapping[str, Facts], state: Mapping[str, Any], keep: int, best: int = 0
) -> Path:
    """Put what all ranks wrote in its place and delete old checkpoints; call on one process, after `write` on all.

    Args:
        files: of all ranks.
        state: JSON-able; `step`, `schema` and `files` are added.
        keep: complete checkpoints to keep, this one included.
        best: step of a checkpoint that is kept beside them; 0 for none.
    Raises:
        CheckpointError: it could not be written; the previous checkpoints are as they were.
    """
    target, beside = step_folder(root, step), _beside(root, step)
    if away := sorted(name for name in files if not (beside / name).exists()):
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"{away[0]} of the checkpoint of step {step} is not in {beside}, though another machine wrote it; give an "
            "--output_dir that all machines share."
        )
    try:
        whole = {"schema": SCHEMA, "step": step, **state, "files": files}
        (beside / "state.json").write_text(json.dumps(whole, indent=1))
        _sync(beside / "state.json")
        _sync(beside)
        if target.exists():  # of a course that was left; a kill in between must not leave neither
            set_aside(complete(root), step - 1)
        if target.exists():  # half deleted: a kill came between
            shutil.rmtree(target)
        beside.rename(target)
        _sync(root)
        keep_newest(root, keep, best)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise _unwritten(root, step, error) from error
    return target


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path.parent for path in root.glob("step-*/state.json"))
    return sorted((folder for folder in found if _NAME.fullmatch(folder.name)), key=step_of)


_NAME = re.compile(r"step-\d+")
"""Others are somebody's copies."""


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder, also of one that was set aside (`left-1-step-...`).

    Names alone do not sort: a step of seven digits would come before one of six.
    """
    return int(folder.name.rpartition("-")[2])


def set_aside(folders: Iterable[Path], step: int) -> list[Path]:
    """Rename folders of steps after `step`, which a run that goes on from there would otherwise mix with its own."""
    moved = []
    for later in folders:
        if step_of(later) > step:
            for n in itertools.count(1):
                target = later.with_name(f"left-{n}-{later.name}")
                if not target.exists():
                    break
            moved.append(later.rename(target))
    return moved


def _delete(folder: Path) -> None:
    # state.json first: a half-deleted folder must not look complete.
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def keep_newest(root: Path, limit: int, best: int = 0) -> None:
    """Delete all but the newest `limit` complete checkpoints and the best, and what interrupted saves left behind."""
    for old in complete(root)[:-limit]:
        if old != step_folder(root, best):
            _delete(old)
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
    if path.parent.resolve() != root.resolve() and complete(root):
        raise CheckpointError(
            f"{path} is of another run than {root.parent}, which has checkpoints of its own; give the --output_dir of "
            "that run, or a new one."
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
    for name, (size, expected) in files.items():
        file = path / name
        if not file.exists() or file.stat().st_size != size or checksum(file) != expected:
            raise CheckpointError(f"{file} is missing, truncated or altered.{_offer(path)}")
    return dict(state)


def _offer(path: Path) -> str:
    before = [p for p in complete(path.parent) if step_of(p) < step_of(path)]
    return (
        f" Give the checkpoint before it: --resume_from_checkpoint {before[-1]}."
        if before
        else " There is none before it: start again in a new --output_dir."
    )


class Tensors(Mapping[str, Tensor]):
    """Named tensors in files, each read when it is asked for: a large model's states are never all in memory."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: list[Any] = [safe_open(file, "pt") for file in files]
        self._where: dict[str, Any] = {n: file for file in self._files for n in file.keys()}  # noqa: SIM118 (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())


def load_tensors(path: Path, stem: str) -> Tensors:
    return Tensors(sorted(path.glob(f"{stem}*.safetensors")))


def load_weights(path: Path, model: nn.Module) -> Tensors:
    """The saved weights of exactly the parameters that train in `model`.

    Raises:
        CheckpointError: names or shapes differ: another strategy, other options or another model.
    """
    saved = load_tensors(path, "weights")
    now = {n: p for n, p in model.named_parameters() if p.requires_grad}
    odd = sorted(set(now) ^ set(saved)) or sorted(n for n, p in now.items() if _shape(p) != saved.shape(n))
    if odd:
        raise CheckpointError(f"{path} holds other trained parameters than this run: {', '.join(odd[:4])} ... differ.")
    return saved


def _shape(p: nn.Parameter) -> tuple[int, ...]:
    """ZeRO-3 keeps a cut-up weight's real shape beside it."""
    return tuple(getattr(p, "ds_shape", p.shape))
