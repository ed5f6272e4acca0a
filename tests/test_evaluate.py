"""Held-out loss, generated answers and scripts, trackers, the second stage: what a run does beside its steps."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FSDP_ON_CPU, command, ledger, metrics, start, train, write_data
from safetensors.torch import load_file

from vlft.cli import main
from vlft.data.loader import eval_steps
from vlft.data.prepare import Data
from vlft.data.show import last_answer
from vlft.errors import ConfigError, TrainingError
from vlft.export import merged
from vlft.metrics import Prediction
from vlft.metrics.exact_match import evaluate as exact_match
from vlft.models.forward import PackedVLM
from vlft.models.load import load_hf, open_checkpoint, source_of
from vlft.setup import Job
from vlft.tracking import Best

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
    assert [line["step"] for line in lines] == [0, 2, 4]
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
    made = evaluate.generate(job.model, row, job.inputs, tokenizer, evaluate.Answers(max_new_tokens=8))
    assert len(made) == 5
    plain: Any = load_hf(tiny(), "cpu")
    borders, pixels = row.cu_seqlens.tolist(), job.inputs(row, False)["pixel_values"]
    patches = [int(g.prod()) for g in row.image_grid_thw]
    for i, (begins, end) in enumerate(pairwise(borders)):
        ids, labels = row.input_ids_T[:, begins:end], row.labels_T[0, begins:end]
        first, _ = last_answer(labels.numpy())
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
    references = [job.data.describe(sample).reference for sample, _ in made]
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
    assert exact_match(made) == {"exact_match": 0.5, "strict": 0.25}
    assert exact_match([]) == {}


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


@pytest.fixture(scope="module")
def two_data_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two data sets with three scripts each, a library's among them and a file."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "my_metric.py").write_text(MY_METRIC)
    write_data(folder, 12, name="train")
    write_data(folder, 5, name="held", seed=1, split="eval")
    registry = write_data(folder, 4, name="more", seed=2, split="eval")
    return registry, f"exact_match,chrf,{folder / 'my_metric.py'}"


@pytest.fixture(scope="module")
def by_one_process(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, two_data_sets: tuple[Path, str]
) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    registry, scripts = two_data_sets
    words = command(tiny(), registry, out, "full", per_device_eval_batch_size=2, **evaluated(scripts))
    train(words)
    return out


def evaluated(scripts: str) -> dict[str, Any]:
    names = (f"held:{scripts}", f"more:{scripts}")
    return {"max_steps": 1, "eval_dataset_scripts": names, "mixed_precision": "no", "eval_max_new_tokens": 24}


@pytest.mark.parametrize("layout", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "fsdp2"))])
def test_two_processes_answer_and_score_as_one_does(
    tiny: Callable[..., Path], tmp_path: Path, two_data_sets: tuple[Path, str], by_one_process: Path, layout: str | None
) -> None:
    """Five questions, two ranks: one has a turn without any, and where weights are cut up must call every layer too."""
    registry, scripts = two_data_sets
    more = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1}
    zero = layout if layout == "zero3" else None
    out = tmp_path / "two"
    line = command(tiny(), registry, out, "full", **evaluated(scripts), **more, deepspeed=zero)
    start(line, processes=2, **(FSDP_ON_CPU if layout == "fsdp2" else {}))
    for one, two in zip(metrics(by_one_process, "eval"), metrics(out, "eval"), strict=True):
        assert one.keys() == two.keys()
        assert sum(key.count("/") == 3 for key in one) == 2 * 4, "three scripts for each set, one gives two numbers"
        for key, value in one.items():
            # A loss is a sum in another order; answers are texts.
            assert two[key] == (pytest.approx(value, rel=1e-5) if key.endswith("/loss") else value), key
    for step in ("step-000000", "step-000001"):
        for name, count in (("held", 5), ("more", 4)):
            texts = [(run / "eval" / step / f"{name}.jsonl").read_text() for run in (by_one_process, out)]
            assert texts[0] == texts[1]
            assert len(texts[0].splitlines()) == count


def test_every_held_out_sample_is_used_exactly_once(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = write_data(tmp_path, 9, name="held", split="eval", counts=(1, 0))
    (tmp_path / "train.jsonl").write_text((tmp_path / "held.jsonl").read_text())
    write_data(tmp_path, 2, name="train")
    from vlft import train as story

    jobs: list[Job] = []
    for name in ("fit", "hand_over"):
        monkeypatch.setattr(story, name, jobs.append)
    monkeypatch.setattr(story.recovery, "judge", lambda job: None)
    train(command(tiny(), registry, tmp_path / "out", "lora"))
    data = jobs[0].data
    everyone = data._held_out
    assert len(everyone) == 9
    for n in range(1, 10):
        for ranks in (1, 2, 3):
            for batch in (1, 2):
                parts = []
                for rank in range(ranks):
                    steps = list(
                        eval_steps(data.index, data.fitted, data.chat, everyone[:n], rank=rank, world_size=ranks,
                                   batch_size=batch)
                    )  # fmt: skip
                    parts.append([row.sample_ids for step in steps for row in step.rows])
                used = sorted(i for rows in parts for ids in rows for i in ids)
                assert used == everyone[:n].tolist(), (n, ranks)
                assert len({len(rows) for rows in parts}) == 1, "the ranks' collectives stay in step"


def test_a_limit_takes_the_same_samples_each_time_and_the_loss_takes_all(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    write_data(tmp_path, 8, name="train")
    registry = write_data(tmp_path, 12, name="held", seed=1, split="eval")
    options = {"eval_dataset_scripts": "held:exact_match", "eval_max_new_tokens": 3, "max_steps": 2, "eval_steps": 1}
    train(command(tiny(), registry, tmp_path / "all", "lora", **options))
    train(command(tiny(), registry, tmp_path / "some", "lora", eval_limit=4, **options))
    losses = [[line["eval/held/loss"] for line in metrics(tmp_path / name, "eval")] for name in ("all", "some")]
    assert losses[0] == losses[1]
    asked = []
    for step in range(3):
        lines = (tmp_path / f"some/eval/step-{step:06d}/held.jsonl").read_text().splitlines()
        asked.append([json.loads(line)["id"] for line in lines])
    assert asked[0] == asked[1] == asked[2]
    assert len(set(asked[0])) == 4
    assert asked[0] != [f"r{i}" for i in range(4)], "drawn, not the first of the file"
    gallery = json.loads((tmp_path / "some/gallery/gallery.json").read_text())
    assert [sample["id"] for sample in gallery["samples"]] == asked[0]


def test_greedy_does_not_depend_on_the_neighbours_in_a_batch(
    tiny: Callable[..., Path], tmp_path: Path, two_data_sets: tuple[Path, str]
) -> None:
    """Qwen's checkpoints ask for a repetition penalty and for sampling; a penalty would count a batch's padding."""
    model = tmp_path / "model"
    shutil.copytree(tiny(), model)
    asks = {"do_sample": True, "temperature": 0.9, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.9}
    (model / "generation_config.json").write_text(json.dumps(asks))
    texts = []
    for batch in (1, 5):
        out = tmp_path / f"out{batch}"
        options = {"eval_dataset_scripts": "held:exact_match", "eval_max_new_tokens": 24, "max_steps": 1}
        train(command(model, two_data_sets[0], out, "lora", per_device_eval_batch_size=batch, **options))
        texts.append((out / "eval/step-000000/held.jsonl").read_text())
    assert texts[0] == texts[1]
    plain = tmp_path / "plain"
    train(command(tiny(), two_data_sets[0], plain, "lora", **options))
    assert (plain / "eval/step-000000/held.jsonl").read_text() == texts[0]


BROKEN = {
    "no_words": "def evaluate(made):\n    return {'x': sum(1 / len(p.prediction) for p in made)}",
    "no_number": "def evaluate(made):\n    return {'x': float('nan')}",
    "no_dict": "def evaluate(made):\n    return 0.5",
}


def test_a_script_that_fails_on_a_trial_ends_the_run_before_its_first_step(
    tiny: Callable[..., Path], tmp_path: Path, two_data_sets: tuple[Path, str]
) -> None:
    for name, text in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
    scripts = ",".join(str(tmp_path / f"{name}.py") for name in BROKEN)
    words = command(tiny(), two_data_sets[0], tmp_path / "out", "lora", eval_dataset_scripts=f"held:{scripts}")
    with pytest.raises(ConfigError) as caught:
        train(words)
    said = "\n".join(caught.value.problems)
    for part in ("held: no_words failed", "ZeroDivisionError", "x nan, which is no finite number", "answered float"):
        assert part in said
    assert not (tmp_path / "out").exists()


LATE = """
calls = 0
def evaluate(made):
    global calls
    calls += 1
    if calls == 4 + 3:  # three of the trial
        raise OSError("the judge is away")
    return {"value": (0, 0, 0, 0.5, 0.9, 0.7, 0, 0.8)[calls - 1]}
