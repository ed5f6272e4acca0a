"""plugins/vlft-dora as a third party's user meets it: installed with pip, listed, trained, merged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import command, environment, metrics, start, write_data
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from vlft.testing import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "plugins" / "vlft-dora"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the plugin; nothing is installed into this one's."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(target), str(FOLDER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {"PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


def _vlft(words: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vlft", *words], capture_output=True, text=True, check=False, env=environment(**env)
    )
    assert done.returncode == 0, done.stderr
    # Libraries' notes and bars that a user can do nothing about.
    assert "pip install kernels" not in done.stderr
    assert "it/s]" not in done.stderr
    return done.stdout


def test_plugins_lists_it(installed: dict[str, str]) -> None:
    lines = _vlft(["plugins"], installed).splitlines()
    (line,) = [line for line in lines if line.split()[1] == "dora"]
    assert line.split()[:5] == ["strategies", "dora", "ok", "vlft-dora", "0.1.0"]
    assert "DoRA adapters on the LLM" in line


def test_help_shows_its_options(installed: dict[str, str]) -> None:
    text = _vlft(["--tuning_strategy", "dora", "--help"], installed)
    assert "Strategy dora (vlft-dora 0.1.0)" in text
    assert "--dora_rank" in text


def test_trains_and_merges(installed: dict[str, str], tmp_path: Path) -> None:
    base = make_checkpoint("qwen2_5_vl", tmp_path / "base")
    registry = write_data(tmp_path / "data", 12)
    output = tmp_path / "out"
    words = command(base, registry, output, "dora", max_steps=3, dora_rank=4, train_projector=True)
    said = start(words, **installed).stdout
    assert "dora from vlft-dora 0.1.0" in said
    assert " proved " in said or "proved  " in said
    losses = [line["loss"] for line in metrics(output)]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)
    with safe_open(output / "model" / "adapter_model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert any("lora_magnitude_vector" in name for name in names)
    assert any("visual.merger" in name for name in names), "the projector trained, so it is saved beside the adapter"

    # Neither merging nor loading needs the plugin: the result is PEFT's own format.
    said = _vlft(["merge", str(output / "model"), "--output_dir", str(tmp_path / "merged")], {})
    assert "merged onto the base" in said
    weights = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    before = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    moved = {name for name, tensor in weights.items() if not tensor.equal(before[name])}
    assert {n for n in moved if "visual" in n} == {n for n in weights if "visual.merger" in n}
    assert {n for n in moved if "visual" not in n} == {
        n for n in weights if "layers." in n and n.endswith("proj.weight")
    }


@pytest.mark.slow
def test_its_own_tests_pass(installed: dict[str, str]) -> None:
    """`check_strategy`, called as the plugin's author calls it."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", "--rootdir", "."]
    done = subprocess.run(
        words, cwd=FOLDER, capture_output=True, text=True, check=False, env=environment(**installed), timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout


def test_imports_only_the_public_surface() -> None:
    """`vlft`, torch and peft, and nothing heavy at import time: it is the example that others copy."""
    text = (FOLDER / "src" / "vlft_dora" / "__init__.py").read_text()
    imports = {line.split()[1] for line in text.splitlines() if line.strip().startswith(("import ", "from "))}
    assert imports <= {"__future__", "re", "typing", "pydantic", "vlft", "torch", "peft"}
