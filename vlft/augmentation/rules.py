"""Rules: which words of a conversation forbid which movements of its pictures. `rules.yaml` holds those that apply.

A movement is judged by what it does, not by the op that made it: two flips that undo each other mirror nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

KINDS = ("mirror", "turn", "crop", "shift", "any")
"""What a movement may be (`geometry.kinds` measures it); a rule refuses some of them."""


@dataclass(frozen=True)
class Rule:
    name: str
    refuse: tuple[str, ...]
    """Some of KINDS."""
    words: tuple[str, ...]
    """`right` (as a word), `mirror*` (its beginning), `左` (anywhere), `/[a-z]{3}/` (a regular expression)."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any of the words, whatever its case.

        Raises:
            re.error: an expression between slashes is none.
        """
        return re.compile("|".join(f"(?:{_expression(word)})" for word in self.words), re.IGNORECASE)


def _expression(word: str) -> str:
    if len(word) > 2 and word.startswith("/") and word.endswith("/"):
        re.compile(word[1:-1])
        return word[1:-1]
    stem = re.escape(word.removesuffix("*")).replace(r"\ ", r"\s+")
    if not word.isascii():
        return stem
    # Not \b: to Python a Chinese character is a letter, and 请read一下 has the word "read" in it.
    return rf"(?<![a-z]){stem}" + ("" if word.endswith("*") else "(?![a-z])")


def refused(rules: tuple[Rule, ...], text: str) -> dict[str, str]:
    """Kind of movement -> why it may not be: `sides ('left')`. Empty where the text forbids nothing."""
    found: dict[str, str] = {}
    for rule in rules:
        if match := rule.pattern.search(text):
            found |= {kind: f"{rule.name} ('{match.group()}')" for kind in rule.refuse if kind not in found}
    return found


@lru_cache(maxsize=1)
def default_rules() -> dict[str, Rule]:
    raw = yaml.safe_load((Path(__file__).parent / "rules.yaml").read_text(encoding="utf-8"))
    problems: list[str] = []
    rules = read_rules(raw, {}, "rules.yaml", problems)
    if problems:
        raise ValueError("\n".join(problems))
    return rules


def read_rules(raw: Any, known: Mapping[str, Rule], where: str, problems: list[str]) -> dict[str, Rule]:
    """`known` with a file's rules over them: one of the same name replaces, `null` switches off, a new one adds."""
    rules = dict(known)
    if not isinstance(raw, Mapping):
        problems.append(f"{where} are no mapping; write 'name: {{refuse: [...], words: [...]}}', or 'name: null'.")
        return rules
    for name, body in raw.items():
        place = f"{where}, rule '{name}'"
        if body is None:
            if rules.pop(str(name), None) is None:
                problems.append(f"{place} is not there to switch off; there is {', '.join(known)}.")
            continue
        found = [] if isinstance(body, Mapping) else ["is no mapping; write {refuse: [...], words: [...]}"]
        if isinstance(body, Mapping):
            found += [f"has no '{key}'; give a list of it" for key in ("refuse", "words") if not _words(body.get(key))]
            found += [f"has an unknown key '{key}'; use refuse and words" for key in body.keys() - {"refuse", "words"}]
            kinds = body.get("refuse") if _words(body.get("refuse")) else []
            found += [f"refuses '{kind}'; use some of {', '.join(KINDS)}" for kind in kinds or () if kind not in KINDS]
        if not found and isinstance(body, Mapping):
            rule = Rule(str(name), tuple(body["refuse"]), tuple(body["words"]))
            try:
                _ = rule.pattern
                rules[str(name)] = rule
            except re.error as error:
                found.append(f"has an expression between slashes that is none: {error}; correct it")
        problems += [f"{place} {one}." for one in found]
    return rules


def _words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) and one for one in value)
