"""The demo's parts that can be checked in seconds; `make demo` itself is the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demo import draw
from demo.ask import Asked, exact_match
from demo.run import BASE, MOST_BEFORE, held_out

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    draw.write_demo(folder, n_train=80, n_held_out=80)
    return folder


def test_the_base_is_small_and_laid_out_as_a_checkpoint():
    sizes = {path.name: path.stat().st_size for path in BASE.iterdir()}
    assert sum(sizes.values()) <= 8_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(sizes)
    assert json.loads((BASE / "config.json").read_text())["model_type"] == "qwen2_5_vl"


def test_the_linears_of_the_language_model_fit_the_blocks_of_nf4():
    text = json.loads((BASE / "config.json").read_text())["text_config"]
    assert text["hidden_size"] % 64 == text["intermediate_size"] % 64 == 0


def test_drawing_is_a_function_of_the_seed():
    for make in (draw.base_picture, lambda seed: draw.demo_picture(seed, "count")):
        (first, *asked), (again, *asked_again), (other, *_) = make(5), make(5), make(6)
        assert asked == asked_again
        assert np.array_equal(np.asarray(first), np.asarray(again))
        assert not np.array_equal(np.asarray(first), np.asarray(other))


def test_no_held_out_picture_is_trained_on(data):
    pictures = {path.name: path.read_bytes() for path in (data / "pictures").iterdir()}
    train = {content for name, content in pictures.items() if name.startswith("train")}
    held = {content for name, content in pictures.items() if name.startswith("held_out")}
    assert (len(train), len(held)) == (80, 80)
    assert not train & held


@pytest.mark.parametrize("kind", draw.KINDS)
def test_the_answer_is_in_the_picture(kind):
    """What is asked first is of the wanted kind, and what is asked about is drawn once."""
    for seed in range(20):
        _, turns = draw.demo_picture(seed, kind)
        assert turns[0].kind == kind
        assert len({turn.question for turn in turns}) == len(turns)


def test_every_answer_occurs(data):
    answers = {asked.answer for asked in held_out(data)}
    assert answers == {*draw.NEW_COLOURS, *map(str, draw.DEMO_COUNTS)}


def test_the_base_answers_what_it_was_taught_and_not_what_the_demo_teaches(data):
    before, answers = exact_match(BASE, held_out(data))
    assert before < MOST_BEFORE
    assert all(answers)
    taught = []
    for seed in range(10_000_000, 10_000_060):
        picture, turns = draw.base_picture(seed)
        turn = next(turn for turn in turns if turn.kind != "say")
        taught.append(Asked(picture, turn.kind, turn.question, turn.answer))
    assert exact_match(BASE, taught)[0] > 0.9


@pytest.mark.slow
def test_the_base_is_made_by_one_command(tmp_path):
    few = ["--looks", "1", "--talks", "1", "--pictures", "8"]
    made = subprocess.run(
        [sys.executable, "demo/make_base.py", "--output_dir", tmp_path / "base", *few],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert {path.name for path in (tmp_path / "base").iterdir()} == {path.name for path in BASE.iterdir()}
