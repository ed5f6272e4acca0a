"""The model's folder: is everything there, whole, and of one piece? No weight is loaded, none is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.data.tokens import Chat
from vlft.doctor.findings import Finding, Grade
from vlft.errors import ModelError
from vlft.models.load import Checkpoint, check_files, open_checkpoint, read_json, resolve_folder

_LFS = b"version https://git-lfs.github.com"
_EXAMPLES = 3


@dataclass(frozen=True)
class Examined:
    checkpoint: Checkpoint
    base: Path
    """Where the weights are: the folder itself, or that of the model that an adapter was trained on."""
    chat: Chat | None
    weights: int
    """Bytes of all weights, as far as is known."""


def _find(grade: Grade, check: str, text: str, examples: tuple[str, ...] = ()) -> Finding:
    return Finding(grade, "model", check, text, examples=examples)


def examine(
    name: str, *, trust_remote_code: bool, weights: bool, max_seq_length: int
) -> tuple[Examined | None, list[Finding]]:
    """Look at the folder, or at what the hub says of a model.

    Args:
        weights: also look at the files of the weights.
        max_seq_length: tokens of the run's longest sample.
    Returns:
        None where nothing can be said of the data without another model.
    """
    try:
        checkpoint = open_checkpoint(name, trust_remote_code=trust_remote_code, weights=False)
        base = checkpoint.folder
        if checkpoint.adapter:
            base = resolve_folder(str(checkpoint.adapter["base_model_name_or_path"]), weights=False)
        config = read_json(base / "config.json")
    except ModelError as error:
        return None, [_find("error", "checkpoint", str(error))]
    found = list(check_limits(config, max_seq_length))
    chat = None
    try:
        chat = Chat.load(checkpoint.folder, checkpoint.family)
        found += check_tokenizer(config, chat, checkpoint.folder)
    except ModelError as error:
        found.append(_find("error", "tokenizer", str(error)))
    if checkpoint.adapter:
        text = f"{name} is an adapter; it is merged into {base} first, and the run is a second stage: nothing to do."
        found.append(_find("note", "adapter", text))
    size = weights_size(base)
    if weights:
        found += check_weights(base, fetched=not Path(name).is_dir() and not any(base.glob("*.safetensors")), size=size)
    return Examined(checkpoint, base, chat, size), found


def weights_size(folder: Path) -> int:
    """Bytes of the weights: what the index says, or the files that are there; 0 where neither is."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            total = (read_json(index).get("metadata") or {}).get("total_size")
        except ModelError:
            continue
        if isinstance(total, int | float):
            return int(total)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())


def check_weights(folder: Path, *, fetched: bool, size: int) -> Iterator[Finding]:
    """Every file that the index names is there, whole, and holds the tensors that it should.

    Args:
        fetched: the weights come from the hub when training starts.
        size: bytes, for the sentence about that.
    """
    if fetched:
        much = f"{size / 2**30:.1f} GiB of weights" if size else "the weights"
        text = f"{much} are fetched from the hub when training starts; 'hf download' beforehand saves the wait."
        yield _find("note", "weights_remote", text)
        return
    try:
        check_files(folder)
        wanted = _tensors(folder)
    except ModelError as error:
        yield _find("error", "weights", str(error))
        return
    absent = sorted(name for name in wanted if not (folder / name).is_file())
    if absent:
        text = f"{folder} lacks {len(absent)} of the {len(wanted)} files that its index names; copy them again."
        yield _find("error", "weights_absent", text, tuple(absent[:_EXAMPLES]))
    for name in sorted(wanted.keys() - set(absent)):
        if problem := _file_problem(folder / name, wanted[name]):
            yield _find("error", "weights_broken", f"{folder / name} {problem}; copy it again.")


def _tensors(folder: Path) -> dict[str, set[str]]:
    """File -> names of the tensors that the index puts there; empty names where there is no index."""
    wanted: dict[str, set[str]] = {}
    for index in sorted(folder.glob("*.safetensors.index.json")):
        places = read_json(index).get("weight_map")
        for tensor, name in (places if isinstance(places, dict) else {}).items():
            wanted.setdefault(str(name), set()).add(str(tensor))
    return wanted or {path.name: set() for path in sorted(folder.glob("*.safetensors"))}


def _file_problem(path: Path, tensors: set[str]) -> str:
    """What is wrong with one file of weights: its header against its length, and against the index."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return "is a Git LFS pointer and no weights ('git lfs pull' fetches them)"
    try:
        with safe_open(path, "np") as opened:
            there = set(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        return f"is damaged or cut short ({str(error).rstrip('.')})"
    missing = sorted(tensors - there)
    return f"has no tensor {missing[0]}, which the index puts there" if missing else ""


def check_tokenizer(config: dict[str, Any], chat: Chat, folder: Path) -> Iterator[Finding]:
    """Tokenizer and config.json belong to one model."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    size = config.get("vocab_size") or (text or {}).get("vocab_size")
    known = len(chat.tokenizer)
    if isinstance(size, int) and known > size:
        yield _find(
            "error", "vocabulary",
            f"the tokenizer of {folder} has {known} tokens, the model embeds {size}; copy the tokenizer files that "
            "belong to this checkpoint.",
        )  # fmt: skip
    token = config.get("image_token_id")
    if isinstance(token, int) and token != chat.image_token_id:
        yield _find(
            "error", "image_token",
            f"config.json of {folder} calls token {token} a picture, the tokenizer {chat.image_token_id}; copy the "
            "tokenizer files that belong to this checkpoint.",
        )  # fmt: skip


def check_limits(config: dict[str, Any], max_seq_length: int) -> Iterator[Finding]:
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    longest = (text or {}).get("max_position_embeddings") or config.get("max_position_embeddings")
    if isinstance(longest, int) and max_seq_length > longest:
        yield _find(
            "warning", "positions",
            f"--max_seq_length {max_seq_length} is more than the {longest} positions that the model was trained with; "
            "lower it.",
        )  # fmt: skip
