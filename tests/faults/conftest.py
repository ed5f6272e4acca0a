from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import spoiled
from runs import start

from vlft.models.forward import PackedVLM

PROGRAM = (str(Path(spoiled.__file__)),)


@pytest.fixture
def fault() -> Iterator[Any]:
    """fault(kind, ...): this process's model has it until the test ends."""

    def spoil(kind: str, **options: Any) -> None:
        spoiled.calls = 0
        spoiled.spoil({"kind": kind, **options})

    yield spoil
    PackedVLM.forward = spoiled.forward  # type: ignore[method-assign]


def start_spoiled(words: list[str], fault: dict[str, Any], **more: Any) -> subprocess.CompletedProcess[str]:
    """Run vlft with a fault in processes of its own."""
    return start(words, program=PROGRAM, FAULT=json.dumps(fault), **more)