"""


def test_a_script_that_fails_later_costs_its_number_and_nothing_else(
    tiny: Callable[..., Path], tmp_path: Path, two_data_sets: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    options = {"eval_dataset_scripts": f"held:{tmp_path / 'late.py'}", "max_steps": 4, "eval_steps": 1}
    train(command(tiny(), two_data_sets[0], tmp_path / "out", "lora", eval_max_new_tokens=3, **options))
    lines = metrics(tmp_path / "out", "eval")
    assert [line.get("eval/held/late/value") for line in lines] == [0.5, 0.9, 0.7, None, 0.8]
    assert lines[3]["failed"] == {"held/late": "OSError: the judge is away"}
    assert (tmp_path / "out/eval/step-000003/held.jsonl").exists()
    assert "WARNING: the script held/late failed at step 3" in capsys.readouterr().out


def test_the_best_checkpoint_is_kept_and_becomes_the_result(
    tiny: Callable[..., Path], tmp_path: Path, two_data_sets: tuple[Path, str]
) -> None:
    """Best at step 1, which no --save_steps asks for, and which later saves would delete; on a resume, too."""
    (tmp_path / "late.py").write_text(LATE)
    out = tmp_path / "out"
    options = {
        "eval_dataset_scripts": f"held:{tmp_path / 'late.py'}", "metric_for_best": "held/late/value", "eval_steps": 1,
        "eval_max_new_tokens": 3, "save_steps": 2, "save_total_limit": 1, "learning_rate_llm": 1e-2,
    }  # fmt: skip
    train(command(tiny(), two_data_sets[0], out, "vit_only", **{**options, "learning_rate_llm": None}, max_steps=3))
    best = {"schema": 1, "metric": "eval/held/late/value", "greater_is_better": True, "step": 1, "value": 0.9}
    assert json.loads((out / "best.json").read_text()) == best
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-000001", "step-000003"]
    kept = load_file(next((out / "checkpoints/step-000001").glob("weights*")))
    result = {k: v for f in (out / "model").glob("*.safetensors") for k, v in load_file(f).items()}
    vision = {k: v for k, v in kept.items() if "blocks.0.attn.qkv" in k}
    assert vision
    for name, value in vision.items():
        found = next(v for k, v in result.items() if k.endswith(name.removeprefix("model.")))
        assert torch.equal(found.float(), value.float())

    again = command(tiny(), two_data_sets[0], out, "vit_only", **{**options, "learning_rate_llm": None}, max_steps=5)
    train([*again, "--resume_from_checkpoint", "latest"])
    assert json.loads((out / "best.json").read_text())["step"] == 1
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-000001", "step-000005"]


def test_an_unknown_metric_for_best_is_told_at_the_start(
    tiny: Callable[..., Path], tmp_path: Path, two_data_sets: tuple[Path, str]
) -> None:
    words = command(tiny(), two_data_sets[0], tmp_path / "out", "lora", metric_for_best="held/los")
    with pytest.raises(
        ConfigError, match=r"no metric of this run \(the nearest is 'eval/held/loss'\); it has eval/held"
    ):
        train(words)


def test_vlft_eval_finds_what_the_run_found(
    tmp_path: Path, by_one_process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options come from run.yaml; adapters, whole models and hub folders go the same way."""
    assert main(["eval", str(by_one_process)]) == 2
    said = capsys.readouterr().err  # the run's own script is code, wherever the folder may come from
    assert ".py, which runs code or asks the network" in said
    assert main(["eval", str(by_one_process), "--config", str(by_one_process / "run.yaml")]) == 0
    found = json.loads((by_one_process / "eval/model/metrics.json").read_text())
    last = metrics(by_one_process, "eval")[-1]
    assert found["values"].keys() == {key for key in last if key.startswith("eval/")}
    for key, value in found["values"].items():
        assert value == pytest.approx(last[key], rel=1e-4), key
    for name in ("held", "more"):
        answers = [
            (by_one_process / "eval" / folder / f"{name}.jsonl").read_text() for folder in ("step-000001", "model")
        ]
        assert answers[0] == answers[1]
    assert "held/chrf/chrf" in capsys.readouterr().out


