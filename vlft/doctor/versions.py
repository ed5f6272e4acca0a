"""Versions of other packages that are known to be slow or broken: one table, with a reason and a source for each row.

Only what lies inside the ranges of pyproject.toml needs a row; what lies outside them is an error of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vlft.doctor.findings import Finding, Grade


@dataclass(frozen=True)
class Known:
    package: str
    """Name of the distribution; `cudnn` and `nccl` are what torch itself says it runs with."""
    versions: str
    """PEP 440: which versions."""
    grade: Grade
    reason: str
    """What happens; ends the sentence `PACKAGE VERSION ...`."""
    advice: str
    source: str
    needs: frozenset[str] = frozenset()
    """Facts without which the row does not matter: gpu, several (GPUs), bf16, zero2."""


KNOWN: tuple[Known, ...] = (
    Known(
        "cudnn", "<9.15", "warning",
        "has no fast bf16 convolution for the ViT's patch embedding, which takes several times the memory and time",
        "install nvidia-cudnn 9.15 or newer for your CUDA version",
        "https://github.com/pytorch/pytorch/issues/166643", frozenset({"gpu", "bf16"}),
    ),
    Known(
        "cudnn", "==9.20.*", "warning",
        "was seen without an engine for the bf16 backward of Qwen3-VL's patch embedding",
        "keep the ViT frozen or install another cuDNN if the first step fails",
        "https://github.com/NVIDIA-TAO/tao-core/pull/29", frozenset({"gpu", "bf16"}),
    ),
    Known(
        "nccl", "==2.29.2", "error",
        "hangs in collectives, which its own patch release mends",
        "install 2.29.3 or newer",
        "https://github.com/pytorch/pytorch/pull/174338", frozenset({"gpu", "several"}),
    ),
    Known(
        # Reported for 0.18.3 to 0.19.3; the fix (#8245) was proposed on 2026-08-11, the day after 0.19.5.
        "deepspeed", "<0.19.6", "warning",
        "loses gradients in silence under ZeRO-2 with bf16 where one backward reaches a module twice",
        "update it, or use zero3",
        "https://github.com/deepspeedai/DeepSpeed/issues/8224", frozenset({"zero2", "bf16", "several"}),
    ),
)  # fmt: skip


def installed(names: Collection[str]) -> dict[str, str]:
    """The versions of those distributions that are there."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _parsed(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


def known_bad(versions: Mapping[str, str], facts: Collection[str]) -> Iterator[Finding]:
    """A finding for each row of `KNOWN` that is installed and matters here.

    Args:
        versions: name -> version.
        facts: what is true of this machine and this run, as `Known.needs`.
    """
    for row in KNOWN:
        found = _parsed(versions.get(row.package, ""))
        if found is None or not row.needs <= set(facts):
            continue
        if SpecifierSet(row.versions).contains(found, prereleases=True):
            text = f"{row.package} {found} {row.reason}; {row.advice}."
            yield Finding(row.grade, "environment", "known_version", text, row.source)


def _wanted(needed: Collection[str] | None) -> Iterator[tuple[Requirement, bool]]:
    """Requirements that matter here, and whether each is an extra's; what only developers of vlft need aside."""
    if needed is None:
        try:
            needed = requires("vlft") or []
        except PackageNotFoundError:
            return
    for one in map(Requirement, needed):
        marker = str(one.marker or "")
        if "extra" in marker:
            if "dev" not in marker:
                yield one, True
        elif one.marker is None or one.marker.evaluate():
            yield one, False


def out_of_range(versions: Mapping[str, str], needed: Collection[str] | None = None) -> Iterator[Finding]:
    """An installed package outside the range that vlft was made for, or one of the always needed that is absent.

    Args:
        needed: requirements as pyproject.toml writes them; None: those of the installed vlft.
    """
    told: set[str] = set()
    for wanted, optional in _wanted(needed):
        found = _parsed(versions.get(wanted.name, ""))
        mend = f"pip install '{wanted.name}{wanted.specifier}'"
        if wanted.name in told:
            continue
        if found is None and not optional:
            told.add(wanted.name)
            text = f"{wanted.name} is not installed, and vlft needs it; {mend}."
            yield Finding("error", "environment", "package_missing", text)
        elif found is not None and not wanted.specifier.contains(found, prereleases=True):
            told.add(wanted.name)
            text = f"{wanted.name} {found} is installed, vlft was made for {wanted.specifier}; {mend}."
            yield Finding("error", "environment", "package_range", text)


def requirement_names(needed: Collection[str] | None = None) -> list[str]:
    """Names of all packages that the installed vlft may use, extras included."""
    return sorted({wanted.name for wanted, _ in _wanted(needed)})
