"""Moments of a kill that are too short to be met by chance: each is made certain, and the run goes on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, final_weights, ledger, metrics, train, write_data

from vlft import train as story


class Killed(BaseException):
    """Nothing in vlft catches it."""


def words(model: Path, registry: Path, out: Path, **more: Any) -> list[str]:
    options = {"learning_rate_llm": 1e-4, "mixed_precision": "no", "resume_from_checkpoint": "latest"} | more
    return command(model, registry, out, "full", **options)


def truncate(folder: Path, *ids: int) -> None:
    """The records' first picture keeps its header and loses its pixels."""
    for i in ids:
        picture = folder / "images" / f"toy-{i}-0.png"
        picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])


def test_before_the_run_card_is_in_its_place(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = words(tiny(), write_data(tmp_path), tmp_path / "out", max_steps=1)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "run_card.json":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(line)
    train(line)
    assert len(metrics(tmp_path / "out")) == 1


@pytest.mark.parametrize("again", [False, True], ids=["after the evaluation", "within it"])
def test_what_an_evaluation_could_not_read_is_told_once(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Its line comes after the checkpoint of its step, so the checkpoint does not know of it."""
    registry = write_data(tmp_path, 32)
    truncate(tmp_path, *range(0, 32, 4))
    more = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "train_split_ratio": 0.5, "max_bad_fraction": 0.5}
    train(words(tiny(), registry, tmp_path / "whole", **more))
    line = words(tiny(), registry, tmp_path / "out", **more)
    real = story.train_step

    def step(job: Any, found: Any) -> Any:
        if found.number == 2:
            raise Killed
        return real(job, found)

    with monkeypatch.context() as patched:
        patched.setattr(story, "train_step", step)
        with pytest.raises(Killed):
            train(line)
    if again:  # half of the ledger's lines, and no line of the evaluation
        kept = [text for text in (tmp_path / "out/metrics.jsonl").read_text().splitlines(True) if '"eval"' not in text]
        (tmp_path / "out/metrics.jsonl").write_text("".join(kept))
    train(line)
    assert ledger(tmp_path / "out") == ledger(tmp_path / "whole")
    assert metrics(tmp_path / "out", "eval") == metrics(tmp_path / "whole", "eval")
    a, b = final_weights(tmp_path / "out"), final_weights(tmp_path / "whole")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_while_a_new_result_takes_the_place_of_the_old_one(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = words(tiny(), write_data(tmp_path), tmp_path / "out", max_steps=1)
    train(line)
    model = tmp_path / "out/model"
    files = {file.name for file in model.iterdir()}
    real = shutil.rmtree

    def rmtree(path: Any, *args: Any, **options: Any) -> None:
        if Path(path).exists() and "model" in Path(path).name:
            next(Path(path).iterdir()).unlink()
            raise Killed
        real(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            train(line)
    assert not model.exists() or {file.name for file in model.iterdir()} == files, "half a model"
    train(line)
    assert {file.name for file in model.iterdir()} == files
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_half_an_index_is_removed_a_day_later(tiny: Callable[..., Path], tmp_path: Path) -> None:
    line = words(tiny(), write_data(tmp_path), tmp_path / "out", max_steps=1)
    cache = tmp_path / "cache/index"
    for name, age in ((".toy-old", 90_000), (".toy-now", 0)):
        (cache / name).mkdir(parents=True)
        (cache / name / "tokens.bin").write_bytes(b"half")
        when = time.time() - age
        for path in (cache / name / "tokens.bin", cache / name):
            os.utime(path, (when, when))
    train(line)
    assert not (cache / ".toy-old").exists()
    assert (cache / ".toy-now").exists(), "another process may be building it"
