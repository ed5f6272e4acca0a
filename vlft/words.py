"""Words and YAML -> values, and values -> a pydantic model with every problem told at once. Knows no strategy.
And a number of things -> words.

Plain code instead of argparse or pydantic-settings: both stop at the first unknown flag.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vlft import __version__
from vlft.config import SCHEMA, Option, options_of
from vlft.errors import ConfigError
from vlft.rivals import nearest, nearest_of

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Given:
    """One option as it was written."""

    value: Any
    place: str
    """`--epochs`, or `run.yaml: epochs`."""
    flag: bool


Flags = list[tuple[str, list[str]]]


def split_words(words: Iterable[str]) -> tuple[list[str], Flags]:
    """`a --b 1 2 --c=3` -> (`[a]`, `[(--b, [1, 2]), (--c, [3])]`). Needs no knowledge of the options."""
    stray: list[str] = []
    flags: Flags = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word.partition("=")
            flags.append((flag, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            stray.append(word)
    return stray, flags


def counted(n: int, what: str) -> str:
    """`1 step`, `1,200 steps`, `2 patches`."""
    ending = "" if n == 1 else "es" if what.endswith(("s", "ch")) else "s"
    return f"{n:,} {what}{ending}"


def plain_name(written: str) -> str:
    return written.removeprefix("--").replace("-", "_")


def _read_flag(flag: str, words: list[str], options: Mapping[str, Option]) -> tuple[str, Any]:
    """Name and value of one flag; the name is returned as written (plain) when no option has it.

    Raises:
        ValueError: the words do not fit the option; the text ends the sentence that begins with the flag.
    """
    name = plain_name(flag)
    positive = name.removeprefix("no_")
    if name not in options and positive != name and positive in options and options[positive].is_bool:
        if words:
            raise ValueError(f"takes no value, but {' '.join(words)!r} follows; leave that out.")
        return positive, False
    if name not in options:
        return name, words
    option = options[name]
    if "" in words:
        raise ValueError(f"has an empty value (an unset shell variable?); give {option.values}.")
    if not words and option.is_bool:
        return name, True
    if not words:
        raise ValueError(f"needs a value; give {option.values}.")
    if option.nullable and words in (["none"], ["null"]):
        return name, None
    if option.is_list:
        return name, words
    if len(words) > 1:
        raise ValueError(f"takes one value, but {' '.join(words)!r} follows; give {option.values}.")
    return name, words[0]


def read_flags(flags: Flags, options: Mapping[str, Option], problems: list[str]) -> tuple[dict[str, Given], set[str]]:
    """The options that the flags give, and the names of those that could not be read."""
    given: dict[str, Given] = {}
    broken: set[str] = set()
    for flag, words in flags:
        try:
            name, value = _read_flag(flag, words, options)
        except ValueError as error:
            name, value = plain_name(flag), None
            broken.add(name)
            problems.append(f"{flag} {error}")
        if name in given:
            problems.append(f"{flag} is given twice; leave one out.")
        given[name] = Given(value, flag, flag=True)
    return given, broken


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice: the standard one keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> Any:
    """What a YAML file of somebody's holds, plain values only.

    Raises:
        OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError: it cannot be read, is none, or is too deep.
    """
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a configuration file.

    Raises:
        ConfigError: missing (with the nearest name), unreadable, not a flat mapping, or of another schema.
    """
    try:
        data = load_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file{sibling(path)}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}; give a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}; correct it.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} holds no options; write one 'name: value' a line.")
    schema = data.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ConfigError(
            f"{path.name}: schema is {schema!r}, vlft {__version__} reads {SCHEMA}; use the vlft it is from."
        )
    return data


