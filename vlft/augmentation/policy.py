"""Policies: the ops of Kornia that training pictures undergo, three that ship with vlft and any in a YAML file.

    ops:                                # in this order; those that move pictures come before those that do not
      - RandomHorizontalFlip: {p: 0.5}  # a class of kornia.augmentation and its arguments
      - RandomGrayscale
    fit: false                          # true: what would leave the picture is shrunk and moved until it is inside
    rules: {counting: null}             # over those of rules.yaml

Which ops are admitted says `ops.py`. No torch at import time: a wrong name must be told in under a second.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
import yaml

from vlft.augmentation.rules import Rule, default_rules, read_rules
from vlft.errors import ConfigError
from vlft.rivals import nearest
from vlft.words import load_yaml

if TYPE_CHECKING:
    from vlft.augmentation.ops import Op

VERSION = 1
"""Part of the digest: raise it when the same policy would change pictures otherwise by the code of this package."""
_FOLDER = Path(__file__).parent / "policies"


@dataclass(frozen=True)
class Policy:
    """What training pictures undergo. Crosses to worker processes; Kornia's modules are built in each (`module`)."""

    name: str
    geometric: tuple[Op, ...]
    photometric: tuple[Op, ...]
    rules: tuple[Rule, ...]
    fit: bool = False
    """Shrink and shift a moved picture until it is wholly inside its frame."""

    @property
    def digest(self) -> str:
        """Of all that decides what becomes of a picture: a resume must find the same."""
        rules = [(rule.name, rule.refuse, rule.words) for rule in self.rules]
        return xxhash.xxh3_128_hexdigest(repr((VERSION, self.geometric, self.photometric, rules, self.fit)).encode())


def names() -> list[str]:
    """Policies that ship with vlft, the mildest first."""
    return sorted((path.stem for path in _FOLDER.glob("*.yaml")), key=["photometric", "geometric", "document"].index)


def problem_of(value: str) -> str:
    """What is wrong with a policy's name or file as far as can be seen without Kornia; empty when nothing is."""
    if value in names() or os.path.isfile(value):  # not Path: it raises at a name that is too long
        return ""
    return (
        f"there is no such policy or file{nearest(value, names())}; give one of {', '.join(names())}, or a YAML "
        "file of Kornia's ops."
    )


def read_policy(value: str) -> Policy:
    """The policy of this name, or of this file; every op is built and tried once.

    Raises:
        ConfigError: every problem at once.
    """
    # Kornia brings torch: a wrong name of a policy must be told without.
    from vlft.augmentation.ops import read_op

    if problem := problem_of(value):
        raise ConfigError(f"--augmentation {value}: {problem}")
    path = _FOLDER / f"{value}.yaml" if value in names() else Path(value)
    raw = _load(path)
    problems: list[str] = []
    problems += [
        f"{path}: unknown key '{key}'{nearest(str(key), ['ops', 'fit', 'rules'])}; use ops, fit and rules."
        for key in raw.keys() - {"ops", "fit", "rules"}
    ]
    fit = raw.get("fit", False)
    if not isinstance(fit, bool):
        problems.append(f"{path}, key 'fit': found {fit!r}; give true or false.")
    rules = read_rules(raw.get("rules", {}), default_rules(), f"{path}, rules", problems)
    listed = raw.get("ops")
    if not isinstance(listed, list) or not listed:
        problems.append(f"{path}: 'ops' is no list of ops; write one '- Name: {{argument: value}}' a line.")
        listed = []
    found: dict[str, list[Op]] = {"geometric": [], "photometric": []}
    for number, entry in enumerate(listed, 1):
        kind, op, wrong = read_op(entry)
        problems += [f"{path}, op {number}{f' ({op.name})' if op else ''}: {one}." for one in wrong]
        if op and not wrong:
            found[kind].append(op)
    if problems:
        raise ConfigError(problems)
    return Policy(path.stem, tuple(found["geometric"]), tuple(found["photometric"]), tuple(rules.values()), fit)


def _load(path: Path) -> dict[Any, Any]:
    try:
        raw = load_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--augmentation {path} cannot be read: {error}; give a YAML file.") from error
    except (yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"--augmentation {path} is not valid YAML: {said}; correct it.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"--augmentation {path} holds no mapping; write 'ops:' and a list of Kornia's ops.")
    return raw
