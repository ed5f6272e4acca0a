"""Policies: the ops of Kornia that training pictures undergo, three that ship with vlft and any in a YAML file.

    ops:                                # in this order; those that move pictures come before those that do not
      - RandomHorizontalFlip: {p: 0.5}  # a class of kornia.augmentation and its arguments
      - RandomGrayscale
    fit: false                          # true: what would leave the picture is shrunk and moved until it is inside
    rules: {counting: null}             # over those of rules.yaml

Kornia's own base classes say what an op is: `IntensityAugmentationBase2D` changes values, `GeometricAugmentationBase2D`
moves the picture by a matrix that boxes can follow. Nothing else is admitted.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash
import yaml

from vlft.augmentation.rules import Rule, default_rules, read_rules
from vlft.errors import ConfigError
from vlft.rivals import nearest

Matrix: TypeAlias = npt.NDArray[np.float64]
VERSION = 1
"""Part of the digest: raise it when the same policy would change pictures otherwise by the code of this package."""
_FOLDER = Path(__file__).parent / "policies"
_NO_SIZE = "would change the picture's size, and with it the patch grid; use RandomResizedCrop or RandomAffine"
_NOT_USED = "is not used, since a picture is moved by one bilinear warp that repeats its border; leave it out"
_REFUSED = {
    "Normalize": "gives values outside 0 to 1; the picture's processor normalises, leave it out",
    "Denormalize": "gives values outside 0 to 1; the picture's processor normalises, leave it out",
    "RandomDissolving": "downloads a diffusion model; leave it out",
}
_OF_MOVEMENT = ("resample", "align_corners", "padding_mode", "fill_value", "cropping_mode")


@dataclass(frozen=True)
class Op:
    name: str
    """Class of kornia.augmentation."""
    arguments: tuple[tuple[str, Any], ...]
    """As they are given, lists as tuples."""


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
        kind, op, wrong = _read_op(entry)
        problems += [f"{path}, op {number}{f' ({op.name})' if op else ''}: {one}." for one in wrong]
        if op and not wrong:
            found[kind].append(op)
    if problems:
        raise ConfigError(problems)
    return Policy(path.stem, tuple(found["geometric"]), tuple(found["photometric"]), tuple(rules.values()), fit)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice: the standard one keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> dict[Any, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--augmentation {path} cannot be read: {error}; give a YAML file.") from error
    except (yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"--augmentation {path} is not valid YAML: {said}; correct it.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"--augmentation {path} holds no mapping; write 'ops:' and a list of Kornia's ops.")
    return raw


# ------------------------------------------------------------------ ops


def _read_op(entry: Any) -> tuple[str, Op | None, list[str]]:
    """Kind, op and what is wrong with one entry of `ops`."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        return "", None, [f"found {entry!r}; write '- Name: {{argument: value}}'"]
    ((name, given),) = entry.items()
    op = Op(str(name), ())
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        return "", op, [f"its arguments are {given!r}; write {{argument: value}}"]
    kind, wrong = _kind(op.name)
    if wrong:
        return kind, op, [wrong]
    problems = _argument_problems(op.name, kind, {str(key) for key in given})
    chance = given.get("p", 0.5)
    if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
        problems.append(f"'p' is {chance!r}; give a probability from 0 to 1")
    if problems:
        return kind, op, problems
    op = Op(op.name, tuple(sorted((str(key), _tuples(value)) for key, value in given.items())))
    try:
        _try(op, kind)
    except Exception as error:  # Kornia raises whatever its checks raise
        said = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        return kind, op, [f"Kornia refuses it: {said}; correct its arguments"]
    return kind, op, []


def _tuples(value: Any) -> Any:
    """YAML's lists as tuples, which Kornia takes for ranges, and which can be compared and hashed."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _kind(name: str) -> tuple[str, str]:
    """(photometric or geometric, what is wrong)."""
    import kornia.augmentation as ka

    bases = (ka.IntensityAugmentationBase2D, ka.GeometricAugmentationBase2D)
    known = [n for n, c in vars(ka).items() if inspect.isclass(c) and issubclass(c, bases) and c not in bases]
    cls = getattr(ka, name, None)
    if not inspect.isclass(cls) or cls in bases:
        return "", f"kornia.augmentation has no such op{nearest(name, known)}; give one of its classes"
    if name in _REFUSED:
        return "", _REFUSED[name]
    if issubclass(cls, ka.IntensityAugmentationBase2D):
        return "photometric", ""
    if not issubclass(cls, ka.GeometricAugmentationBase2D):
        return "", "it moves or mixes pictures without a matrix that boxes could follow; leave it out"
    sized = {"size", "max_size", "side"} & set(inspect.signature(cls).parameters)
    return "geometric", _NO_SIZE if sized and name != "RandomResizedCrop" else ""


def _argument_problems(name: str, kind: str, given: set[str]) -> list[str]:
    import kornia.augmentation as ka

    takes = [one for one in inspect.signature(getattr(ka, name)).parameters if one not in ("keepdim", "same_on_batch")]
    ours = {"size": "is the picture's own; leave it out"} if kind == "geometric" else {}
    ours |= dict.fromkeys(_OF_MOVEMENT, _NOT_USED) if kind == "geometric" else {}
    free = [one for one in takes if one not in ours]
    return [
        f"'{one}' {ours[one]}" if one in ours else f"it has no argument '{one}'{nearest(one, free)}; it takes "
        f"{', '.join(free)}"
        for one in sorted(given)
        if one not in free
    ]  # fmt: skip


@lru_cache(maxsize=256)
def module(op: Op, height: int, width: int) -> Any:
    """Kornia's module of an op, for pictures of this size (which only crops ask for)."""
    import kornia.augmentation as ka

    arguments = dict(op.arguments)
    if op.name == "RandomResizedCrop":
        arguments["size"] = (height, width)
    return getattr(ka, op.name)(**arguments)


def matrix(op: Op, height: int, width: int) -> Matrix | None:
    """A geometric op's matrix, (3, 3) from and to pixel centres, drawn from torch's generator; None: it is left out."""
    import torch

    made = module(op, height, width)
    shape = torch.Size((1, 3, height, width))
    params = made.forward_parameters(shape)
    if not bool(params["batch_prob"][0] > 0.5):
        return None
    # Only its shape is read: a picture of a million pixels is not made for it.
    found: Matrix = made.compute_transformation(torch.zeros(1).expand(shape), params, made.flags)[0].double().numpy()
    return found


def _try(op: Op, kind: str) -> None:
    """Once on a small picture.

    Raises:
        Exception: Kornia's; or ValueError, what came out cannot be used.
    """
    import torch

    height, width = 56, 84
    certain = Op(op.name, tuple(sorted({**dict(op.arguments), "p": 1.0}.items())))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module(op, height, width)  # its own p may be what is wrong
        if kind == "photometric":
            out = module(certain, height, width)(torch.rand(1, 3, height, width))
            if out.shape != (1, 3, height, width) or not bool(torch.isfinite(out).all()):
                raise ValueError(f"a picture of (1, 3, {height}, {width}) became {tuple(out.shape)}, or is not finite")
            return
        moved = matrix(certain, height, width)
        if moved is not None and not (np.isfinite(moved).all() and abs(np.linalg.det(moved)) > 1e-6):
            raise ValueError("its matrix is not finite, or cannot be inverted")
