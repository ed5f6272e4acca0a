"""The registry: which data sets exist, where they lie, how they are mixed. One JSON file, every problem at once. No
torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vlft.data.formats import FORMATS
from vlft.errors import ConfigError

# What other tools call the same key (formats.md, table 3b and row 3): answered with ours, never taken over in silence.
_RIVALS = {
    "file_name": "json_path",
    "annotation_path": "json_path",
    "data_path": "json_path",
    "path": "json_path",
    "media_dir": "image_root",
    "image_folder": "image_root",
    "image_dir": "image_root",
    "formatting": "format",
    "sample_ratio": "weight",
    "num_samples": "max_samples",
    "image_max_pixels": "max_pixels",
}
# LLaMA-Factory's dataset_info.json: the standard names that `columns` and `tags` may map.
COLUMNS = ("messages", "images", "videos", "system", "prompt", "query", "response", "history")
TAGS = (
    "role_tag",
    "content_tag",
    "user_tag",
    "assistant_tag",
    "system_tag",
    "observation_tag",
    "function_tag",
)


class DatasetSpec(BaseModel):
    """One data set of the registry, its paths absolute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    json_path: Path = Field(description="JSON list, JSONL, Parquet file or Hugging Face `datasets` folder")
    image_root: Path | None = Field(
        None,
        description="folder that relative picture paths start from and may not leave; default: the folder of json_path",
    )
    format: str = Field("auto", description="record format; 'auto' chooses one for each record and names it")
    split: Literal["train", "eval"] | None = Field(None, description="the whole set is on this side")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="passes per epoch")
    max_samples: int | None = Field(None, ge=1, description="samples; chosen by a hash, the same ones in every run")
    system: str | None = Field(None, description="system prompt of records that have none of their own")
    columns: dict[str, str] = Field(default_factory=dict, description="standard name -> the file's name")
    tags: dict[str, str] = Field(default_factory=dict, description="LLaMA-Factory's role and content tags")
    max_pixels: int | None = Field(None, ge=1, description="pixels of a resized picture; overrides --max_pixels here")
    box_format: Literal["pixels", "norm1000", "model"] | None = Field(None, description="what the coordinates mean")
    allowed_roots: tuple[Path, ...] = Field((), description="absolute paths and links are followed only into these")
    dataset_class: str | None = Field(None, description="accepted from older registries, not used")
    notes: list[str] = Field(default_factory=list, description="remarks to show once at start-up")

    @property
    def root(self) -> Path:
        """The folder that relative picture paths start from."""
        return self.image_root if self.image_root is not None else self.json_path.parent

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value != "auto" and value not in FORMATS:
            raise ValueError(
                f"'{value}' is no record format{_nearest(value, FORMATS)}; known: auto, {', '.join(FORMATS)}"
            )
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        return _known_keys(value, COLUMNS, "column")

    @field_validator("tags")
    @classmethod
    def _known_tags(cls, value: dict[str, str]) -> dict[str, str]:
        return _known_keys(value, TAGS, "tag")


KEYS = tuple(k for k in DatasetSpec.model_fields if k not in ("name", "notes"))


def _known_keys(value: dict[str, str], known: Sequence[str], what: str) -> dict[str, str]:
    for key in value:
        if key not in known:
            raise ValueError(f"'{key}' is no {what}{_nearest(key, known)}; known: {', '.join(known)}")
    return value


