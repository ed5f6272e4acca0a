"""`vlft eval` as a user meets it: what it deletes, where it writes, what it says; and how a run reads its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import command, train, write_data

from vlft.cli import main
from vlft.commands import COMMANDS, parse_command
from vlft.config import EvalOptions
from vlft.errors import ConfigError
from vlft.setup import best_sentence, try_metrics
from vlft.tracking import Best


def problems(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_command(COMMANDS["eval"], list(words))
    return str(caught.value)


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "registry.json"
    path.write_text("{}")
    return path


@pytest.fixture
def a_run(tmp_path: Path, registry: Path) -> Path:
    run = tmp_path / "run"
    for name in ("model", "merged"):
        (run / name).mkdir(parents=True)
    (run / "run.yaml").write_text(f"schema: 1\ndataset_config_path: {registry}\n")
    return run


# ------------------------------------------------------------------ words


def test_a_folder_that_holds_something_else_is_refused(
    tmp_path: Path, registry: Path, a_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    said = problems(str(a_run), "--output_dir", str(full))
    assert f"--output_dir {full} is not empty" in said
    (full / "metrics.json").write_text("{}")
    assert "is not empty" in problems(str(a_run), "--output_dir", str(full)), "somebody else's metrics.json"
    monkeypatch.chdir(full)
    assert "--output_dir . is not empty" in problems(str(a_run), "--output_dir", ".")
    assert f"{registry} is a file" in problems(str(a_run), "--output_dir", str(registry))
    (a_run / "eval/model").mkdir(parents=True)
    (a_run / "eval/model/notes.txt").write_text("mine")
    assert "is not empty" in problems(str(a_run)), "the run's own place, too"


def earlier(folder: Path, *more: str) -> Path:
    """A folder as an earlier evaluation left it."""
    folder.mkdir(parents=True)
    facts = {"schema": 1, "values": {}, "options": {"eval_dataset_scripts": {"held": ["cer"]}}}
    (folder / "metrics.json").write_text(json.dumps(facts))
    for name in ("held.jsonl", "ledger.json", *more):
        (folder / name).write_text("")
    return folder


def test_an_earlier_evaluation_may_be_replaced_and_only_that(a_run: Path) -> None:
    earlier(a_run / "eval/model")
    assert parse_command(COMMANDS["eval"], [str(a_run)]).output_dir == a_run / "eval/model"
    earlier(a_run / "eval/merged", "other.jsonl")
    assert "is not empty" in problems(str(a_run / "merged"))


@pytest.mark.parametrize(("given", "place"), [("", "model"), ("model", "model"), ("merged", "merged")])
def test_each_model_of_a_run_has_its_own_place(a_run: Path, given: str, place: str) -> None:
    found = parse_command(COMMANDS["eval"], [str(a_run / given)])
    assert isinstance(found, EvalOptions)
    assert (found.model, found.output_dir) == (str(a_run / place), a_run / "eval" / place)


def test_a_folder_does_not_bring_code_along(a_run: Path) -> None:
    """What it names runs, or asks the network, only where its run.yaml is given by name, or a flag says otherwise."""
    known = (a_run / "run.yaml").read_text()
    (a_run / "run.yaml").write_text(f"{known}eval_dataset_scripts:\n  held: [exact_match, /there/evil.py]\n")
    said = problems(str(a_run))
    assert f"{a_run / 'run.yaml'} asks for /there/evil.py, which runs code" in said
    assert f"give --config {a_run / 'run.yaml'}" in said
    assert "/there/evil.py" in problems(str(a_run / "merged"))
    found = parse_command(COMMANDS["eval"], [str(a_run), "--config", str(a_run / "run.yaml")])
    assert isinstance(found, EvalOptions)
    assert found.eval_dataset_scripts == {"held": ("exact_match", "/there/evil.py")}
    found = parse_command(COMMANDS["eval"], [str(a_run), "--eval_dataset_scripts", "held:exact_match"])
    assert isinstance(found, EvalOptions)
    assert found.eval_dataset_scripts == {"held": ("exact_match",)}
    (a_run / "run.yaml").write_text(f"{known}trust_remote_code: true\nallow_remote_images: true\n")
    assert "asks for trust_remote_code true, allow_remote_images true" in problems(str(a_run))


def test_a_model_that_is_not_there(tmp_path: Path, a_run: Path) -> None:
    said = problems("nosuchmodel")
    assert "MODEL nosuchmodel: there is no such folder" in said
    assert "--output_dir is missing" in said
    (a_run / "model").rmdir()
    for given in (a_run, a_run / "model"):
        said = problems(str(given))
        assert f"{a_run} has no result yet; give its command" in said
        assert f"vlft export {a_run} --checkpoint latest" in said


# ------------------------------------------------------------------ runs

# Raised, not by sys.exit(): wandb, once a test of the same process has run it, gives that a code of its own.
LATE = """
calls = 0
def evaluate(made):
    global calls
    calls += 1
    if calls > 3:  # those of the trial
        raise SystemExit
    return {"my_error": 0.5}
