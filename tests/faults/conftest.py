from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import spoiled

from vlft.models.forward import PackedVLM


@pytest.fixture
def fault() -> Iterator[Any]:
    """fault(kind, ...): this process's model has it until the test ends."""

    def spoil(kind: str, **options: Any) -> None:
        spoiled.calls = 0
        spoiled.spoil({"kind": kind, **options})

    yield spoil
    PackedVLM.forward = spoiled.forward  # type: ignore[method-assign]