def read_file(flags: Flags, problems: list[str]) -> tuple[dict[str, Given], Flags, bool]:
    """The options of `--config`, the flags that are left, and whether the file could be read."""
    configs = [words for flag, words in flags if flag == "--config"]
    rest = [(flag, words) for flag, words in flags if flag != "--config"]
    if not configs:
        return {}, rest, True
    words = [word for one in configs for word in one]
    if len(words) != 1 or not words[0]:
        problems.append(
            f"--config takes one YAML file, found {' '.join(words) or 'none'}; flags override what it says."
        )
        return {}, rest, False
    path = Path(words[0]).expanduser()
    try:
        data = read_yaml(path)
    except ConfigError as error:
        problems.extend(error.problems)
        return {}, rest, False
    given: dict[str, Given] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in given:
            problems.append(f"{path.name}: {key} is written twice (a hyphen is an underscore); leave one out.")
        given[name] = Given(value, f"{path.name}: {key}", flag=False)
    return given, rest, True


def build(
    model: type[ModelT],
    given: Mapping[str, Given],
    problems: list[str],
    broken: Iterable[str] = (),
    *,
    missing: bool,
    where: str = "",
) -> tuple[ModelT | None, set[str]]:
    """Validate the part of `given` that belongs to `model`; problems are added as sentences.

    Fields that are wrong are replaced by their default (or a stand-in) for another try, so that options which
    contradict each other are reported together with those that are wrong by themselves.

    Args:
        broken: names that were reported before.
        missing: report required options that are not there.
        where: stands before a problem of several options together, for a model that does not name them itself.
    Returns:
        the model, None when there is none to be had, and the names that failed.
    """
    options = options_of(model)
    values = {name: one.value for name, one in given.items() if name in options}
    failed = set(broken)
    # pydantic takes true for 1, but `epochs: yes` is a slip.
    for name in [name for name, value in values.items() if value is True and "number" in options[name].kind]:
        failed.add(name)
        problems.append(f"{given[name].place} is '{values.pop(name)}'; give {options[name].values}.")
    context = {"places": {name: one.place for name, one in given.items()}, "failed": failed}
    for _ in ("fields", "contradictions", "what is left"):
        try:
            return model.model_validate(values, context=context), failed
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                name = str(detail["loc"][0]) if detail["loc"] else ""
                if detail["type"] == "default_factory_not_called":
                    continue
                if name not in failed and (missing or detail["type"] != "missing"):
                    problems += _sentences(name, detail, given, options, where)
                failed.add(name)
                values.pop(name, None)
                if name and options[name].required:
                    values[name] = "?"
    return None, failed


def _sentences(
    name: str, detail: Any, given: Mapping[str, Given], options: Mapping[str, Option], where: str
) -> list[str]:
    cause = (detail.get("ctx") or {}).get("error")
    if not name:
        return [f"{where}{line.rstrip('.')}." for line in str(cause or detail["msg"]).split("\n")]
    option = options[name]
    if detail["type"] == "missing":
        return [f"--{name} is missing; give {option.values} ({option.text.rstrip('.')})."]
    place, value = given[name].place, given[name].value
    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if cause is not None:
        return [f"{place} {cause}; found '{shown}'."]
    return [f"{place} is '{shown}'{nearest(shown, option.choices)}; give {option.values}."]


def sibling(path: Path, *, folder: bool = False) -> str:
    """The nearest file (or folder) that is there and differs from `path` in one name only."""
    path = path.expanduser()
    fits = os.path.isdir if folder else os.path.isfile  # Path's raise: one such folder would hide all others
    with suppress(OSError):  # a folder that may not be read
        for part in (path, *path.parents):
            if part.parent.is_dir():
                rest = path.relative_to(part)
                there = {one.name: one / rest for one in part.parent.iterdir() if fits(one / rest)}
                return nearest_of(part.name, there)
    return ""


def without_local_rank(words: Iterable[str]) -> list[str]:
    """The deepspeed launcher puts `--local_rank=N` before the options. The environment says it too: drop it."""
    kept: list[str] = []
    follows = False
    for word in words:
        name, equals, _ = word.partition("=")
        if follows and word.lstrip("-").isdigit():
            follows = False
            continue
        follows = name in ("--local_rank", "--local-rank") and not equals
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
    return kept
