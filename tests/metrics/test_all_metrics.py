"""Of every metric: it loads by name, is finite and in range, ignores the order, and knows perfection."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from answers import answer, answers
from hypothesis import given, settings
from hypothesis import strategies as st

from vlft import discovery
from vlft.errors import ConfigError, StrategyError
from vlft.evaluate import score
from vlft.metrics import Prediction, load_script, lower_is_better, references

TOP = dict.fromkeys(("bleu", "chrf"), 100.0)
"""Best value where it is not 1; `cer` and `wer` have 0, and no upper limit."""
NAMES = sorted(name for name, found in discovery.find(discovery.METRICS).items() if found.distribution == "vlft")
FEW = settings(max_examples=60, deadline=None)

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    [
        "",
        "no idea",
        "{[1, 2",
        "(B)",
        "1,5 %",
        '{"a": [1, {}]}',
        "[1, 2, 30, 40]",
        "(1,2),(3,4)",
        "the",
        "。",
        "ß ﬁ 👩‍👩‍👧",
        "हिन्दी",
    ]
)
NUMBERS = st.integers(0, 999)
BOXES = st.tuples(NUMBERS, NUMBERS, st.integers(1, 500), st.integers(1, 500)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
WORDS = st.lists(st.text("abcdefgé中", min_size=1, max_size=5), min_size=4, max_size=9).map(" ".join)
GOOD: dict[str, st.SearchStrategy[str]] = {
    "box_iou": st.lists(BOXES, min_size=1, max_size=5).map(lambda found: json.dumps([{"bbox_2d": b} for b in found])),
    "json_f1": JSON.map(json.dumps),
    "multiple_choice": st.sampled_from(["A", "(B)", "C.", "d", "some text"]),
    "number": st.decimals(-1e6, 1e6, places=2).map(str) | TEXTS,
    "bleu": WORDS,
    "chrf": WORDS,
    **dict.fromkeys(("exact_match", "vqa_accuracy", "anls", "rouge_l", "cer", "wer"), TEXTS),
}


def run(name: str, made: list[Prediction]) -> dict[str, float]:
    return discovery.load_metric(name)[0](made)


def test_the_list_is_whole() -> None:
    assert sorted(GOOD) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_predictions_no_values(name: str) -> None:
    assert run(name, []) == {}


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS, st.none() | st.lists(TEXTS, max_size=3), TEXTS), min_size=1, max_size=6))
def test_values_are_finite_in_range_and_do_not_depend_on_the_order(name: str, pairs: list[Any]) -> None:
    made = [answer(*pair) for pair in pairs]
    found = run(name, made)
    assert found
    for key, value in found.items():
        assert type(value) is float
        assert math.isfinite(value)
        assert 0 <= value <= (math.inf if lower_is_better(key) else TOP.get(name, 1.0) + 1e-9), (key, value)
    Random(1).shuffle(made)
    assert run(name, made) == found


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_the_reference_itself_is_perfect(name: str, data: st.DataObject) -> None:
    texts = data.draw(st.lists(GOOD[name], min_size=1, max_size=5))
    found = run(name, answers(*((text, text) for text in texts)))
    if name == "multiple_choice":
        del found["answered"]  # "some text" chooses nothing
    best = 0.0 if lower_is_better(name) else TOP.get(name, 1.0)
    assert all(value == pytest.approx(best) for value in found.values()), found


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_answer_is_the_worst(name: str) -> None:
    wanted = {"box_iou": "[1, 2, 3, 4]", "json_f1": '{"a": 1}', "multiple_choice": "B", "number": "7"}
    found = run(name, [answer("", wanted.get(name, "four words stand here"))])
    main = {"multiple_choice": "accuracy", "box_iou": "iou", "json_f1": "f1", "number": "relaxed_accuracy"}
    assert found[main.get(name, name)] == (1.0 if lower_is_better(name) else 0.0)


@pytest.mark.parametrize(
    ("name", "falls"),
    [
        *((f"eval/a/mine/{name}", True) for name in ("loss", "char_error", "word-error-rate", "edit_distance", "MSE")),
        *((f"eval/a/mine/{name}", False) for name in ("lossless", "error_free", "terror", "distance_kept", "f1")),
        ("loss", True), ("cer", True), ("perplexity", True), ("val_wer", True), ("eval/pages/wer/wer", True),
        ("eval/cer/f1", False), ("bleu", False), ("", False),
    ],
)  # fmt: skip
def test_direction(name: str, falls: bool) -> None:
    assert lower_is_better(name) is falls


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"answers": ["a", "b"]}, ("a", "b")),
        ({"answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}]}, ("a", "b")),
        ({"answers": [7, 2.5]}, ("7", "2.5")),
        ({"answers": []}, ("r",)),
        ({"answers": "a"}, ("r",)),
        ({"answers": ["a", None]}, ("r",)),
        ({"answers": [{"text": "a"}]}, ("r",)),
        ({}, ("r",)),
        (None, ("r",)),
    ],
)
def test_references_of_a_record(record: Any, found: tuple[str, ...]) -> None:
    assert references(Prediction("1", "q", "p", "r", (), record)) == found


@pytest.mark.parametrize(
    ("name", "library", "module"),
    [
        ("cer", "jiwer", "error_rate"),
        ("wer", "jiwer", "error_rate"),
        ("bleu", "sacrebleu", "ngrams"),
        ("chrf", "sacrebleu", "ngrams"),
        ("box_iou", "scipy", "box_iou"),
    ],
)
def test_a_missing_library_is_named_with_its_install_line(
    name: str, library: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [m for m in sys.modules if m.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"vlft.metrics.{module}", raising=False)
    with pytest.raises(StrategyError) as caught:
        load_script(name)
    said = str(caught.value)
    assert f"'{name}'" in said or f", {name}'" in said or f"'{name}, " in said
    assert f"needs {library}, which cannot be imported" in said
    assert said.endswith("run: pip install 'vlft[metrics]'.")
    assert "reinstall" not in said
    (line,) = [one for one in discovery.inspect() if one.found.name == name and one.group == discovery.METRICS]
    assert (line.state, line.detail) == ("broken", said)


# ------------------------------------------------------------------ files of the user's own


def test_a_file_may_hold_dataclasses_and_import_what_lies_beside_it(tmp_path: Path) -> None:
    before = list(sys.path)
    (tmp_path / "helper_of_this_test.py").write_text("ONE = 1.0")
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom helper_of_this_test import ONE\n"
    )
    text += "@dataclass\nclass Found:\n    value: float\ndef evaluate(made):\n    return {'one': Found(ONE).value}\n"
    (tmp_path / "mine.py").write_text(text)
    stem, metric = load_script(str(tmp_path / "mine.py"))
    assert (stem, metric([])) == ("mine", {"one": 1.0})
    assert sys.path == before


def test_two_files_of_one_name_are_two_metrics(tmp_path: Path) -> None:
    found = []
    for value in (1, 2):
        path = tmp_path / str(value) / "mine.py"
        path.parent.mkdir()
        path.write_text(f"def evaluate(made):\n    return {{'x': {value}}}")
        found.append(load_script(str(path))[1])
    assert [metric([])["x"] for metric in found] == [1, 2]
    assert len({metric.__module__ for metric in found}) == 2


@pytest.mark.parametrize("text", ["import sys\nsys.exit()", "1 / 0"])
def test_a_file_that_ends_while_it_is_imported_is_told(tmp_path: Path, text: str) -> None:
    before, modules = list(sys.path), set(sys.modules)
    (tmp_path / "ends.py").write_text(text)
    with pytest.raises(ConfigError, match=r"ends\.py cannot be used: (SystemExit|ZeroDivisionError)"):
        load_script(str(tmp_path / "ends.py"))
    assert sys.path == before
    assert not [name for name in set(sys.modules) - modules if "ends" in name]


def test_a_metric_that_exits_is_a_metric_that_failed() -> None:
    def leaves(made: Any) -> dict[str, float]:
        sys.exit()

    assert score("toy", [answer("a", "b")], {"leaves": leaves}) == ({}, {"toy/leaves": "SystemExit: "})
