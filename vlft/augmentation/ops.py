"""Ops of Kornia: which are admitted, and how they are built and drawn.

Kornia's own base classes say what an op is: `IntensityAugmentationBase2D` changes values, `GeometricAugmentationBase2D`
moves the picture by a matrix that boxes can follow. Nothing else is admitted.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vlft.rivals import nearest

Matrix: TypeAlias = npt.NDArray[np.float64]
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


def read_op(entry: Any) -> tuple[str, Op | None, list[str]]:
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


def _made(op: Op, height: int, width: int) -> Any:
    import kornia.augmentation as ka

    arguments = dict(op.arguments)
    if op.name == "RandomResizedCrop":
        arguments["size"] = (height, width)
    return getattr(ka, op.name)(**arguments)


@lru_cache(maxsize=256)
def module(op: Op, height: int, width: int) -> Any:
    """Kornia's module of an op, for pictures of this size (which only crops ask for)."""
    return _made(op, height, width)


@lru_cache(maxsize=256)
def chance(op: Op) -> float:
    """With which it changes a picture: what it was given, or Kornia's default."""
    import kornia.augmentation as ka

    return float(dict(op.arguments).get("p", inspect.signature(getattr(ka, op.name)).parameters["p"].default))


def _always(op: Op) -> Op:
    return Op(op.name, tuple(sorted({**dict(op.arguments), "p": 1.0}.items())))


@lru_cache(maxsize=256)
def certain(op: Op, device: torch.device) -> Any:
    """Kornia's module of a photometric op that changes every picture it is given, on this device.

    Kornia draws on the CPU. Where it draws a value for each pixel, as of noise, it does so on the pictures' device
    instead: on the CPU that takes longer than all else, and the copy would make the host wait for the device.
    """
    made = _made(_always(op), 0, 0)
    if device.type != "cpu" and _draws_pixels(made):
        made.set_rng_device_and_dtype(device, torch.float32)
    return made


def seed_cpu(seed: int) -> None:
    """The generator that Kornia draws from on the CPU, alone: `torch.manual_seed` would seed those of GPUs, too."""
    torch.default_generator.manual_seed(seed % 2**63)


def _draws_pixels(made: Any) -> bool:
    """Whether the number of values that are drawn depends on the picture's size.

    Not whether there is a value for each pixel: shading has one, and draws three numbers.
    """
    following = []
    with torch.random.fork_rng(devices=[]):
        for side in (32, 64):
            seed_cpu(0)
            made.forward_parameters(torch.Size((1, 3, side, side)))
            following.append(torch.rand(()).item())
    return following[0] != following[1]


def matrix(op: Op, height: int, width: int) -> Matrix | None:
    """A geometric op's matrix, (3, 3) from and to pixel centres, drawn from torch's generator; None: it is left out."""
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
    height, width = 56, 84
    always = _always(op)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        seed_cpu(0)
        module(op, height, width)  # its own p may be what is wrong
        if kind == "photometric":
            out = module(always, height, width)(torch.rand(1, 3, height, width))
            if out.shape != (1, 3, height, width) or not bool(torch.isfinite(out).all()):
                raise ValueError(f"a picture of (1, 3, {height}, {width}) became {tuple(out.shape)}, or is not finite")
            return
        moved = matrix(always, height, width)
        if moved is not None and not (np.isfinite(moved).all() and abs(np.linalg.det(moved)) > 1e-6):
            raise ValueError("its matrix is not finite, or cannot be inverted")
