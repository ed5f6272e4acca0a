"""What stands beside training: the small commands, their options, and how their words are read.

To add one: a class of its options, a function that runs it (which imports what is slow), and a row in `COMMANDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlft import discovery
from vlft.config import Option, options_of, output_dir_problem
from vlft.errors import ConfigError
from vlft.rivals import nearest
from vlft.words import Given, build, read_flags, sibling, split_words


class Options(BaseModel):
    """Base of a command's options: fields with descriptions, from which flags and help are made."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), coerce_numbers_to_str=True)

    def problems(self, failed: set[str]) -> list[str]:  # noqa: ARG002
        """What is wrong on the disk; options in `failed` were told already."""
        return []


@dataclass(frozen=True)
class Command:
    name: str
    summary: str
    """One line for `vlft --help`."""
    options: type[Options]
    run: Callable[[Any], None]
    first: tuple[str, ...] = ()
    """Options that are given as plain words, in this order; a list takes all that are left."""

    @property
    def usage(self) -> str:
        known = options_of(self.options)
        words = [name.upper() + (" ..." if known[name].is_list else "") for name in self.first]
        needed = [f"--{o.name} {o.name.upper()}" for o in known.values() if o.required and o.name not in self.first]
        optional = [] if all(o.required for o in known.values()) else ["[options]"]
        return " ".join(["vlft", self.name, *words, *needed, *optional])


def parse_command(command: Command, words: Sequence[str]) -> Any:
    """The options of a command, in the manner of `vlft.parse.parse`.

    Raises:
        ConfigError: every problem at once.
    """
    stray, flags = split_words(words)
    problems: list[str] = []
    known = options_of(command.options)
    given, broken = read_flags(flags, known, problems)
    _take_plain(command, known, stray, given, problems)
    for name in command.first:
        if known[name].required and name not in given and name not in broken:
            broken.add(name)
            problems.append(f"{name.upper()} is missing; give {known[name].values} ({known[name].text.rstrip('.')}).")
    problems += [
        f"{one.place} is not an option of {command.name}{nearest(name, known)}; see 'vlft {command.name} --help'."
        for name, one in given.items()
        if name not in known and name not in broken
    ]
    given = {name: one for name, one in given.items() if one.value is not None}
    config, failed = build(command.options, given, problems, broken, missing=True)
    if config:
        problems += config.problems(failed)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _take_plain(
    command: Command, known: dict[str, Option], stray: list[str], given: dict[str, Given], problems: list[str]
) -> None:
    left = list(stray)
    for name in command.first:
        if left and known[name].is_list:
            given[name], left = Given(left, name.upper(), flag=True), []
        elif left:
            given[name] = Given(left.pop(0), name.upper(), flag=True)
    takes = " and ".join(name.upper() for name in command.first) or "no words without a --name"
    problems += [f"'{word}' is one word too many; {command.name} takes {takes}." for word in left]


def no_model(path: Path, place: str) -> list[str]:
    """The problem with a folder that should hold a model, if there is one."""
    if path.is_dir():
        return []
    return [f"{place} {path}: there is no such folder{sibling(path)}; give output_dir/model of a run."]


# ---------------------------------------------------------------------------------------------------------------------
# The commands


class PluginsOptions(Options):
    """`vlft plugins` takes none."""


def _plugins(_: PluginsOptions) -> None:
    print(plugins_table())


def plugins_table() -> str:
    """`vlft plugins`: group, name, state, distribution, and what it is or what is wrong with it."""
    rows = [("kind", "name", "state", "distribution", "")]
    rows += [
        (one.group.removeprefix("vlft."), one.found.name, one.state, one.found.source, one.detail)
        for one in discovery.inspect()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows)


class MergeOptions(Options):
    model: Path = Field(description="Result of a run: output_dir/model.")
    output_dir: Path = Field(description="Folder for the merged model; must be empty.")
    base: Literal["trained", "original"] = Field(
        "trained",
        description="Weights to merge onto: those trained with (a 4-bit base: dequantised), or the original ones.",
    )

    def problems(self, failed: set[str]) -> list[str]:
        found = no_model(self.model, "MODEL") if "model" not in failed else []
        if "output_dir" not in failed and output_dir_problem(self.output_dir, None):
            found.append(f"--output_dir {self.output_dir} is not an empty folder; give a new one.")
        return found


def _merge(options: MergeOptions) -> None:
    from vlft import export

    print(export.merge(options.model, options.output_dir, options.base))


COMMANDS = {
    command.name: command
    for command in (
        Command("merge", "adapters into a whole model", MergeOptions, _merge, ("model",)),
        Command("plugins", "strategies and metrics, and whether they work", PluginsOptions, _plugins),
    )
}
