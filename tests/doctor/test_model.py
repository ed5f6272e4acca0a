"""The model's folder, spoiled in every way that is looked for; the words of the command; the verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor_data import clean, exact_leak

from vlft.cli import main
from vlft.commands import read_doctor
from vlft.config import DoctorOptions, RunConfig, options_of
from vlft.doctor import machine, model
from vlft.doctor.findings import Finding, verdict
from vlft.errors import ConfigError, DataError, ModelError, VlftError
from vlft.manual import command_help

Tiny = Callable[..., Path]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy to spoil, its weights in two files with an index."""
    from safetensors.numpy import load_file, save_file

    copy = Path(shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "model"))
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, copy / file)
    places = {name: file for file, mine in parts.items() for name in mine}
    index = {"metadata": {"total_size": 4321}, "weight_map": places}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


def said(folder: Path, *, weights: bool = True, length: int = 2048) -> list[tuple[str, str]]:
    _, found = model.examine(str(folder), trust_remote_code=False, weights=weights, max_seq_length=length)
    assert all(one.text.endswith(".") and one.area == "model" for one in found)
    return [(one.grade, one.check) for one in found]


def test_a_good_folder(folder: Path) -> None:
    found, findings = model.examine(str(folder), trust_remote_code=False, weights=True, max_seq_length=2048)
    assert findings == []
    assert found is not None
    assert found.weights == 4321
    assert found.chat is not None


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def absent(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pointer(folder: Path) -> None:
    (folder / "model-1.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")


def other_tensors(folder: Path) -> None:
    shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")


def pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_family(folder: Path) -> None:
    _edit(folder / "config.json", model_type="llava")


def no_processor(folder: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)


def no_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        path.unlink()


def small_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    _edit(folder / "config.json", text_config=config["text_config"] | {"vocab_size": 100})


def other_token(folder: Path) -> None:
    _edit(folder / "config.json", image_token_id=3)


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (absent, "weights_absent"),
        (cut_short, "weights_broken"),
        (pointer, "weights_broken"),
        (other_tensors, "weights_broken"),
        (pickles, "weights"),
        (no_config, "checkpoint"),
        (other_family, "checkpoint"),
        (no_processor, "checkpoint"),
        (no_tokenizer, "tokenizer"),
        (small_vocabulary, "vocabulary"),
        (other_token, "image_token"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_spoiled_folder(folder: Path, spoil: Callable[[Path], None], finding: str) -> None:
    spoil(folder)
    assert said(folder) == [("error", finding)]


def test_without_weights_where_only_the_data_is_looked_at(folder: Path) -> None:
    pickles(folder)
    assert said(folder, weights=False) == []


def test_positions(folder: Path) -> None:
    assert said(folder, length=5000) == [("warning", "positions")]


def test_an_adapter_is_told(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in folder.glob("tokenizer*"):
        shutil.copy(path, adapter)
    shutil.copy(folder / "chat_template.jinja", adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert said(adapter) == [("note", "adapter")]
    absent(folder)
    assert ("error", "weights_absent") in said(adapter)


def test_a_hub_model_is_described_and_not_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    found, findings = model.examine("Owner/Name", trust_remote_code=False, weights=True, max_seq_length=2048)
    assert [(one.grade, one.check) for one in findings] == [("note", "weights_remote")]
    assert asked
    assert all("*.safetensors" not in patterns and "*.json" in patterns for patterns in asked)
    assert found is not None
    assert found.weights == 4321


# ------------------------------------------------------------------ words


def test_the_words_of_a_training(tiny: Tiny, tmp_path: Path) -> None:
    """All of them, and the strategy's own, from flags and from run.yaml."""
    registry = clean(tmp_path, 1).write()
    start = ["--model_name_or_path", str(tiny("qwen2_5_vl")), "--dataset_config_path", str(registry)]
    bare = read_doctor(start)
    assert (bare.tuning_strategy, bare.output_dir, bare.look) == (None, None, ("environment", "model", "data"))
    words = [
        *start,
        "--output_dir",
        "out",
        "--tuning_strategy",
        "lora",
        "--lora_rank",
        "8",
        "--learning_rate_llm",
        "1e-4",
    ]
    assert read_doctor([*words, "--look", "data", "model"]).look == ("data", "model")
    (tmp_path / "run.yaml").write_text(
        f"schema: 1\nmodel_name_or_path: {tiny('qwen2_5_vl')}\ntuning_strategy: lora\nlora_rank: 4\n"
        f"output_dir: {tmp_path / 'out'}\ndataset_config_path: {registry}\n"
    )
    found = read_doctor(["--config", str(tmp_path / "run.yaml"), "--sample_limit", "5"])
    assert (found.tuning_strategy, found.sample_limit) == ("lora", 5)
    for wrong, sentence in (
        (["--lora_rank", "0"], "--lora_rank is '0'; give a whole number at least 1."),
        (["--llm_frozen_layers", "3"], "belongs to partial_llm_full_vit; lora does not use it"),
        (["--learning_rate_vit", "1e-5"], "keeps the vit frozen"),
        (["--sample_limt", "3"], "(the nearest is 'sample_limit')"),
        (["--look", "data", "everything"], "give one or more of environment, model, data"),
    ):
        with pytest.raises(ConfigError, match=r".") as caught:
            read_doctor([w for w in words if w not in ("--lora_rank", "8")] + wrong)
        assert sentence in str(caught.value)


def test_training_does_not_take_the_doctor_s_options() -> None:
    own = options_of(DoctorOptions).keys() - options_of(RunConfig).keys()
    assert own == {"page", "look", "sample_limit"}
    from vlft.parse import parse

    with pytest.raises(ConfigError, match="--sample_limit is not an option"):
        parse(["--model_name_or_path", "a/b", "--sample_limit", "3"], start=False)


def test_the_help_lists_them() -> None:
    from vlft.commands import COMMANDS

    shown = command_help(COMMANDS["doctor"])
    assert all(f"--{name}" in shown for name in DoctorOptions.model_fields)
    assert "exit code 0 is go" in shown


# ------------------------------------------------------------------ verdict


def _finding(grade: str, area: str) -> Finding:
    return Finding(grade, area, "check", f"{grade} of {area}.")  # type: ignore[arg-type]


def test_the_verdict() -> None:
    assert verdict([_finding("warning", "data"), _finding("note", "model")], "page") is None
    for area, kind in (("environment", VlftError), ("model", ModelError), ("data", DataError)):
        error = verdict([_finding("warning", "model"), _finding("error", area)], "page.html")
        assert type(error) is kind
        assert str(error) == f"no-go: 1 error, the first being: error of {area}. All are in page.html."
    both = verdict([_finding("error", "data"), _finding("error", "model")], "page")
    assert type(both) is VlftError
    assert "2 errors, the first being: error of model." in str(both)


def test_go_and_no_go(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process: a page, a line for each finding, an exit code."""
    made = clean(tmp_path, 20)
    words = [
        "doctor", "--model_name_or_path", str(tiny("qwen2_5_vl")), "--dataset_config_path", str(made.write()),
        "--cache_dir", str(tmp_path / "cache"), "--page", str(tmp_path / "pages" / "p.html"), "--num_workers", "0",
    ]  # fmt: skip
    assert main([*words, "--look", "model", "data"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "go"
    assert "<h1>Go</h1>" in (tmp_path / "pages" / "p.html").read_text()
    exact_leak(made)
    made.write()
    words[words.index("--cache_dir") + 1] = str(tmp_path / "new")
    assert main([*words, "--look", "data"]) == 3
    shown = capsys.readouterr()
    assert shown.out.startswith("error    data         1 of 40 (2.5%) held-out samples show what also trains")
    assert "vlft: no-go: 1 error, the first being: 1 of 40" in shown.err
    assert '<h1 class="no">No-go</h1>' in (tmp_path / "pages" / "p.html").read_text()


def test_a_launcher_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlft.doctor.examine import main as doctor

    monkeypatch.setenv("WORLD_SIZE", "2")
    options = read_doctor(
        ["--model_name_or_path", str(tiny("qwen2_5_vl")), "--dataset_config_path", str(clean(tmp_path, 1).write())]
    )
    with pytest.raises(ConfigError, match="without a launcher"):
        doctor(options)


def test_the_run_s_needs_reach_the_machine(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, batch, pictures as the data has them, the weights' size."""
    from vlft.doctor.examine import examine

    plans: list[machine.Plan] = []
    monkeypatch.setattr(machine, "examine", lambda here, plan: plans.append(plan) or [])
    words = [
        "--model_name_or_path", str(tiny("qwen2_5_vl")), "--dataset_config_path", str(clean(tmp_path, 9).write()),
        "--cache_dir", str(tmp_path / "cache"), "--per_device_train_batch_size", "3", "--deepspeed", "zero2",
        "--gradient_accumulation_steps", "2", "--num_workers", "1", "--save_total_limit", "5",
    ]  # fmt: skip
    checkup = examine(read_doctor(words))
    (plan,) = plans
    assert (plan.workers, plan.batch, plan.accumulation, plan.checkpoints, plan.deepspeed) == (1, 3, 2, 5, "zero2")
    assert plan.pixels == 308 * 252, "320 x 240 at multiples of 28"
    assert plan.weights == (tiny("qwen2_5_vl") / "model.safetensors").stat().st_size
    assert dict(checkup.machine)["GPU"]
    assert dict(checkup.packages)["torch"]
