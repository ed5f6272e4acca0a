"""The benches run, on a tiny model; what they say of time is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

BENCH = Path(__file__).resolve().parents[1] / "bench"


def run(script: str, *words: object) -> list[str]:
    line = [sys.executable, str(BENCH / script), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert not done.returncode, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_row_gives_a_line_and_the_line_a_table(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 4, "--workers", 0, "--root", tmp_path / "root")
    batch = ("--option", "per_device_train_batch_size=1", "gradient_accumulation_steps=2")
    steps = ("--steps", 2, "--warm", 1, "--out", tmp_path / "out")
    (text,) = run("train.py", "--rows", "3B-lora", *tiny, *steps, *batch)
    line = json.loads(text)
    assert "error" not in line, line["error"]
    assert line["steps"] == line["samples_per_step"] == 2
    assert line["formula_over_count"] == 1.0, "two counts of the same FLOPs"
    assert {line[name] for name in ("weights", "gradients", "states")} == {"float32"}
    assert "| 3B `lora_llm_full_vit` | fp32 / fp32 / fp32 |" in "\n".join(run("table.py", tmp_path / "out/lines.jsonl"))


def test_a_row_that_fails_gives_a_line_with_its_error(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 4, "--workers", 0, "--root", tmp_path / "root")
    (text,) = run("train.py", "--rows", "3B-lora", *tiny, "--out", tmp_path, "--option", "no_such_option=1")
    assert "no_such_option" in json.loads(text)["error"]


def test_idle_spans_between_steps_are_those_in_which_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from profiling import shares

    kernels = [(0.0, 5.0), (6.0, 10.0), (11.0, 20.0), (12.0, 13.0), (22.0, 30.0)]
    found = shares(kernels, [0.0, 10.5, 21.0, 30.0])
    # 4 of 30 idle, 3 of them around the two borders; the third step's border is cut off.
    assert found == {"gpu_busy": round(26 / 30, 4), "gpu_idle_between": round(3 / 30 * 3 / 2, 4)}


@pytest.mark.slow
def test_augmentation_s_share_of_a_step(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 4, "--workers", 0, "--root", tmp_path / "root")
    lines = run("augmentation.py", *tiny, "--steps", 1, "--warm", 1, "--out", tmp_path, "--policies", "none,geometric")
    none, moved = (json.loads(line) for line in lines[:2])
    assert 0 < none["share"] < moved["share"] < 1
    assert moved["worker_ms"] > 0
    assert lines[-1].startswith("| `geometric` |")


def test_the_study_s_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from augmentation_study import table, word_picture

    shares = {("none", 1): 0.5, ("none", 2): 0.6, ("geometric", 1): 0.7, ("geometric", 2): 0.7}
    lines = [{"arm": a, "seed": s, "held_out": x, "held_out_words": 0.5} for (a, s), x in shares.items()]
    rows = table(lines, ["none", "geometric"]).splitlines()
    assert rows[2] == "| shapes: colour, number | none | 50.0% | 60.0% | 55.0% | 7.1% |  |"
    assert rows[3].endswith("| 70.0% | 70.0% | 70.0% | 0.0% | +15.0% (+10.0% to +20.0%) |")
    assert word_picture(3)[0].tobytes() == word_picture(3)[0].tobytes()


@pytest.mark.slow
def test_predictions_beside_measurements(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 12, "--workers", 0, "--root", tmp_path / "root")
    steps = ("--steps", 1, "--warm", 1, "--out", tmp_path / "out", "--shapes", "1x1,2x2")
    lines = [json.loads(line) for line in run("planning.py", "--rows", "3B-lora,7B-full", *tiny, *steps)]
    assert [line.get("error") for line in lines] == [None] * 4
    assert [(line["row"], line["shape"]) for line in lines] == [
        ("3B-lora", "1x1"), ("3B-lora", "2x2"), ("7B-full", "1x1"), ("7B-full", "2x2")
    ]  # fmt: skip
    for line in lines:
        for what, unit in (("peak", "gib"), ("step", "s")):
            predicted, found = line[f"predicted_{what}_{unit}"], line[f"measured_{what}_{unit}"]
            assert line[f"{what}_error_percent"] == pytest.approx(100 * (predicted / found - 1), abs=1)
    assert lines[1]["tokens_of_largest_row"] > lines[0]["tokens_of_largest_row"]


def test_an_unknown_row_of_predictions_is_told(tmp_path: Path) -> None:
    line = [sys.executable, str(BENCH / "planning.py"), "--rows", "9B-lora"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    assert "unknown rows: 9B-lora; there are 3B-full" in done.stderr
