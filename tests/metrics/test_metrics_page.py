"""docs/metrics.md: its table is the installed list, and its plugin works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from answers import answer, answers

from vlft import discovery
from vlft.metrics import Prediction, load_script, lower_is_better

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = {row[1]: row for row in re.finditer(r"^\| `(\w+)` \|.*\|$", PAGE, flags=re.MULTILINE)}


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return text


def test_every_metric_has_its_row() -> None:
    own = {name for name, found in discovery.find(discovery.METRICS).items() if found.distribution == "vlft"}
    assert ROWS.keys() == own


@pytest.mark.parametrize("name", ROWS)
def test_a_row_names_every_value_and_the_direction(name: str) -> None:
    values = discovery.load_metric(name)[0]([answer("[1, 2, 3, 4]", "[1, 2, 3, 4]")])
    cell = ROWS[name][0].split("|")[3]
    assert set(re.findall(r"`(\w+)`", cell)) == values.keys()
    assert {lower_is_better(value) for value in values} == {"lower is better" in ROWS[name][0]}


def test_the_file_and_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_word.py").write_text(block("python"))
    (tmp_path / "pyproject.toml").write_text(block("toml"))
    name, evaluate = load_script(str(tmp_path / "first_word.py"))
    assert (name, evaluate(answers(("red x", "red"), ("b", "a")))) == ("first_word", {"first_word": 0.5})
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    words = [*pip, "--target", str(site), "."]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(str(site))
    function, found = discovery.load_metric("first_word")
    assert found.source == "vlft-first-word 0.1.0"
    assert function([]) == {}


def test_every_field_of_a_prediction_is_named() -> None:
    (sentence,) = re.findall(r"^A `Prediction` has .*?\n\n", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert Prediction.__dataclass_fields__.keys() <= set(re.findall(r"`(\w+)`", sentence))
