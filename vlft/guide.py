"""The tables of docs/tuning-guide.md and docs/tuning-guide.zh.md, made from the fields of the options.

The pages hold prose and, between `<!-- table: NAME -->` and `<!-- /table -->`, these tables. Chinese comes from
docs/options.zh.yaml, which maps every English text to its Chinese one, so that a text that changes is noticed.
`python -c "import vlft.guide; vlft.guide.write()"` writes the tables of both pages again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vlft import discovery
from vlft.commands import COMMANDS
from vlft.config import GROUPS, RATE_PARTS, Option, RunConfig, options_of
from vlft.parse import short_rate
from vlft.strategy import Strategy

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"en": DOCS / "tuning-guide.md", "zh": DOCS / "tuning-guide.zh.md"}
CHINESE = DOCS / "options.zh.yaml"
_TABLE = re.compile(r"<!-- table: ([\w ]+) -->\n.*?<!-- /table -->", re.DOTALL)


@dataclass
class Words:
    """Says the tables' texts in the language of a page; without a dictionary in English."""

    dictionary: Mapping[str, str] | None = None
    missing: list[str] = field(default_factory=list)
    """Texts that the dictionary does not have, each with the place that it stands in."""
    used: set[str] = field(default_factory=set)

    def __call__(self, text: str, place: str) -> str:
        if self.dictionary is None:
            return text
        self.used.add(text)
        if text not in self.dictionary:
            self.missing.append(f"{place}: {text!r}")
        return self.dictionary.get(text, text)

    def default(self, option: Option, place: str) -> str:
        """Numbers, names and paths are the same in every language, but for a word that the dictionary has."""
        name = " " not in option.default and option.default not in (self.dictionary or ())
        listed = set(option.default.split()) <= {*option.choices}
        return option.default if name or listed else self(option.default, place)

    def values(self, option: Option, place: str) -> str:
        if self.dictionary is None:
            return option.values
        if option.choices:
            many = "one or more of" if option.is_list else "one of"
            return self(many, place) + ", ".join(option.choices)
        limits = []
        for limit in filter(None, option.limits.split(" and ")):
            word, _, number = limit.rpartition(" ")
            limits.append(f"{self(word, place)} {number}")
        return ", ".join([self(option.kind, place), *limits])


def words(language: str) -> Words:
    return Words(yaml.safe_load(CHINESE.read_text(encoding="utf-8")) if language == "zh" else None)


def with_tables(page: str, say: Words) -> str:
    """The page with every table between markers made anew."""
    found = tables(say)

    def made(match: re.Match[str]) -> str:
        if match[1] not in found:
            raise ValueError(f"there is no table '{match[1]}'; there are: {', '.join(found)}")
        return f"<!-- table: {match[1]} -->\n\n{found[match[1]]}\n\n<!-- /table -->"

    return _TABLE.sub(made, page)


def write() -> None:
    for language, path in PAGES.items():
        path.write_text(with_tables(path.read_text(encoding="utf-8"), words(language)), encoding="utf-8")


def named_tables(page: str) -> list[str]:
    return [match[1] for match in _TABLE.finditer(page)]


def tables(say: Words) -> dict[str, str]:
    """Every table that both pages must have, by name: one for each group of options, and the four below."""
    core = options_of(RunConfig)
    found = {
        group: _table(
            say,
            ("option", "meaning and unit", "values", "default"),
            [_row(one, say, f"--{one.name}") for one in core.values() if one.group == group],
        )
        for group in GROUPS
    }
    own = built_in()
    return found | {
        "strategies": _strategies(say, own),
        "default rates": _rates(say, own),
        "commands": _commands(say),
        "command options": _command_options(say, core),
    }


def built_in() -> dict[str, type[Strategy]]:
    """The strategies that come with vlft."""
    strategies = discovery.find(discovery.STRATEGIES).items()
    return {name: discovery.load_strategy(name)[0] for name, found in strategies if found.distribution == "vlft"}


def _strategies(say: Words, own: Mapping[str, type[Strategy]]) -> str:
    """Options that are the same in several strategies share a row."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for name, cls in own.items():
        for option in options_of(cls.Config, "strategy").values():
            row = _row(option, say, f"--{option.name} of {name}")
            merged.setdefault(row, []).append(name)
    rows = sorted(merged.items(), key=lambda item: item[0][0])
    header = ("option", "strategies", "meaning and unit", "values", "default")
    return _table(say, header, [(row[0], _code(names), *row[1:]) for row, names in rows])


def _rates(say: Words, own: Mapping[str, type[Strategy]]) -> str:
    rows = []
    for name, cls in own.items():
        config = cls.Config()
        rates, ranges = config.rates(), config.recommended()
        cells = [
            f"{short_rate(rates[part])} ({' – '.join(map(short_rate, ranges[part]))})"
            if part in rates
            else say("frozen", f"the rates of {name}")
            for part in RATE_PARTS
        ]
        rows.append((_code([name]), *cells))
    return _table(say, ("strategy", *(f"`--learning_rate_{part}`" for part in RATE_PARTS)), rows)


def _commands(say: Words) -> str:
    rows = [
        (f"`{command.usage}`", say(command.summary, f"the summary of vlft {name}"))
        for name, command in COMMANDS.items()
    ]
    return _table(say, ("command", "what it does"), rows)


def _command_options(say: Words, core: Mapping[str, Option]) -> str:
    """What a command takes that training does not, or takes in another sense."""
    rows = []
    for name, command in COMMANDS.items():
        for one in options_of(command.options).values():
            same = core.get(one.name)
            if same and (same.text, same.values, same.default) == (one.text, one.values, one.default):
                continue
            _, *cells = _row(one, say, f"--{one.name} of vlft {name}")
            plain = one.name.upper() if one.name in command.first else f"--{one.name}"
            rows.append((_code([f"vlft {name}"]), _code([plain]), *cells))
    return _table(say, ("command", "option", "meaning and unit", "values", "default"), rows)


def _row(option: Option, say: Words, place: str) -> tuple[str, ...]:
    return (
        _code([f"--{option.name}"]),
        say(option.text, place),
        say.values(option, place),
        say.default(option, place),
    )


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(say: Words, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    said = [name if name.startswith("`") else say(name, "the head of a table") for name in header]
    lines = [said, ["---"] * len(said), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