"""


def evaluation(tiny: Callable[..., Path], folder: Path, *words: str, name: str = "ledger") -> list[str]:
    """Words of an evaluation of the tiny model on a data set of that name with one broken picture."""
    registry = write_data(folder, 6, name=name, counts=(1,))
    (folder / f"images/{name}-1-0.png").write_bytes(b"no picture")
    fixed = ["--dataset_config_path", str(registry), "--cache_dir", str(folder / "cache"), "--num_workers", "0"]
    fixed += ["--split", "all", "--max_bad_fraction", "1", "--eval_max_new_tokens", "3"]
    return ["eval", str(tiny()), *fixed, *words]


def test_a_data_set_called_ledger_and_a_current_folder(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = evaluation(tiny, tmp_path, "--eval_dataset_scripts", "ledger:exact_match")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".git").mkdir()
    monkeypatch.chdir(out)
    for _ in range(2):  # the second replaces the first
        assert main([*words, "--output_dir", "."]) == 0
        assert sorted(path.name for path in out.iterdir()) == [".git", "ledger.json", "ledger.jsonl", "metrics.json"]
        answers = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
        assert len(answers) == 5
        assert all("prediction" in line for line in answers)
        (unused,) = json.loads((out / "ledger.json").read_text())["samples"]
        assert (unused["dataset"], unused["id"]) == ("ledger", "r1")
    (out / "mine.txt").write_text("mine")
    assert main([*words, "--output_dir", "."]) == 2
    assert (out / "mine.txt").exists()


def test_answers_that_are_no_longer_asked_for_are_gone(tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = evaluation(tiny, tmp_path, "--output_dir", str(tmp_path / "out"), name="toy")
    assert main([*words, "--eval_dataset_scripts", "toy:exact_match"]) == 0
    assert (tmp_path / "out/toy.jsonl").exists()
    assert main(words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ledger.json", "metrics.json"]


def test_a_script_that_could_not_score_is_an_exit_code(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    words = evaluation(tiny, tmp_path, "--output_dir", str(tmp_path / "out"), name="toy")
    assert main([*words, "--eval_dataset_scripts", f"toy:{tmp_path / 'late.py'},exact_match"]) == 5
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert found["failed"] == {"toy/late": "SystemExit: "}
    assert "eval/toy/exact_match/strict" in found["values"]
    assert (tmp_path / "out/toy.jsonl").exists()
    said = capsys.readouterr()
    assert "toy/exact_match/strict" in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("vlft: ")]
    assert "toy/late could not score: SystemExit; all else is in" in line
    assert str(tmp_path / "out") in line


def test_a_script_of_a_data_set_that_is_not_there_is_answered_with_its_name(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = evaluation(tiny, tmp_path, "--output_dir", str(tmp_path / "out"), name="toy")
    assert main([*words, "--eval_dataset_scripts", "toi:exact_match"]) == 2
    said = capsys.readouterr().err
    assert "there is no data set 'toi' here (the nearest is 'toy')" in said
    assert "train_split_ratio" not in said


def test_only_unknown_names_are_unknown() -> None:
    data: Any = SimpleNamespace(names=["toy", "all_train"], eval_datasets=["toy"])
    with pytest.raises(ConfigError, match="has no held-out samples; lower --train_split_ratio"):
        try_metrics(None, data, {"all_train": {}})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no data set 'toi'"):
        try_metrics(None, data, {"toi": {}, "all_train": {}})  # type: ignore[arg-type]


def test_a_run_says_which_values_it_takes_for_the_best(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late.py").write_text(LATE.replace("raise SystemExit", "pass"))
    write_data(tmp_path, 4, name="train")
    registry = write_data(tmp_path, 3, name="held", split="eval")
    options = {"eval_dataset_scripts": f"held:{tmp_path / 'late.py'}", "metric_for_best": "held/late/my_error"}
    train(command(tiny(), registry, tmp_path / "out", "lora", max_steps=1, eval_max_new_tokens=3, **options))
    said = " ".join(capsys.readouterr().out.split())
    assert best_sentence(Best("eval/held/late/my_error", False)) in said
    assert "with the smallest eval/held/late/my_error; --greater_is_better true turns that round" in said
    assert json.loads((tmp_path / "out/best.json").read_text())["greater_is_better"] is False
