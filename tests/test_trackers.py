"""Trackers, each real and offline, read back from what it left on the disk."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from PIL import Image
from runs import command, metrics, start, train, write_data

from vlft.errors import ConfigError
from vlft.trackers import PATIENCE, Trackers, flattened, side_by_side

RATES = {"learning_rate_llm": 2e-3, "learning_rate_vit": 1e-3}
FIXED = {"lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.fixture(autouse=True)
def state() -> None:
    """Accelerate's trackers ask it which process is the main one; a run's engine has made it."""
    PartialState()


def words(model: Path, folder: Path, **more: Any) -> list[str]:
    registry = folder / "registry.json"
    options = {"max_steps": 3, "save_steps": 2, **RATES, **FIXED} | more
    return command(
        model, registry if registry.exists() else write_data(folder), folder / "out", "lora_llm_full_vit", **options
    )


def perf(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    return [line["perf"] for line in lines if line["kind"] == "train"]


def expected(folder: Path) -> dict[str, list[float]]:
    """Series that every tracker must have, by their name."""
    lines = metrics(folder / "out")
    found = {"train/loss": [line["loss"] for line in lines]}
    for key in ("grad_norms", "learning_rate"):
        found |= {f"{key}/{part}": [line[key][part] for line in lines] for part in ("llm", "vit", "projector")}
    for name in ("tokens_per_second", "samples_per_second", "data_wait_seconds", "peak_memory_gib"):
        found[f"perf/{name}"] = [one[name] for one in perf(folder)]
    return found


# Weights & Biases ----------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import wandb

    wandb.teardown()  # its service remembers the folder of its first run
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def wandb_records(raw: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: a 7-byte head, then LevelDB's log format in blocks of 32 KiB."""
    at, block, parts = 7, 32768, b""
    assert raw[:4] == b":W&B"[: len(raw)]
    while at + 7 <= len(raw):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        if at + 7 + length > len(raw):
            return  # still being written
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def finished_records(file: Path) -> list[Any]:
    """All records, once the last is there: wandb's service may still write when the run's process goes on."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(60):
        records = []
        for raw in wandb_records(file.read_bytes()):
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(raw)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.5)
    raise AssertionError(f"{file} has no exit record after 30 s")


def history(records: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for record in records:
        for item in record.history.item:
            name = "/".join(item.nested_key) or item.key
            found.setdefault(name, []).append(json.loads(item.value_json))
    return found


def test_wandb_gets_every_series_and_the_options(tiny: Callable[..., Path], offline: Path) -> None:
    names = {"use_wandb": True, "wandb_project": "shapes", "wandb_run_name": "first"}
    held_out = {"train_split_ratio": 0.8, "eval_dataset_scripts": "toy:exact_match", "eval_max_new_tokens": 3}
    train(words(tiny(), offline, **names, **held_out, eval_on_start="false"))
    (file,) = offline.rglob("*.wandb")
    records = finished_records(file)
    found = history(records)
    assert found["_step"] == [1, 2, 3]
    for name, values in expected(offline).items():
        assert found[name] == pytest.approx(values), name
    groups = {name: values for name, values in found.items() if name.startswith("learning_rate_group/")}
    assert len(groups) >= 3
    assert all(set(values) <= {2e-3, 1e-3, 1e-4} for values in groups.values())
    assert found["eval/toy/loss"] == [metrics(offline / "out", "eval")[0]["eval/toy/loss"]]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {"shapes"} == {run.project for run in runs}
    assert {"first"} == {run.display_name for run in runs}
    (artifact,) = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    assert any(entry.path.endswith(".png") for entry in artifact.manifest.contents)  # the gallery's pictures
    options = {u.key: json.loads(u.value_json) for r in records for u in (*r.run.config.update, *r.config.update)}
    assert options["lr_scheduler_type"] == "constant"


@pytest.mark.slow
def test_a_resume_goes_on_with_the_run_at_wandb(tiny: Callable[..., Path], offline: Path) -> None:
    for more in ({"max_steps": 2}, {"resume_from_checkpoint": "latest"}):
        start(words(tiny(), offline, report_to="wandb", **more))
    known = json.loads((offline / "out/trackers.json").read_text())["wandb"]
    files = sorted(offline.rglob("*.wandb"))
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{known['id']}"}
    assert [history(finished_records(file))["_step"] for file in files] == [[1, 2], [3]]


def test_predictions_become_a_table_with_pictures(offline: Path) -> None:
    from wandb.sdk.wandb_run import Run

    for colour in ("red", "blue"):
        Image.new("RGB", (90, 60), colour).save(offline / f"{colour}.jpg")
    both = [offline / f"{colour}.jpg" for colour in ("red", "blue")]
    rows = [SimpleNamespace(id=f"r{i}", question="what", prediction="red", reference="blue") for i in range(40)]
    pictures = {("toy", "r38"): both[:1], ("toy", "r39"): both, ("other", "r0"): both}
    trackers = Trackers(
        ["wandb"], offline / "out", project=None, run_name=None, done_steps=0, options={}, thumbnails=lambda: pictures
    )
    trackers.start()
    assert isinstance(trackers._running["wandb"].run, Run)
    trackers.log({"step": 1, "kind": "train", "loss": 1.0})
    trackers.predictions(1, "toy", rows)
    trackers.close()
    (file,) = offline.rglob("*.wandb")
    records = finished_records(file)
    found = history(records)
    kind = [found[f"predictions/toy/{name}"] for name in ("_type", "nrows", "ncols")]
    assert kind == [["table-file"], [32], [5]]
    (artifact,) = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    table = json.loads(files["predictions/toy.table.json"].read_text())
    assert table["columns"] == ["id", "pictures", "question", "reference", "prediction"]
    first, second, third = table["data"][:3]
    assert [row[0] for row in table["data"]] == ["r38", "r39", *(f"r{i}" for i in range(30))]
    assert third == ["r0", None, "what", "blue", "red"]
    for shown, size, colour in ((first[1], (90, 60), (254, 0, 0)), (second[1], (180, 60), (254, 0, 0))):
        with Image.open(files[shown["path"]]) as picture:
            assert picture.size == size == (shown["width"], shown["height"])
            assert picture.convert("RGB").getpixel((5, 5)) == colour


def test_small_pictures_stand_side_by_side(tmp_path: Path) -> None:
    Image.new("L", (3000, 1000), 7).save(tmp_path / "a.png")
    Image.new("RGB", (10, 20), "red").save(tmp_path / "b.png")
    whole = side_by_side([tmp_path / "a.png", tmp_path / "b.png"])
    assert whole is not None
    assert whole.size == (768 + 10, 256)
    assert whole.getpixel((0, 0)) == (7, 7, 7)
    assert whole.getpixel((770, 5)) == (255, 0, 0)
    assert side_by_side([]) is None


# TensorBoard ---------------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_series_and_a_resume_no_step_twice(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(words(tiny(), tmp_path, report_to="tensorboard", max_steps=3, save_steps=2))
    kept = tmp_path / "out/checkpoints/step-000002"
    train(words(tiny(), tmp_path, report_to="tensorboard", max_steps=4, resume_from_checkpoint=kept))
    read = EventAccumulator(str(tmp_path / "out/tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    series = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    for name, values in expected(tmp_path).items():
        assert [event.step for event in series[name]] == [1, 2, 3, 4], name
        assert [event.value for event in series[name]] == pytest.approx(values, rel=1e-6)
    assert any(name.startswith("learning_rate_group/") for name in series)
    text = read.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lr_scheduler_type: constant" in text


# trackio -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not in dev: it wants pillow < 13")
def test_trackio_has_every_series_and_a_resume_the_same_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import sqlite3

    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    names = {"report_to": "trackio", "wandb_project": "shapes", "wandb_run_name": "first"}
    for more in ({"max_steps": 2}, {"resume_from_checkpoint": "latest"}):
        start(words(tiny(), tmp_path, **names, **more), **env)
    (file,) = (tmp_path / "trackio").glob("shapes.db")
    with sqlite3.connect(file) as store:
        rows = store.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in rows} == {"first"}
    found: dict[str, list[Any]] = {}
    for _, step, text in rows:
        for name, value in (json.loads(text) | {"step": step}).items():
            found.setdefault(name, []).append(value)
    assert found["step"] == [1, 2, 3]
    for name, values in expected(tmp_path).items():
        assert found[name] == pytest.approx(values), name


# What goes wrong -----------------------------------------------------------------------------------------------------


def made(folder: Path, *names: str) -> Trackers:
    return Trackers(names, folder, project=None, run_name=None, done_steps=0, options={})


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_one_that_is_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"--report_to {name} needs {name}: pip install 'vlft\[{name}\]'"):
        made(tmp_path, name).start()


def test_one_that_cannot_start_is_an_error_and_leaves_no_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match="--report_to wandb cannot start: CommError: no route to host"):
        made(tmp_path / "out", "tensorboard", "wandb").start()
    assert not (tmp_path / "out").exists()


class Failing:
    def __init__(self, times: int) -> None:
        self.left, self.got = times, 0

    def log(self, values: Any, step: int) -> None:
        self.left -= 1
        if self.left >= 0:
            raise ConnectionError("the network is down")
        self.got += 1

    def finish(self) -> None:
        raise ConnectionError("still down")


@pytest.mark.parametrize(("times", "got"), [(3, 17), (PATIENCE, 0)])
def test_one_that_fails_later_is_told_once_and_does_not_end_the_run(tmp_path: Path, times: int, got: int) -> None:
    trackers, said = made(tmp_path), []
    trackers.warn = said.append
    failing, fine = Failing(times), Failing(0)
    trackers._running = {"wandb": failing, "trackio": fine}
    for step in range(1, 21):
        trackers.log({"step": step, "kind": "train", "loss": 1.0})
    assert (failing.got, fine.got) == (got, 20)
    assert "wandb failed (ConnectionError: the network is down); the run goes on" in said[0]
    assert len(said) == (1 if got else 2)
    trackers.close()


def test_what_a_line_becomes() -> None:
    line = {"schema": 1, "step": 4, "kind": "train", "loss": None, "skipped": "not_finite", "perf": {"mfu": 0.4}}
    assert flattened(line) == {"train/skipped": "not_finite", "perf/mfu": 0.4}
    assert flattened({"step": 4, "kind": "eval", "eval/a/loss": 0.5}) == {"eval/a/loss": 0.5}