def _nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing if no choice is near."""
    from rapidfuzz import fuzz, process

    found = process.extractOne(word, list(choices), scorer=fuzz.ratio, score_cutoff=60)
    return f", did you mean '{found[0]}'?" if found else ""


def read_registry(path: Path, names: Sequence[str] | None = None) -> list[DatasetSpec]:
    """Read the data sets called `names` (default: all, in the file's order) from the registry at `path`.

    Raises:
        ConfigError: all problems at once: no such file, not JSON, unknown names and keys (with the nearest ones),
        values
            out of range, files that do not exist.
    """
    path = Path(path)
    entries = _read_entries(path)
    wanted = list(entries) if names is None or not list(names) else list(dict.fromkeys(names))
    problems: list[str] = []
    specs: list[DatasetSpec] = []
    for name in wanted:
        if name not in entries:
            near = _nearest(name, list(entries))
            problems.append(f"{path}: there is no data set '{name}'{near or '.'} It has: {', '.join(entries)}.")
            continue
        if "/" in name or name.startswith(".") or ":" in name:
            # It names a file of predictions, and stands before the colon of --eval_dataset_scripts.
            problems.append(f"{path}: data set '{name}': a name has no '/' or ':' and no dot at its start; rename it.")
            continue
        spec, found = _read_spec(name, entries[name], path)
        problems += found
        if spec is not None:
            specs.append(spec)
    if problems:
        raise ConfigError(problems)
    return specs


class _TwiceError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json itself keeps the last of two equal keys and loses a data set in silence."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise _TwiceError(key)
        out[key] = value
    return out


def _read_entries(path: Path) -> Mapping[str, Any]:
    try:
        registry = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
        json.dumps(registry, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise ConfigError(
            f"--dataset_config_path: there is no file {path.absolute()}; write the registry there."
        ) from None
    except UnicodeEncodeError:
        raise ConfigError(f"{path}: a text holds half of a surrogate pair, which is no character; repair it.") from None
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply; see docs/data.md.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset_config_path: {path} cannot be read: {error}.") from error
    except _TwiceError as error:
        raise ConfigError(f"{path} has the key '{error}' twice in one object; rename or remove one.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}.") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise ConfigError(f"{path}: a value cannot be read: {error}.") from None
    datasets = registry.get("datasets") if isinstance(registry, dict) else None
    if not isinstance(datasets, dict) or not datasets:
        raise ConfigError(
            f'{path}: expected {{"datasets": {{"<name>": {{"json_path": ...}}}}}} with at least one data set.'
        )
    if extra := [key for key in registry if key != "datasets"]:
        raise ConfigError(f"{path}: unknown key {', '.join(map(repr, extra))} beside 'datasets'; remove it.")
    return datasets


def _read_spec(name: str, entry: Any, path: Path) -> tuple[DatasetSpec | None, list[str]]:
    """The spec of one entry, or None, and what is wrong with it."""
    where = f"{path}: data set '{name}'"
    if not isinstance(entry, dict):
        return None, [f"{where}: expected an object with the key 'json_path', found {type(entry).__name__}."]
    problems = []
    for key in entry:
        if key not in KEYS:
            hint = f", did you mean '{_RIVALS[key]}'?" if key in _RIVALS else _nearest(key, KEYS)
            problems.append(f"{where}: unknown key '{key}'{hint or ';'} Known keys: {', '.join(KEYS)}.")
    known = {key: value for key, value in entry.items() if key in KEYS}
    known = _absolute(known, path.absolute().parent)
    problems += [f"{where}, key '{key}': {target} does not exist; check the path." for key, target in _missing(known)]
    notes = []
    if "dataset_class" in known:
        notes.append(f"{name}: 'dataset_class' is accepted but not used; the record format is found from the records.")
    try:
        spec = DatasetSpec(name=name, notes=notes, **known)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(map(str, item["loc"])) or "value"
            text = item["msg"].removeprefix("Value error, ")
            problems.append(f"{where}, key '{key}': {text}.")
        return None, problems
    except TypeError as error:
        return None, [*problems, f"{where}: {error}."]
    return (None if problems else spec), problems


def _absolute(entry: dict[str, Any], base: Path) -> dict[str, Any]:
    """Paths of an entry made absolute; values of other types are left for pydantic to refuse."""
    out = dict(entry)
    for key in ("json_path", "image_root"):
        if isinstance(out.get(key), str):
            out[key] = base / os.path.expanduser(out[key])
    roots = out.get("allowed_roots")
    if isinstance(roots, list):
        out["allowed_roots"] = [base / os.path.expanduser(r) if isinstance(r, str) else r for r in roots]
    return out


def _missing(entry: dict[str, Any]) -> list[tuple[str, Path]]:
    # os.path rather than Path: it says no to a name that is too long, and leaves a `~name` that nobody has.
    paths = [(key, entry.get(key)) for key in ("json_path", "image_root")]
    roots = entry.get("allowed_roots")
    paths += [("allowed_roots", root) for root in (roots if isinstance(roots, list) else ())]
    return [(key, target) for key, target in paths if isinstance(target, Path) and not os.path.exists(target)]
