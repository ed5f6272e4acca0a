"""Held-out loss, generated answers and scripts, trackers, the second stage: what a run does beside its steps."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, ledger, metrics, start, train, write_data

from vlft.data.prepare import Data
from vlft.errors import ConfigError, TrainingError
from vlft.export import merged
from vlft.metrics import Prediction
from vlft.metrics.exact_match import evaluate as exact_match
from vlft.models.forward import PackedVLM
from vlft.models.load import load_hf, open_checkpoint, source_of
from vlft.setup import Job

MY_METRIC = """
def evaluate(predictions):
    assert all(p.question and p.reference and isinstance(p.record, dict) for p in predictions)
    return {"mean_length": sum(len(p.prediction) for p in predictions) / len(predictions)}
"""


@pytest.fixture
def two_sets(tmp_path: Path) -> Path:
    write_data(tmp_path, 16, name="train")
    return write_data(tmp_path, 5, name="held", seed=1, split="eval")


def test_an_evaluation_is_written_for_each_dataset_and_script(
    tiny: Callable[..., Path], tmp_path: Path, two_sets: Path
) -> None:
    (tmp_path / "my_metric.py").write_text(MY_METRIC)
    scripts = f"held:exact_match,{tmp_path / 'my_metric.py'}"
    options = {"eval_steps": 2, "max_steps": 4, "train_split_ratio": 0.7, "eval_dataset_scripts": scripts}
    train(command(tiny(), two_sets, tmp_path / "out", "lora", per_device_eval_batch_size=3, **options))
    lines = metrics(tmp_path / "out", "eval")
    assert [line["step"] for line in lines] == [2, 4]
    keys = {"eval/train/loss", "eval/held/loss", "eval/held/exact_match/exact_match", "eval/held/my_metric/mean_length"}
    assert keys <= set(lines[0])
    written = (tmp_path / "out/eval/step-000004/held.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in written] == [f"r{i}" for i in range(5)]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_held_out_loss_is_the_plain_mean_over_supervised_tokens(
    tiny: Callable[..., Path], tmp_path: Path, two_sets: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlft import train as story

    jobs: list[Job] = []
    real = story.fit
    monkeypatch.setattr(story, "fit", lambda job: (jobs.append(job), real(job)))
    train(command(tiny(), two_sets, tmp_path / "out", "lora", max_steps=1, per_device_eval_batch_size=batch))
    (job,) = jobs
    data: Data = job.data
    losses = []
    for row in (r for s in data.eval_steps(["held"]) for r in s.rows):
        with torch.no_grad():
            losses.append(job.packed.eval()(**job.inputs(row, False)))
    assert metrics(tmp_path / "out", "eval")[0]["eval/held/loss"] == pytest.approx(float(torch.cat(losses).mean()))


def test_greedy_answers_equal_hugging_faces_generate_one_by_one(
    tiny: Callable[..., Path], tmp_path: Path, two_sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched and left-padded here, alone there: the texts are the same, and training goes on unharmed."""
    from vlft import evaluate
    from vlft import train as story

    jobs: list[Job] = []
    monkeypatch.setattr(story, "fit", jobs.append)
    monkeypatch.setattr(story, "hand_over", lambda job: None)
    monkeypatch.setattr(story.recovery, "judge", lambda job: None)
    train(command(tiny(), two_sets, tmp_path / "out", "full", per_device_eval_batch_size=5))
    job = jobs[0]
    job.packed.eval()
    tokenizer = job.data.chat.tokenizer
    (row,) = [r for s in job.data.eval_steps(["held"]) for r in s.rows]
    made = evaluate.generate(job.model, row, job.inputs, tokenizer, 8)
    assert len(made) == 5
    plain: Any = load_hf(tiny(), "cpu")
    borders, pixels = row.cu_seqlens.tolist(), job.inputs(row, False)["pixel_values"]
    patches = [int(g.prod()) for g in row.image_grid_thw]
    for i, (begins, end) in enumerate(pairwise(borders)):
        ids, labels = row.input_ids_T[:, begins:end], row.labels_T[0, begins:end]
        first, _ = evaluate._last_answer(labels)
        mine = [k for k, s in enumerate(row.image_sample.tolist()) if s == i]
        own = {}
        if mine:
            begin = sum(patches[: mine[0]])
            own = {"pixel_values": pixels[begin : begin + sum(patches[k] for k in mine)]}
            own["image_grid_thw"] = row.image_grid_thw[mine]
        prompt = ids[:, :first]
        out = plain.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
            mm_token_type_ids=(prompt == plain.config.image_token_id).int(), **own,
        )  # fmt: skip
        assert tokenizer.decode(out[0, first:], skip_special_tokens=True) == made[i][1]
    references = [reference for _, _, reference in made]
    assert sorted(references)[0] in ("blue square", "describe", "green square", "red square", "grey square")


def test_a_held_out_sample_that_cannot_be_decoded_is_in_the_ledger(
    tiny: Callable[..., Path], tmp_path: Path, two_sets: Path
) -> None:
    out = tmp_path / "out"
    options = {"max_steps": 2, "eval_steps": 1, "max_bad_fraction": 0.5}
    train(command(tiny(), two_sets, tmp_path / "first", "lora", **options))
    broken = tmp_path / "images" / "held-0-0.png"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])  # the header is whole
    train(command(tiny(), two_sets, out, "lora", **options))
    (line,) = ledger(out)  # once, though two evaluations met it
    assert (line["dataset"], line["id"], line["step"]) == ("held", "r0", 1)
    assert "eval/held/loss" in metrics(out, "eval")[0]


