"""What a plugin may import is pinned, and what `--help` imports stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vlft
import vlft.testing

LIGHT = ["vlft", "vlft.config", "vlft.cli", "vlft.discovery", "vlft.family", "vlft.strategy", "vlft.errors"]
STRATEGIES = ["full", "lora", "partial", "parts", "qlora", "vit_only"]
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "kornia", "numpy")


def test_the_surface() -> None:
    assert sorted(vlft.__all__) == [
        "Exporter",
        "ModelSource",
        "ParamGroup",
        "Part",
        "Parts",
        "Strategy",
        "StrategyConfig",
        "VlftError",
    ]
    assert all(hasattr(vlft, name) for name in vlft.__all__)


def test_the_testing_surface() -> None:
    assert sorted(vlft.testing.__all__) == ["FAMILIES", "check_strategy", "make_checkpoint"]
    assert all(hasattr(vlft.testing, name) for name in vlft.testing.__all__)


@pytest.mark.parametrize("module", ["vlft", "vlft.cli", *(f"vlft_strategies.{name}" for name in STRATEGIES)])
def test_light_imports(module: str) -> None:
    """Each in a process of its own: torch alone takes four seconds, and a wrong flag must answer within one."""
    code = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_light_modules_together() -> None:
    code = f"import sys, {', '.join(LIGHT)}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
