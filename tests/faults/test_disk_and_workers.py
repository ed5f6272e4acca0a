"""A full disk, a file that is away for a moment, a data worker killed by the system: one sentence, nothing lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import command, environment, final_weights, launched, ledger, metrics, train, write_data
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vlft import checkpoint
from vlft.data import images, loader, patience
from vlft.errors import CheckpointError, DataError, ModelError, RecordError


def words(model: Path, registry: Path, out: Path, **more: Any) -> list[str]:
    options = {"max_steps": 4, "save_steps": 2, "learning_rate_llm": 1e-4, "mixed_precision": "no"} | more
    return command(model, registry, out, "full", **options)


def same(a: Path, b: Path) -> None:
    one, two = final_weights(a), final_weights(b)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert metrics(a) == metrics(b)


# ---------------------------------------------------------------------------------------------------------------------


def limited(line: list[str], kib: int) -> subprocess.CompletedProcess[str]:
    """A run that cannot write a file beyond so many KiB, as on a full disk; the system refuses the write."""
    argv, env = launched(line)
    shell = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *argv]
    return subprocess.run(shell, capture_output=True, text=True, env=environment(**env), timeout=200, check=False)


def test_a_save_that_does_not_fit_leaves_the_one_before(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry, out = write_data(tmp_path), tmp_path / "out"
    fixed = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    train(words(tiny(), registry, tmp_path / "whole", **fixed))
    train(words(tiny(), registry, out, **fixed, max_steps=2))
    resume = words(tiny(), registry, out, **fixed, resume_from_checkpoint="latest")
    done = limited(resume, 1500)
    assert done.returncode == CheckpointError.exit_code, done.stderr[-2000:]
    assert "the checkpoint of step 4 could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000002"]
    checkpoint.read_state(out / "checkpoints/step-000002")
    train(resume)
    same(tmp_path / "whole", out)


def test_a_result_that_does_not_fit_is_written_by_the_resume(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry, out = write_data(tmp_path), tmp_path / "out"
    train(words(tiny(), registry, out))
    (out / "model" / "old").write_text("the result of before")
    resume = words(tiny(), registry, out, resume_from_checkpoint="latest")
    done = limited(resume, 600)
    assert done.returncode == ModelError.exit_code, done.stderr[-2000:]
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "model" / "old").exists()
    train(resume)
    assert not (out / "model" / "old").exists()
    assert (out / "model" / "model.safetensors").exists()


def test_metrics_on_a_full_disk(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write with the real error."""
    registry, out = write_data(tmp_path), tmp_path / "out"
    real = Path.open
    at = out / "metrics.jsonl"
    full = lambda self, *a, **k: real(Path("/dev/full") if self == at and a[:1] == ("a",) else self, *a, **k)  # noqa: E731
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be written: .*No space left on device"):
        train(words(tiny(), registry, out))


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """away(n): the next n openings of a picture fail as on a network share that is away."""
    monkeypatch.setattr(patience, "DELAYS", (0.0, 0.0, 0.0))
    real, left = images._stream, [0]

    def stream(source: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(source))
        return real(source)

    monkeypatch.setattr(images, "_stream", stream)
    return lambda n: left.__setitem__(0, n)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.fromarray(np.full((40, 60, 3), 7, np.uint8)).save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def test_a_file_that_comes_back_is_used(away: Callable[[int], None], picture: str) -> None:
    for look in (images.probe, images.content_hash, lambda p: images.decode(p, (60, 40)).sum()):
        expected = look(picture)
        away(3)
        assert look(picture) == expected


def test_a_file_that_stays_away_is_told(away: Callable[[int], None], picture: str) -> None:
    away(99)
    with pytest.raises(RecordError, match="could not be reached") as caught:
        images.decode(picture, (60, 40))
    assert caught.value.reason == "unreachable"


def test_in_training_it_costs_its_sample_only(
    tiny: Callable[..., Path], tmp_path: Path, away: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, out = write_data(tmp_path), tmp_path / "out"
    real = loader.decode_sample

    def decode(sample: Any) -> Any:
        away(99 if sample.index == 4 else 0)
        return real(sample)

    monkeypatch.setattr(loader, "decode_sample", decode)
    train(words(tiny(), registry, out, max_bad_fraction=0.1, epochs=1, max_steps=None))
    (line,) = ledger(out)
    assert (line["id"], line["reason"]) == ("r4", "unreachable")
    assert sum(one["samples"] for one in metrics(out)) == 23


def test_while_indexing_it_ends_the_start_and_is_not_remembered(
    tiny: Callable[..., Path], tmp_path: Path, away: Callable[[int], None]
) -> None:
    registry, out = write_data(tmp_path), tmp_path / "out"
    away(10**6)
    with pytest.raises(DataError, match="could not be reached"):
        train(words(tiny(), registry, out))
    away(0)
    train(words(tiny(), registry, out, epochs=1, max_steps=None))
    assert ledger(out) == []


# ---------------------------------------------------------------------------------------------------------------------


def test_killed_workers_are_started_anew(
    tiny: Callable[..., Path], tmp_path: Path, fault: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    registry = write_data(tmp_path, 40)
    more = {"num_workers": 2, "max_steps": 10, "use_data_augmentation": True}
    train(words(tiny(), registry, tmp_path / "whole", **more))
    fault("kills_workers", call=2)
    train(words(tiny(), registry, tmp_path / "killed", **more))
    assert "starting the workers anew, nothing is lost" in capfd.readouterr().err
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), FileNotFoundError(2, "no socket"), EOFError()])
def test_a_worker_that_dies_while_its_step_is_taken_over(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its tensors come through a connection of their own, which breaks before the system says that it is dead."""
    registry, more = write_data(tmp_path, 12), {"num_workers": 1, "max_steps": 3}
    train(words(tiny(), registry, tmp_path / "whole", **more))
    real, calls = _MultiProcessingDataLoaderIter._try_get_data, []

    def breaks(self: Any, *timeout: Any) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise error
        return real(self, *timeout)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", breaks)
    train(words(tiny(), registry, tmp_path / "broken", **more))
    assert len({id(one) for one in calls}) == 2
    same(tmp_path / "whole", tmp_path / "broken")


def test_workers_that_always_die_end_the_run(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "WORKER_DEATHS", 1)
    monkeypatch.setattr(loader, "_leave_signals_to_the_parent", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="lower --num_workers"):
        train(words(tiny(), write_data(tmp_path), tmp_path / "out", num_workers=1))
