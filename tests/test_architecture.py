"""The import contracts hold, and they would notice if they did not."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlft import discovery

ROOT = Path(__file__).resolve().parents[1]


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "plugins")])}
    words = [sys.executable, "-c", code, "--no-cache", "--no-logo", "--config", str(folder / ".importlinter")]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=env)


def test_contracts_hold() -> None:
    done = _lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "6 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("vlft/models/load.py", "import vlft.data.tokens", "Arrows go down only"),
        ("vlft/errors.py", "import vlft.family", "Arrows go down only"),
        ("vlft/data/plan.py", "import vlft.data.collate", "Inside data"),
        ("vlft/optim.py", "import vlft.config", "Below the commands"),
        ("vlft/setup.py", "import vlft_strategies.lora", "The core imports no strategy"),
        ("plugins/vlft_strategies/full.py", "from vlft.errors import VlftError", "A strategy imports the package"),
    ],
)
def test_contracts_catch(tmp_path: Path, file: str, line: str, broken: str) -> None:
    shutil.copytree(ROOT / "vlft", tmp_path / "vlft", ignore=shutil.ignore_patterns("__pycache__"))
    strategies = tmp_path / "plugins" / "vlft_strategies"
    shutil.copytree(ROOT / "plugins" / "vlft_strategies", strategies, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / ".importlinter", tmp_path / ".importlinter")
    with (tmp_path / file).open("a") as out:
        out.write(f"\n{line}\n")
    done = _lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(row.startswith(broken) and "BROKEN" in row for row in done.stdout.splitlines()), done.stdout


def test_every_module_has_a_place() -> None:
    """`exhaustive` in the contract: a module that is in no layer breaks it."""
    text = (ROOT / ".importlinter").read_text()
    assert text.count("exhaustive = true") == 3


def test_train_tells_its_story_in_220_lines() -> None:
    assert len((ROOT / "vlft" / "train.py").read_text().splitlines()) <= 220


def test_the_core_names_no_strategy() -> None:
    """No string of the core equals a strategy's name; sentences (documentation, advice) may hold one."""
    names = {name for name, found in discovery.find(discovery.STRATEGIES).items() if found.distribution == "vlft"}
    assert "qlora" in names
    for path in sorted((ROOT / "vlft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, f"{path.relative_to(ROOT)}:{node.lineno} names {node.value}"


def test_the_page_names_every_room_and_the_layers_of_the_contract() -> None:
    page, contract = (ROOT / "docs" / "architecture.md").read_text(), (ROOT / ".importlinter").read_text()
    layers = contract.split("\nlayers =\n", 1)[1].split("\n\n", 1)[0]
    assert "\n".join(line.strip() for line in layers.splitlines()) in page
    rooms = [folder for folder in (ROOT / "vlft").iterdir() if (folder / "__init__.py").exists()]
    assert len(rooms) > 8
    missing = [room.name for room in rooms if f"{room.name}/" not in page]
    missing += [one.name for one in (ROOT / "vlft" / "models" / "kernels").glob("[a-z]*.py") if one.name not in page]
    assert not missing
