"""SIGTERM and SIGINT finish the step and save; a second one ends at once; a rank that dies takes the others along."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, environment, final_weights, launched, metrics, start, train, write_data

from vlft import checkpoint
from vlft.errors import StoppedError

SLOW = {"kind": "slow", "seconds": 0.3}


def words(model: Path, registry: Path, out: Path, **more: Any) -> list[str]:
    options = {"max_steps": 40, "save_steps": 1000, "mixed_precision": "no", "learning_rate_llm": 1e-4} | more
    return command(model, registry, out, "lora", lora_dropout=0.0, **options)


@contextmanager
def running(line: list[str], processes: int = 1, fault: dict[str, Any] | None = None) -> Iterator[Any]:
    """A run in the background, killed with all its processes at the end of the block."""
    argv, env = launched(line, processes, fault or SLOW)
    child = subprocess.Popen(
        argv,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait_for_steps(out: Path, n: int, child: Any, limit: float = 120) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= n:
            return
        assert child.poll() is None, child.communicate()[0][-3000:]
        time.sleep(0.05)
    raise AssertionError("the run did not get that far")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_first_signal_saves_and_the_resume_is_exact(
    tiny: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    registry = write_data(tmp_path)
    out = tmp_path / "out"
    line = words(tiny(), registry, out, max_steps=12)
    train(words(tiny(), registry, tmp_path / "whole", max_steps=12))
    with running(line) as child:
        wait_for_steps(out, 3, child)
        child.send_signal(number)
        said = child.communicate(timeout=60)[0]
    assert child.returncode == StoppedError.exit_code
    assert f"{number.name}: finishing the step and saving" in said
    assert "go on with --resume_from_checkpoint latest" in said
    (saved,) = checkpoint.complete(out / "checkpoints")
    done = len(metrics(out))
    assert saved.name == f"step-{done:06d}"
    assert done < 12
    train([*line, "--resume_from_checkpoint", "latest"])
    assert metrics(out) == metrics(tmp_path / "whole")
    a, b = final_weights(out), final_weights(tmp_path / "whole")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_second_signal_ends_at_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """In the middle of a step of 30 s, with the main thread asleep in it."""
    out = tmp_path / "out"
    line = words(tiny(), write_data(tmp_path), out)
    with running(line, fault={"kind": "slow", "seconds": 30.0, "after": 2}) as child:
        wait_for_steps(out, 2, child)
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGINT)  # the same Ctrl-C, by way of the launcher
        time.sleep(1.5)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        began = time.monotonic()
        child.wait(timeout=20)
        assert time.monotonic() - began < 10
    assert child.returncode == 128 + signal.SIGINT


@pytest.mark.slow
def test_a_signal_to_the_launcher_reaches_every_rank(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = words(tiny(), write_data(tmp_path), out, per_device_train_batch_size=2)
    with running(line, processes=2) as child:
        wait_for_steps(out, 2, child)
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=60)[0]
    assert said.count("ended after step") == 1, said[-3000:]
    assert len(checkpoint.complete(out / "checkpoints")) == 1
    start([*line, "--resume_from_checkpoint", "latest"], processes=2)
    assert len(metrics(out)) == 40


@pytest.mark.parametrize("layout", [None, pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_others(tiny: Callable[..., Path], tmp_path: Path, layout: str | None) -> None:
    out = tmp_path / "out"
    line = words(tiny(), write_data(tmp_path), out, per_device_train_batch_size=2, deepspeed=layout, save_steps=1)
    began = time.monotonic()
    done = start(line, processes=2, fault={"kind": "dies", "call": 2, "rank": 1}, check=False, limit=120)
    assert time.monotonic() - began < 90, "import and start included"
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert done.stderr.count("another process of this run ended") <= 1
    assert checkpoint.complete(out / "checkpoints")


def test_an_evaluation_is_left_and_made_again(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path, 40)
    out = tmp_path / "out"
    more = {"train_split_ratio": 0.5, "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 1}
    line = words(tiny(), registry, out, **more)
    train(words(tiny(), registry, tmp_path / "whole", **more))
    with running(line, fault={"kind": "slow", "seconds": 1.0, "only_evaluation": True}) as child:
        wait_for_steps(out, 2, child)
        time.sleep(1.0)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert child.returncode == StoppedError.exit_code
    assert metrics(out, "eval") == []
    train([*line, "--resume_from_checkpoint", "latest"])
    assert metrics(out, "eval") == metrics(tmp_path / "whole", "eval")
    assert metrics(out) == metrics(tmp_path / "whole")


def test_a_save_that_outlasts_the_launcher_is_told_once(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlft import recovery

    monkeypatch.setattr(recovery, "LAUNCHER_PATIENCE", 0.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    train(words(tiny(), write_data(tmp_path), tmp_path / "out", max_steps=3, save_steps=1))
    said = capsys.readouterr().out
    assert said.count("PET_SHUTDOWN_TIMEOUT=") == 1
