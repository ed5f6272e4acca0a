"""`vlft augment-preview`: the sheet is there, shows what a run would see, and wrong words are told before torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import command, metrics, train, write_data

from vlft import preview as module
from vlft.commands import COMMANDS, parse_command
from vlft.errors import CheckpointError, ConfigError

POLICY = "ops:\n  - RandomHorizontalFlip: {p: 0.5}\n  - RandomGaussianNoise: {p: 0.5, std: 0.02}\n"


def write_boxes(folder: Path) -> Path:
    """Black rectangles on white, their boxes asked for; one sample speaks of the left."""
    (folder / "images").mkdir()
    with (folder / "boxes.jsonl").open("w") as out:
        for k in range(4):
            pixels = np.full((168, 224, 3), 255, np.uint8)
            pixels[40:100, 20 + 30 * k : 80 + 30 * k] = 0
            Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
            answer = json.dumps({"bbox_2d": [20 + 30 * k, 40, 80 + 30 * k, 100]})
            question = "<image>find" if k else "<image>find the left one"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"id": f"b{k}", "messages": turns, "images": [f"{k}.png"]}) + "\n")
    registry = folder / "registry.json"
    spec = {"json_path": "boxes.jsonl", "image_root": "images", "box_format": "pixels", "split": "train"}
    registry.write_text(json.dumps({"datasets": {"boxes": spec}}))
    return registry


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_sheet_with_boxes(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    drawn: list[tuple[np.ndarray, list[tuple[float, ...]]]] = []
    real = module.draw_places

    def noted(pixels: object, places: list[tuple[float, ...]]) -> Image.Image:
        drawn.append((pixels.numpy(), places))  # type: ignore[attr-defined]
        return real(pixels, places)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "draw_places", noted)
    words = [str(tiny(family)), "--augmentation", "geometric", "--dataset_config_path", str(write_boxes(tmp_path))]
    words += ["--output", str(tmp_path / "sheet.png"), "--samples", "4", "--epochs", "3", "--train_split_ratio", "1"]
    options = parse_command(COMMANDS["augment-preview"], [*words, "--cache_dir", str(tmp_path / "cache")])
    COMMANDS["augment-preview"].run(options)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert sheet.shape[1] > 4 * module.CELL
    assert (sheet == (209, 36, 47)).all(-1).sum() > 16 * 100, "sixteen boxes are drawn"
    assert len(drawn) == 16
    for pixels, places in drawn:
        (box,) = places
        dark = np.argwhere(pixels[0] < 110)
        (y1, x1), (y2, x2) = dark.min(0), dark.max(0) + 1
        ends = [n * pixels.shape[2 - k % 2] for k, n in enumerate(box)]
        assert np.abs(np.array(ends) - (x1, y1, x2, y2)).max() < 5


def test_wrong_words_are_told_at_once(tmp_path: Path) -> None:
    words = [str(tmp_path), "--augmentation", "docment", "--dataset_config_path", "none.json", "--output", "a.txt"]
    with pytest.raises(ConfigError) as caught:
        parse_command(COMMANDS["augment-preview"], words)
    said = "\n".join(caught.value.problems)
    for part in ("--augmentation docment", "the nearest is 'document'", "none.json: there is no such file", "a.txt"):
        assert part in said


def test_a_changed_policy_is_no_resume(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path, 20)
    (tmp_path / "own.yaml").write_text(POLICY)
    own = {"augmentation": tmp_path / "own.yaml"}
    train(command(tiny(), registry, tmp_path / "out", "lora", max_steps=2, save_steps=1, **own))
    again = command(tiny(), registry, tmp_path / "out", "lora", max_steps=3, resume_from_checkpoint="latest", **own)
    (tmp_path / "own.yaml").write_text(POLICY.replace("0.02", "0.03"))
    with pytest.raises(CheckpointError, match=r"the augmentation policy .*own\.yaml is not that of"):
        train(again)
    (tmp_path / "own.yaml").write_text(POLICY)
    train(again)
    assert len(metrics(tmp_path / "out")) == 3


def test_a_run_with_moving_boxes_resumes_exactly(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Tokens of a step change with the epoch; stopped and gone on with, or in one go, they are the same."""
    registry = write_boxes(tmp_path)
    options = {"augmentation": "geometric", "per_device_train_batch_size": 2, "save_steps": 3}
    train(command(tiny(), registry, tmp_path / "whole", "lora", max_steps=6, **options))
    train(command(tiny(), registry, tmp_path / "cut", "lora", max_steps=6, num_workers=2, **options))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    back = tmp_path / "cut/checkpoints/step-000003"
    train(command(tiny(), registry, tmp_path / "cut", "lora", max_steps=6, resume_from_checkpoint=back, **options))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert len({line["tokens"] for line in metrics(tmp_path / "whole")}) > 1, "no movement changed a length"
