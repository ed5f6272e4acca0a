from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlft.data.registry import KEYS, read_registry
from vlft.errors import ConfigError


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "images").mkdir()

    def write(**datasets: Any) -> Path:
        path = tmp_path / "reg.json"
        path.write_text(json.dumps({"datasets": datasets}))
        return path

    return write


def test_the_smallest_registry(registry: Any, tmp_path: Path) -> None:
    (found,) = read_registry(registry(invoices={"json_path": "a.jsonl", "image_root": "images"}))
    assert (found.name, found.json_path, found.image_root) == ("invoices", tmp_path / "a.jsonl", tmp_path / "images")
    assert (found.weight, found.format, found.split, found.max_samples, found.notes) == (1.0, "auto", None, None, [])


def test_paths_are_relative_to_the_registry_not_to_the_working_folder(
    registry: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    path = registry(a={"json_path": "a.jsonl"})
    monkeypatch.chdir(tmp_path.parent)
    (found,) = read_registry(Path(tmp_path.name) / path.name)
    assert found.json_path.samefile(tmp_path / "a.jsonl")
    assert found.root == found.json_path.parent


def test_every_key(registry: Any, tmp_path: Path) -> None:
    entry = {
        "json_path": "a.jsonl", "image_root": "images", "format": "sharegpt", "split": "eval", "weight": 0.5,
        "max_samples": 7, "system": "Be brief.", "columns": {"messages": "conv"}, "tags": {"role_tag": "who"},
        "max_pixels": 50176, "box_format": "norm1000", "allowed_roots": ["images"], "dataset_class": "MyDataset",
    }  # fmt: skip
    assert set(entry) == set(KEYS)
    (found,) = read_registry(registry(a=entry))
    assert found.allowed_roots == (tmp_path / "images",)
    assert "dataset_class" in found.notes[0]


def test_names_pick_and_keep_their_order(registry: Any) -> None:
    path = registry(a={"json_path": "a.jsonl"}, b={"json_path": "a.jsonl"})
    assert [s.name for s in read_registry(path, ["b", "a", "b"])] == ["b", "a"]
    assert [s.name for s in read_registry(path)] == ["a", "b"]


def test_all_problems_at_once_with_the_nearest_names(registry: Any) -> None:
    path = registry(
        invoices={"json_path": "a.jsonl", "imageroot": "images", "weight": -1},
        b={"json_path": "absent.jsonl", "split": "test"},
        c={"file_name": "a.jsonl"},
        d={"json_path": "absent.jsonl", "format": "llva", "columns": {"mesages": "x"}},
    )
    with pytest.raises(ConfigError) as caught:
        read_registry(path, ["invoices", "b", "c", "d", "invioces"])
    text = "\n".join(caught.value.problems)
    for expected in (
        "unknown key 'imageroot', did you mean 'image_root'?", "'weight'", "'split'", "did you mean 'json_path'?",
        "there is no data set 'invioces', did you mean 'invoices'?",
        "absent.jsonl does not exist", "did you mean 'llava'?", "did you mean 'messages'?",
    ):  # fmt: skip
        assert expected in text, text
    assert len(caught.value.problems) >= 7


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "there is no file"),
        ("{", "line 1"),
        ("[]", "expected"),
        ('{"datasets": {}}', "at least one"),
        ('{"a": {"json_path": "x"}}', "expected"),
        ('{"datasets": {"a": 3}}', "expected an object"),
        ('{"datasets": {"a": {"json_path": 3}}}', "json_path"),
        ('{"datasets": {"a": {"json_path": "nowhere.json"}}}', "does not exist"),
        ('{"datasets": {"a": {"json_path": "x"}, "a": {}}}', "'a' twice"),
        ('{"datasets": {"a": {}}, "dataset": 1}', "unknown key 'dataset'"),
    ],
)
def test_bad_registries_get_one_sentence(tmp_path: Path, content: str | None, word: str) -> None:
    path = tmp_path / "reg.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=word):
        read_registry(path)


def test_reading_a_registry_imports_no_torch() -> None:
    code = "import sys, vlft.data.registry; assert not {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
