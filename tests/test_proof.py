"""What the first steps of a run prove, and what they cannot say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import command, train, write_data

from vlft.errors import TrainingError


def data(folder: Path, *, behind: Callable[[int], bool]) -> Path:
    """Eight records; the pictures of those that `behind` says stand behind everything that is learnt."""
    registry = write_data(folder, 8, counts=(1,))
    lines = []
    for n in range(8):
        asked = [{"role": "user", "content": "<image>describe"}]
        turns: list[dict[str, Any]] = [*asked, {"role": "assistant", "content": "a blue circle"}]
        if behind(n):
            first = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "the red square"}]
            turns = [*first, *asked, {"role": "assistant", "content": "a blue circle", "loss": False}]
        lines.append(json.dumps({"id": f"r{n}", "messages": turns, "images": [f"toy-{n}-0.png"]}) + "\n")
    (folder / "toy.jsonl").write_text("".join(lines))
    return registry


@pytest.mark.parametrize("seed", [0, 2])  # the first step has a picture that nothing learnt follows, or another one
def test_a_picture_that_no_learnt_token_follows_proves_nothing(
    tiny: Callable[..., Path], tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = data(tmp_path, behind=lambda n: n % 2 == 1)
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 8, "seed": seed}
    train(command(tiny(), registry, tmp_path / "out", "vit_only", **one))
    assert " proved " in capsys.readouterr().out


def test_a_run_whose_pictures_stand_all_behind_says_so(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = data(tmp_path, behind=lambda _: True)
    with pytest.raises(TrainingError, match=r"not proved to have trained: .*no step with pictures reached them"):
        train(command(tiny(), registry, tmp_path / "out", "vit_only", max_steps=2))
