"""A run that starts from an earlier run's adapter merges it into output_dir/base first: that very adapter, as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, metrics, start, train, write_data
from safetensors.torch import load_file, save_file

from vlft import train as story
from vlft.cli import main


class Stop(Exception):
    """As a kill before the first step."""


def base_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "base/model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def adapters(tiny: Callable[..., Path], tmp_path: Path) -> tuple[Path, list[Path]]:
    """The registry, and two results of `lora`."""
    registry = write_data(tmp_path, 8)
    for seed in (1, 2):
        train(
            command(tiny(), registry, tmp_path / f"run{seed}", "lora", max_steps=2, seed=seed, learning_rate_llm=1e-2)
        )
    return registry, [tmp_path / f"run{seed}/model" for seed in (1, 2)]


def test_a_start_that_failed_leaves_no_base_to_the_next(
    adapters: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, (one, two) = adapters

    def words(adapter: Path, out: str) -> list[str]:
        more: dict[str, Any] = {"resume_from_checkpoint": "latest", "max_steps": 2, "save_steps": 1}
        return command(adapter, registry, tmp_path / out, "vit_only", **more)

    with monkeypatch.context() as patched:
        patched.setattr(story, "train_step", lambda job, step: (_ for _ in ()).throw(Stop))
        for _ in range(2):  # the second finds what the first has merged
            with pytest.raises(Stop):
                train(words(one, "out"))
    train(words(two, "fresh"))
    assert not same(base_of(tmp_path / "out"), base_of(tmp_path / "fresh"))
    train(words(two, "out"))
    assert same(base_of(tmp_path / "out"), base_of(tmp_path / "fresh"))


def test_what_weights_were_trained_on_stays(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The adapter trained on under the same path is another one: neither a resume nor a look at the run takes that."""
    registry, (one, _) = adapters
    out = tmp_path / "out"
    train(command(one, registry, out, "vit_only", max_steps=2))
    before = base_of(out)
    file = one / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    train(command(one, registry, out, "vit_only", max_steps=3, resume_from_checkpoint="latest"))
    assert main(["verify", str(out / "model"), "--against", str(out)]) == 0
    assert main(["export", str(out), "--checkpoint", "latest", "--output_dir", str(tmp_path / "e")]) == 0
    assert same(base_of(out), before)


def test_a_base_that_was_half_deleted_is_made_again(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    registry, (one, _) = adapters
    (tmp_path / "out/base").mkdir(parents=True)
    (tmp_path / "out/base/tokenizer.json").write_text("{}")
    train(command(one, registry, tmp_path / "out", "vit_only", max_steps=1, resume_from_checkpoint="latest"))
    assert base_of(tmp_path / "out")


@pytest.mark.slow
def test_a_second_stage_under_zero3(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The base that one process merges into was to be cut up over all, which ended the start."""
    registry, (one, _) = adapters
    for out, layout in (("whole", None), ("cut", "zero3")):
        words = command(one, registry, tmp_path / out, "vit_only", max_steps=1, deepspeed=layout, mixed_precision="no")
        start(words, processes=2)
    assert same(base_of(tmp_path / "whole"), base_of(tmp_path / "cut"))
    losses = [[step["loss"] for step in metrics(tmp_path / out)] for out in ("whole", "cut")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
