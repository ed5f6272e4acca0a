"""A run folder is read as far as it goes: half a line, half a folder, values that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlft.errors import ConfigError
from vlft.metrics import lower_is_better
from vlft.report.read import RunFacts, higher_is_better, read


def _run(folder: Path, *lines: object) -> RunFacts:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return read(folder)


def _train(step: int, loss: object = 1.0, **more: object) -> dict[str, object]:
    return {"schema": 1, "step": step, "kind": "train", "loss": loss, **more}


def test_a_whole_folder(a_run: Path) -> None:
    run = read(a_run)
    assert run.last_step == 240
    assert len(run.curves["loss"].steps) == 240
    assert set(run.curves) >= {
        "dataset_loss/parts",
        "grad_norms/vit",
        "learning_rate/llm",
        "perf/mfu",
        "perf/step_seconds",
    }
    assert run.evals["eval/parts/box_iou/mean_iou"].steps[0] == 0
    assert run.best is not None
    assert run.best.higher
    assert (run.before_step, run.after_step) == (0, run.best.step)
    assert run.data.datasets["charts"] == (2658, 140)
    assert len(run.unused) == 4
    assert run.proved["projector"] == (1, 5, 5)
    gasket = next(s for s in run.gallery if s.id == "gasket")
    assert gasket.before == "(90,120),(800,910)"
    assert gasket.after is not None
    assert gasket.pictures[0].width == 1120


def test_torn_and_strange_lines(tmp_path: Path) -> None:
    whole = json.dumps(_train(3, 0.5))
    run = _run(
        tmp_path, _train(1), "not json", "[1]", _train(2, None), {"kind": "train"}, _train(4, float("nan")),
        _train(5, float("inf")), _train(6, "high"), _train(7, True), whole, whole[: len(whole) // 2],
    )  # fmt: skip
    assert run.curves["loss"].steps == (1, 3)


def test_a_step_written_again_counts_once(tmp_path: Path) -> None:
    run = _run(tmp_path, _train(1, 3.0), _train(2, 2.0), _train(2, 1.0))
    assert run.curves["loss"].values == (3.0, 1.0)


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    for name in ("run_card.json", "data.json", "best.json", "run.yaml"):
        (tmp_path / name).write_text("[1, 2")
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "gallery.json").write_text('{"samples": [1, {"pictures": 3}, {"pictures": [{"file": 4}]}]}')
    (tmp_path / "ledger.jsonl").write_bytes(b'{"dataset": "a", "id": 7, "reason": "x\xff"}\n{"data')
    run = _run(tmp_path)
    assert (run.options, run.card, run.best, run.data.tokens) == ({}, {}, None, None)
    assert [s.pictures for s in run.gallery] == [(), (), ()]
    assert [e.id for e in run.unused] == ["7"]


@pytest.mark.parametrize("counts", [[1], [1, 2, 3], [1, None], "12", [0, 0]])
def test_a_histogram_that_is_none(tmp_path: Path, counts: object) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"tokens": {"edges": [0, 1, 2], "counts": counts}}))
    assert _run(tmp_path).data.tokens is None


def test_pictures_stay_in_the_gallery(tmp_path: Path) -> None:
    """A folder that someone sent cannot make the page carry other files of the disk on."""
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    jpeg = b"\xff\xd8\xff" + b"0" * 20
    (tmp_path / "secret.jpg").write_bytes(jpeg)
    (gallery / "good.jpg").write_bytes(jpeg)
    (gallery / "text.jpg").write_text("password")
    (gallery / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "text.jpg", "link.jpg", "absent.jpg", "", ".", "good.jpg"]
    pictures = [{"file": name, "width": 8, "height": 8} for name in names]
    (gallery / "gallery.json").write_text(json.dumps({"samples": [{"dataset": "../..", "pictures": pictures}]}))
    assert len(_run(tmp_path).gallery[0].pictures) == 1


@pytest.mark.parametrize(
    ("steps", "best", "expected"),
    [([0, 4, 8], None, (0, 8)), ([0, 4, 8], 4, (0, 4)), ([8], None, (None, 8)), ([0], None, (0, None)),
     ([0, 8], 0, (0, 8)), ([], None, (None, None)), ([4, 8], None, (4, 8))],
)  # fmt: skip
def test_before_and_after(
    tmp_path: Path, steps: list[int], best: int | None, expected: tuple[int | None, int | None]
) -> None:
    for step in steps:
        (tmp_path / "eval" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "eval" / f"step-{step:06d}" / "toy.jsonl").write_text("")
    if best is not None:
        (tmp_path / "best.json").write_text(json.dumps({"metric": "eval/toy/loss", "step": best, "value": 1.0}))
    run = _run(tmp_path, *({"step": step, "kind": "eval"} for step in steps))
    assert (run.before_step, run.after_step) == expected


def test_answers_of_a_left_course_are_not_shown(tmp_path: Path) -> None:
    """A resume from step 5 cuts metrics.jsonl; the answers of step 6 are of the course that it left."""
    for step in (0, 4, 6):
        folder = tmp_path / "eval" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "toy.jsonl").write_text(json.dumps({"id": "a", "prediction": f"of {step}"}))
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery/gallery.json").write_text(json.dumps({"samples": [{"dataset": "toy", "id": "a"}]}))
    run = _run(tmp_path, {"step": 0, "kind": "eval"}, {"step": 4, "kind": "eval"}, _train(5))
    assert (run.before_step, run.after_step) == (0, 4)
    assert [(shown.before, shown.after) for shown in run.gallery] == [("of 0", "of 4")]


@pytest.mark.parametrize("name", ["loss", "perplexity", "char_error", "error_free", "invalid", "f1", "edit_distance"])
def test_the_report_and_a_run_agree_on_the_direction(name: str) -> None:
    assert higher_is_better(f"eval/a/m/{name}") is not lower_is_better(f"eval/a/m/{name}")


def test_direction_of_a_metric(tmp_path: Path) -> None:
    assert higher_is_better("eval/a/exact_match/strict")
    assert not higher_is_better("eval/a/loss")
    assert not higher_is_better("eval/a/wer/wer")
    # best.json knows better than the name.
    evals = [{"step": s, "kind": "eval", "eval/a/m/score": v} for s, v in ((1, 5.0), (2, 3.0))]
    (tmp_path / "best.json").write_text(json.dumps({"metric": "eval/a/m/score", "step": 2, "value": 3.0}))
    run = _run(tmp_path, *evals)
    assert run.best is not None
    assert not run.best.higher
    (tmp_path / "best.json").write_text(
        json.dumps({"metric": "eval/a/m/score", "step": 2, "value": 3.0, "greater_is_better": True})
    )
    run = _run(tmp_path, *evals)
    assert run.best is not None
    assert run.best.higher


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        read(tmp_path)
    with pytest.raises(ConfigError):
        read(tmp_path / "absent")