def test_a_part_that_no_data_reached_is_told(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text alone: the vision tower cannot train, whatever the strategy promises."""
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red square"}]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    registry = tmp_path / "registry.json"
    registry.write_text(json.dumps({"datasets": {"text": {"json_path": "text.jsonl"}}}))
    with pytest.raises(TrainingError, match="not proved to have trained: vit"):
        train(command(tiny(), registry, tmp_path / "vit", "vit_only", max_steps=2))
    assert not (tmp_path / "vit/model").exists()
    train(command(tiny(), registry, tmp_path / "full", "full", max_steps=2))
    assert "WARNING: not proved to have trained: vit, projector" in capsys.readouterr().out
    assert json.loads((tmp_path / "full/model/vlft.json").read_text())["unproved"] == ["vit", "projector"]


def test_scripts_that_cannot_work_end_the_run_before_its_first_step(
    tiny: Callable[..., Path], tmp_path: Path, two_sets: Path
) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    for scripts, said in (
        (f"held:{tmp_path / 'broken.py'}", "nothing_of_that_name"),
        ("train:exact_match", "held-out"),
    ):
        words = command(tiny(), two_sets, tmp_path / "out", "lora", eval_dataset_scripts=scripts)
        with pytest.raises(ConfigError, match=said):
            train(words)
    assert not (tmp_path / "out").exists()


def test_exact_match_normalises_as_squad_does() -> None:
    pairs = [("The Red circle.", "red circle"), ("blue", "green"), ("7", " 7 "), ("an", "")]
    made = [Prediction(str(i), "q", p, r, (), {}) for i, (p, r) in enumerate(pairs)]
    assert exact_match(made) == {"exact_match": 0.75, "strict": 0.25}
    assert exact_match([]) == {}


def wandb_records(raw: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: a 7-byte head, then LevelDB's log format in blocks of 32 KiB."""
    assert raw[:4] == b":W&B"
    at, block, parts = 7, 32768, b""
    while at + 7 <= len(raw):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def finished_records(file: Path, kind: Any) -> list[Any]:
    """All records, once the last is there: wandb's service may still write when the run's process goes on."""
    for _ in range(60):
        records = []
        for raw in wandb_records(file.read_bytes()):
            records.append(kind())
            records[-1].ParseFromString(raw)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.5)
    raise AssertionError(f"{file} has no exit record after 30 s")


def test_wandb_gets_what_metrics_jsonl_gets(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real wandb in offline mode; the run is read back from the file that it left."""
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"use_wandb": True, "wandb_project": "shapes", "wandb_run_name": "first", "max_steps": 3}
    train(command(tiny(), write_data(tmp_path), tmp_path / "out", "lora", **options))
    (file,) = tmp_path.rglob("*.wandb")
    losses, names = [], set()
    for record in finished_records(file, wandb_internal_pb2.Record):
        if record.WhichOneof("record_type") == "run":
            names |= {record.run.project, record.run.display_name}
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        if "train/loss" in items:
            losses.append(json.loads(items["train/loss"]))
    assert losses == [m["loss"] for m in metrics(tmp_path / "out")]
    assert {"shapes", "first"} <= names


def test_a_second_stage_starts_from_the_merged_result_of_the_first(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    train(command(tiny(), registry, first, "lora_llm_full_vit", learning_rate_llm=2e-3, learning_rate_vit=1e-3))
    train(command(first / "model", registry, second, "qlora", max_steps=2))
    assert metrics(second)[0]["loss"] < metrics(first)[0]["loss"]
    whole: Any = merged(first / "model")
    base: Any = load_hf(second / "base", "cpu")
    pairs = zip(whole.named_parameters(), base.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    source = source_of(open_checkpoint(str(second / "base")), "no", torch.device("cpu"))
    assert PackedVLM(merged(second / "model"), source.parts, source.config.image_token_id)


@pytest.mark.parametrize("layout", [None, "zero3"])
def test_two_processes_answer_as_one_does(
    tiny: Callable[..., Path], tmp_path: Path, two_sets: Path, layout: str | None
) -> None:
    """Five questions on two ranks: one has a turn without any, and under ZeRO-3 must call every layer all the same."""
    options = {"max_steps": 1, "eval_dataset_scripts": "held:exact_match", "mixed_precision": "no"}
    train(command(tiny(), two_sets, tmp_path / "one", "full", per_device_eval_batch_size=2, **options))
    more = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "deepspeed": layout}
    start(command(tiny(), two_sets, tmp_path / "two", "full", **options, **more), processes=2)
    for name in ("one", "two"):
        assert len((tmp_path / name / "eval/step-000001/held.jsonl").read_text().splitlines()) == 5
    a, b = (metrics(tmp_path / name, "eval")[0] for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in a if key.startswith("eval/"))
    answers = [(tmp_path / name / "eval/step-000001/held.jsonl").read_text() for name in ("one", "two")]
    assert answers[0] == answers[1]