def test_vlft_eval_of_any_folder(
    tiny: Callable[..., Path], tmp_path: Path, two_data_sets: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, registry = str(tiny()), str(two_data_sets[0])
    assert main(["eval", model, "--dataset_config_path", registry]) == 2
    assert "--output_dir is missing" in capsys.readouterr().err
    words = [
        "eval",
        model,
        "--dataset_config_path",
        registry,
        "--num_workers",
        "0",
        "--output_dir",
        str(tmp_path / "e"),
    ]
    words += ["--cache_dir", str(tmp_path / "cache")]
    assert main([*words, "--split", "all", "--eval_dataset_scripts", "train:exact_match", "--eval_limit", "3"]) == 0
    found = json.loads((tmp_path / "e/metrics.json").read_text())
    assert {"eval/train/loss", "eval/held/loss", "eval/more/loss", "eval/train/exact_match/strict"} <= {
        *found["values"]
    }
    assert len((tmp_path / "e/train.jsonl").read_text().splitlines()) == 3
    assert main([*words, "--dataset_names", "train", "--train_split_ratio", "1"]) == 3
    assert "give --split all" in capsys.readouterr().err


@pytest.mark.slow
def test_vlft_eval_on_two_processes(tmp_path: Path, by_one_process: Path) -> None:
    config = ["--config", str(by_one_process / "run.yaml")]
    start(["eval", str(by_one_process), *config, "--output_dir", str(tmp_path / "e")], processes=2)
    one = json.loads((tmp_path / "e/metrics.json").read_text())["values"]
    last = metrics(by_one_process, "eval")[-1]
    assert all(value == pytest.approx(last[key], rel=1e-4) for key, value in one.items())
    assert (tmp_path / "e/held.jsonl").read_text() == (by_one_process / "eval/step-000001/held.jsonl").read_text()


def test_a_report_at_every_save_that_costs_no_run(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlft import report

    written: list[int] = []

    def write(root: Path) -> Path:
        written.append(len(metrics(root)))
        if len(written) == 2:
            raise RuntimeError("no fonts")
        return real(root)

    real = report.write
    monkeypatch.setattr(report, "write", write)
    out = tmp_path / "out"
    train(command(tiny(), write_data(tmp_path), out, "lora", max_steps=4, save_steps=2, report=True))
    assert written == [2, 4, 4], "two saves and the end"
    assert "WARNING: no report.html this time: RuntimeError: no fonts" in capsys.readouterr().out
    assert "<svg" in (out / "report.html").read_text()


def write_records(folder: Path, name: str, records: list[dict[str, Any]], **spec: Any) -> Path:
    registry = write_data(folder, 4, name="train")
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    known = json.loads(registry.read_text())
    known["datasets"][name] = {"json_path": f"{name}.jsonl", "image_root": "images", **spec}
    registry.write_text(json.dumps(known))
    return registry


def test_pictures_and_turns_after_the_last_learnt_answer(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the row and in no prompt; the question is the one that the reference answers."""

    def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **more}

    asked = [turn("user", "<image>what"), turn("assistant", "red")]
    unlearnt = [turn("user", "<image>and this"), turn("assistant", "blue", loss=False)]
    records: list[dict[str, Any]] = [
        {"id": "unlearnt", "messages": asked + unlearnt, "images": ["train-0-0.png", "train-2-0.png"]},
        {"id": "trailing", "messages": [*asked, unlearnt[0]], "images": ["train-0-0.png", "train-2-0.png"]},
        {"id": "plain", "messages": asked, "images": ["train-0-0.png"]},
    ]
    registry = write_records(tmp_path, "turns", records, split="eval")
    out = tmp_path / "out"
    options = {"max_steps": 1, "eval_dataset_scripts": "turns:exact_match", "eval_max_new_tokens": 8}
    train(command(tiny(), registry, out, "lora", per_device_eval_batch_size=3, **options))
    lines = [json.loads(line) for line in (out / "eval/step-000000/turns.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} <= {"unlearnt", "trailing", "plain"}
    assert len(lines) >= 2
    assert all((line["question"], line["reference"]) == ("what", "red") for line in lines)
    assert len({line["prediction"] for line in lines}) == 1, "the same picture and question"


def test_a_loss_that_is_not_finite_is_null_and_never_the_best() -> None:
    lines = [{"m": math.nan, "step": 2}, {"m": None, "step": 3}, {"m": 0.5, "step": 4}, {"m": math.inf, "step": 5}]
    for greater in (True, False):
        assert Best("m", greater).among(lines).step == 4
    assert Best("m", True).among(lines[:2]).step == 0


def test_a_resume_leaves_the_answers_of_the_course_that_it_leaves(
    tiny: Callable[..., Path], tmp_path: Path, two_data_sets: tuple[Path, str]
) -> None:
    """And a line that a kill has cut off costs nothing."""
    out = tmp_path / "out"
    options = {"eval_dataset_scripts": "held:exact_match", "eval_max_new_tokens": 3, "save_steps": 1, "eval_steps": 1}
    train(command(tiny(), two_data_sets[0], out, "lora", max_steps=3, **options))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"schema": 1, "step": 3, "kind": "tra')
    again = command(tiny(), two_data_sets[0], out, "lora", **{**options, "eval_steps": 3}, max_steps=3)
    train([*again, "--resume_from_checkpoint", str(out / "checkpoints/step-000001")])
    names = sorted(path.name for path in (out / "eval").iterdir())
    assert names == ["left-1-step-000002", "left-1-step-000003", "step-000000", "step-000001", "step-000003"]
    assert [line["step"] for line in metrics(out, "eval")] == [0, 1, 3]
