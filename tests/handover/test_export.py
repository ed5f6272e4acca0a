"""`vlft export`: what it writes is whole, says what it is, and equals what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlft import card, export
from vlft.cli import main
from vlft.errors import CheckpointError, ModelError
from vlft.handover import export_model


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def _same(a: Path, b: Path) -> bool:
    one, other = _weights(a), _weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's result, exported in bf16 and in small files."""
    out = tmp_path_factory.mktemp("whole") / "charts-7b"
    said = export_model(str(run), out, dtype="bfloat16", max_shard_size="200KB")
    assert "files of weights" in said
    return out


def test_a_whole_model_in_shards(whole: Path) -> None:
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in whole.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    assert {t.dtype for t in _weights(whole).values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(whole).dtype == torch.bfloat16
    assert {p.dtype for p in AutoModelForImageTextToText.from_pretrained(whole).parameters()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((whole / "config.json").read_text())
    assert not (whole / "adapter_config.json").exists()
    assert json.loads((whole / "vlft.json").read_text())["merged_onto"] == "trained"


def test_with_what_serving_needs(whole: Path) -> None:
    assert AutoTokenizer.from_pretrained(whole).chat_template
    assert dict(Qwen2VLImageProcessorPil.from_pretrained(whole).size) == {"shortest_edge": 3136, "longest_edge": 100352}
    needed = ("generation_config.json", "video_preprocessor_config.json", "README.md", "chat_template.jinja")
    assert all((whole / name).is_file() for name in needed)


def test_a_checkpoint_becomes_what_the_run_would_have_written(run: Path, tmp_path: Path) -> None:
    """The last checkpoint: bit for bit what merging the run's own result gives. An earlier one: something else."""
    export_model(str(run), tmp_path / "latest", checkpoint="latest")
    export.merge(run / "model", tmp_path / "merged")
    assert _same(tmp_path / "latest", tmp_path / "merged")
    assert export_model(str(run), tmp_path / "early", checkpoint="step-000002").startswith("step-000002 of")
    assert not _same(tmp_path / "early", tmp_path / "merged")
    assert "after step 2." in (tmp_path / "early" / "README.md").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"latest", "early", "merged"}, "nothing is left beside them"


def test_the_best_checkpoint(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "best.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"kept no best checkpoint; give one of latest, step-000002, step-000003"):
        export_model(str(copied), tmp_path / "best", checkpoint="best")
    best = {"schema": 1, "metric": "eval/toy/loss", "step": 2, "value": 6.5}
    (copied / "best.json").write_text(json.dumps(best))
    export_model(str(copied), tmp_path / "best", checkpoint="best")
    export_model(str(copied), tmp_path / "two", checkpoint="step-000002")
    assert _same(tmp_path / "best", tmp_path / "two")


def test_a_whole_model_and_a_stranger_s(whole: Path, run: Path, tmp_path: Path) -> None:
    """A whole result keeps its facts; somebody else's model keeps its own card."""
    export_model(str(whole), tmp_path / "again", dtype="float32")
    assert AutoConfig.from_pretrained(tmp_path / "again").dtype == torch.float32
    assert "strategy `lora_llm_full_vit`" in (tmp_path / "again" / "README.md").read_text()
    base = run.parent / "base"
    export_model(str(base), tmp_path / "base")
    assert _same(base, tmp_path / "base")
    assert (tmp_path / "base" / "README.md").read_text() == (base / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--format gguf", 2, "vlft does not write GGUF; export hf, then run llama.cpp's convert_hf_to_gguf.py"),
        ("--format awq", 2, "vlft writes hf only"),
        ("--checkpoint step-000007", 6, "has no complete checkpoint 'step-000007' (it has step-000002, step-000003)"),
        ("--push_to_hub charts", 2, "is no repository's name; give OWNER/NAME"),
        ("--max_shard_size big", 2, "--max_shard_size is 'big'"),
        ("--dtype int4", 2, "--dtype is 'int4'"),
    ],
)
def test_refused(
    words: str, code: int, says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--output_dir", str(tmp_path / "out"), *words.split()]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refused_models(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["export", str(run / "modl"), *out]) == 2
    assert "there is no such folder (the nearest is" in capsys.readouterr().err
    assert main(["export", str(run / "model"), *out, "--checkpoint", "latest"]) == 2
    assert "is no run folder" in capsys.readouterr().err
    with pytest.raises(ModelError, match="is not empty"):
        export_model(str(run), run)


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


def test_card_of_the_result(run: Path) -> None:
    found = ModelCard.load(run / "model" / "README.md")
    assert found.data.library_name == "peft"
    assert found.data.pipeline_tag == "image-text-to-text"
    assert found.data.base_model is None, "a local folder has no name at the hub"
    assert (found.data.license, found.data.license_name) == ("other", "qwen-research")
    (loss, *_) = found.data.eval_results
    line = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert (loss.dataset_name, loss.metric_name) == ("toy", "loss")
    assert loss.metric_value == line["eval/toy/loss"]
    for text in (
        "lora_rank 64", "| toy |", "llm 0.0001", "3 (0.6 epochs) of 4 samples", "PeftModel.from_pretrained(base",
        "vlft export charts --output_dir charts-whole", "between 3136 and 100352 pixels", "transformers 5.",
    ):  # fmt: skip
        assert text in found.text, text


def test_card_of_the_whole_model(whole: Path) -> None:
    found = ModelCard.load(whole / "README.md")
    assert found.data.library_name == "transformers"
    assert found.data.model_name == "charts-7b"
    assert "vllm serve charts-7b" in found.text
    assert "PeftModel" not in found.text
    assert "the trained base weights" in found.text


@pytest.mark.parametrize(
    ("argv", "world_size", "shown"),
    [
        (["/opt/venv/bin/vlft", "--output_dir", "runs/a"], 1, "vlft --output_dir runs/a"),
        (["/home/me/vlft/__main__.py", "train", "--config=/home/me/run.yaml"], 1, "vlft train --config=run.yaml"),
        (
            ["/home/me/vlft/__main__.py", "--local_rank=0", "--model_name_or_path", "/data/secret/base/"],
            4,
            "accelerate launch --num_processes 4 -m vlft --model_name_or_path base",
        ),
    ],
)
def test_the_card_s_command(argv: list[str], world_size: int, shown: str, run: Path, tmp_path: Path) -> None:
    """One that others can give; where things lie on this machine stays in run_card.json."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "run_card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": argv, "world_size": world_size}))
    export_model(str(tmp_path / "run"), tmp_path / "out", checkpoint="latest")
    assert f"The command:\n\n```\n{shown}\n```" in (tmp_path / "out" / "README.md").read_text()
    assert "/home/me" not in (tmp_path / "out" / "vlft.json").read_text()
    assert json.loads(path.read_text())["command"] == argv


def test_base_names(run: Path, tmp_path: Path) -> None:
    """Hub names, snapshots of the hub's cache, and results of earlier stages; a plain folder has none."""
    assert card.hub_name("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    snapshot = tmp_path / "models--Qwen--Qwen3-VL-8B-Instruct" / "snapshots" / "0c35"
    snapshot.mkdir(parents=True)
    assert card.hub_name(str(snapshot)) == "Qwen/Qwen3-VL-8B-Instruct"
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: q\nlicense_link: LICENSE\n---\n")
    link = "https://huggingface.co/Qwen/Qwen3-VL-8B-Instruct/blob/main/LICENSE"
    assert card.base_license(str(snapshot)) == {"license": "other", "license_name": "q", "license_link": link}
    assert card.hub_name(str(run.parent / "base")) is None
    first = tmp_path / "first" / "model"
    first.mkdir(parents=True)
    (first / "vlft.json").write_text(json.dumps({"run": {"base_model": "Qwen/Qwen2-VL-2B-Instruct"}}))
    assert card.hub_name(str(first)) == "Qwen/Qwen2-VL-2B-Instruct"
    (snapshot / "README.md").write_text("---\n: [\n---\n")
    assert card.base_license(str(snapshot)) == {}


@pytest.mark.parametrize("said", ['"run"', "[1]", '{"rates": 3}', '{"metrics": {"eval": 1}}', '{"best": {"step": 1}}'])
def test_a_stranger_s_facts(said: str, run: Path, tmp_path: Path) -> None:
    """vlft.json may come from anyone: a sentence, and nothing half written."""
    shutil.copytree(run / "model", tmp_path / "model")
    meta = json.loads((tmp_path / "model" / "vlft.json").read_text()) | {"run": json.loads(said)}
    (tmp_path / "model" / "vlft.json").write_text(json.dumps(meta))
    with pytest.raises(ModelError, match=r"the facts of the run in vlft.json cannot be used .*; remove 'run' there"):
        export.merge(tmp_path / "model", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
