"""Words -> Run, and one clear sentence for every mistake. `BAD` is the table of bad command lines."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vlft
from vlft import cli, manual
from vlft.cli import main
from vlft.commands import COMMANDS
from vlft.config import RunConfig, bundled, options_of, resolved_yaml
from vlft.discovery import STRATEGIES, find, load_strategy
from vlft.errors import ConfigError, ModelError, StrategyError
from vlft.parse import load_run, parse
from vlft.rivals import _SAME, _TOLD, RIVALS, nearest

ROOT = Path(vlft.__file__).parent.parent
CORE = shlex.split("--model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --output_dir out")
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MAX_PIXELS", "MIN_PIXELS", "VLFT_CACHE")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a registry; no launcher's environment."""
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    registry = {"datasets": {"invoices": {"json_path": "a.json"}, "charts": {"json_path": "b.json"}}}
    (tmp_path / "configs" / "dataset_config.json").write_text(json.dumps(registry))
    return tmp_path


def words(text: str, strategy: str = "qlora") -> list[str]:
    return [*CORE, "--tuning_strategy", strategy, *shlex.split(text)]


def problems(argv: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return list(caught.value.problems)


# Spelling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("--epochs 3", "epochs", 3),
        ("--epochs=0.5", "epochs", 0.5),
        ("--max-seq-length 512", "max_seq_length", 512),
        ("--max-seq-length=512", "max_seq_length", 512),
        ("--dataset_names invoices charts", "dataset_names", ("invoices", "charts")),
        ("--dataset_names=invoices charts", "dataset_names", ("invoices", "charts")),
        ("--dataset_names invoices", "dataset_names", ("invoices",)),
        ("--use_wandb", "use_wandb", True),
        ("--use_wandb false", "use_wandb", False),
        ("--use_wandb=True", "use_wandb", True),
        ("--no-use_wandb", "use_wandb", False),
        ("--no_use_wandb", "use_wandb", False),
        ("--no-use-wandb", "use_wandb", False),
        ("--no-gradient_checkpointing", "gradient_checkpointing", False),
        ("", "gradient_checkpointing", None),
        ("--max_steps none", "max_steps", None),
        ("--learning-rate-llm 1e-4", "learning_rate_llm", 1e-4),
        ("--use_wandb --wandb_run_name 42", "wandb_run_name", "42"),
        ("--mixed_precision no", "mixed_precision", "no"),
        ("--local_rank 0", "seed", 42),
        ("--local_rank=3 --seed 7", "seed", 7),
        ("--local-rank 1 --seed 7", "seed", 7),
        ("--local_rank -1 --seed 7", "seed", 7),
        ("--eval_dataset_scripts invoices:exact_match", "eval_dataset_scripts", {"invoices": ("exact_match",)}),
    ],
)
def test_spellings(text: str, name: str, value: Any) -> None:
    assert getattr(parse(words(text)).config, name) == value


def test_strategy_options_are_flags_of_their_own() -> None:
    run = parse(words("--lora_rank 8 --lora-dropout=0 --train_vit --no-use_rslora --lora_target_modules q_proj v_proj"))
    assert (
        run.options.model_dump()
        == load_strategy("qlora")[0]
        .Config(lora_rank=8, lora_dropout=0, train_vit=True, lora_target_modules=("q_proj", "v_proj"))
        .model_dump()
    )
    assert run.distribution == f"vlft {vlft.__version__}"
    assert run.strategy.__name__ == "QLora"


@pytest.mark.parametrize("name", ["full", "vit_only", "partial_llm_full_vit", "lora", "lora_llm_full_vit", "qlora"])
def test_every_strategy_parses(name: str) -> None:
    assert parse(words("", name)).rates


# The table of bad command lines: words, the sentence ------------------------------------------------------------------

BAD = {
    # names
    "--epocs 2": "--epocs is not an option (the nearest is 'epochs'); 'vlft --help' lists all.",
    "--learning_rate_vitt 2": "(the nearest is 'learning_rate_vit')",
    "--zzqqxx 2": "--zzqqxx is not an option; 'vlft --help' lists all.",
    "--vit_lr 1e-5": "--vit_lr is not an option of vlft; use --learning_rate_vit.",
    "--MAX_PIXELS 1000": "--MAX_PIXELS is not an option; use --max_pixels.",
    "--bf16": "give --mixed_precision bf16",
    "--no-freeze_vit": "choose the parts with --train_vit or --no-train_vit",
    "--num_train_epochs 3": "use --epochs",
    "--lora-r 8": "--lora-r is not an option of vlft; use --lora_rank.",
    "--llm_frozen_layers 3": "--llm_frozen_layers belongs to partial_llm_full_vit; qlora does not use it",
    # values
    "--epochs 0": "--epochs is '0'; give a number above 0.",
    "--epochs -1": "--epochs is '-1'; give a number above 0.",
    "--epochs inf": "--epochs is 'inf'; give a number above 0.",
    "--epochs many": "--epochs is 'many'; give a number above 0.",
    "--seed 1.5": "--seed is '1.5'; give a whole number at least 0",
    "--lora_rank 0": "--lora_rank is '0'; give a whole number at least 1.",
    "--lora_dropout 1": "--lora_dropout is '1'; give a number at least 0 and below 1.",
    "--train_vit perhaps": "--train_vit is 'perhaps'; give true or false.",
    "--lr_scheduler_type cosin": "--lr_scheduler_type is 'cosin' (the nearest is 'cosine'); give one of linear,",
    "--augmentation heavy": "give one of photometric, geometric",
    "--train_split_ratio 1.5": "give a number above 0 and at most 1",
    "--max_pixels 100": "give a whole number at least 784",
    "--save_steps": "--save_steps needs a value; give a whole number above 0.",
    "--dataset_names": "--dataset_names needs a value",
    "--deepspeed ''": "--deepspeed has an empty value (an unset shell variable?)",
    "--seed 1 2": "--seed takes one value, but '1 2' follows",
    "--seed 1 --seed 2": "--seed is given twice; leave one out.",
    "--use_wandb --no-use_wandb": "--no-use_wandb is given twice; leave one out.",
    "--no-use_wandb true": "--no-use_wandb takes no value, but 'true' follows; leave that out.",
    "--eval_dataset_scripts invoices": "--eval_dataset_scripts needs a dataset and its scripts, as in",
    "--eval_dataset_scripts a:x,b/x.py": "names two scripts 'x' for dataset 'a'",
    # combinations
    "--min_pixels 2000000": "--min_pixels is 2000000, above max_pixels 1003520",
    "--wandb_project x": "--wandb_project is given, but nothing is logged there; add --use_wandb",
    "--lr_scheduler_type constant --warmup_steps 100": "--warmup_steps is 100, but the constant schedule has no "
    "warmup; give --lr_scheduler_type constant_with_warmup or leave it out.",
    "--augmentation geometric --no-use_data_augmentation": "use_data_augmentation is false; leave one of the two out.",
    "--learning_rate_vit 1e-5": "--learning_rate_vit is given, but qlora with these options keeps the vit frozen; "
    "leave it out or add --train_vit.",
    "--no-train_llm": "no part is left to train",
    # files
    "--dataset_config_path configs/dataset_confg.json": "there is no such file (the nearest is "
    "'configs/dataset_config.json')",
    "--dataset_names invoice": "no dataset 'invoice' in configs/dataset_config.json (the nearest is 'invoices')",
    "--eval_dataset_scripts reports:exact_match": "there is no dataset 'reports'",
    "--eval_dataset_scripts invoices:exact_mach": "there is no script 'exact_mach' (the nearest is 'exact_match')",
    "--eval_dataset_scripts invoices:my/metric.py": "there is no script my/metric.py",
    "--resume_from_checkpoint out/checkpoints/step-1": "there is no such folder",
    "--resume_from_checkpoint lastest": "(the nearest is 'latest')",
    "--deepspeed nowhere.json": "--deepspeed nowhere.json: there is no such file",
    "--config runn.yaml": "--config runn.yaml: there is no such file",
    "--config": "--config takes one YAML file, found none",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_command_line(text: str) -> None:
    found = problems(words(text))
    assert len(found) == 1, found
    assert BAD[text] in found[0]
    assert found[0].endswith(".")
    assert "\n" not in found[0]


def test_rivals_names_are_answered() -> None:
    own = {*load_strategy("qlora")[0].Config.model_fields, *RunConfig.model_fields}
    assert not own & RIVALS.keys()
    found = problems(words(" ".join(f"--{name} 1" for name in RIVALS)))
    assert found == [f"--{name} is not an option of vlft; {advice}." for name, advice in RIVALS.items()]


def test_rivals_table_is_sound() -> None:
    """Each name once, each advice about options that exist; table 3b of formats.md is in it."""
    names = [name for group in (*_SAME.values(), *_TOLD.values()) for name in group.split()]
    assert sorted(names) == sorted(set(names))
    known = set(RunConfig.model_fields)
    for strategy in find(STRATEGIES):
        known |= set(load_strategy(strategy)[0].Config.model_fields)
    for advice in RIVALS.values():
        for flag in re.findall(r"--([\w-]+)", advice):
            assert flag.removeprefix("no-") in known | {"config_file"}, advice
    table = """image_max_pixels image_min_pixels image_max_token_num processor.max_pixels video_fps vit_lr vision_lr
    vision_tower_lr aligner_lr merger_lr mm_projector_lr lr_groups param_group_overrides learning_rate lr
    freeze_vision_tower freeze_vit tune_mm_vision unfrozen_parameters freeze_mm_modules
    freeze_config.freeze_vision_tower finetune_vision_layers freeze_multi_modal_projector freeze_aligner
    freeze_merger tune_mm_mlp freeze_language_model freeze_llm tune_mm_llm finetune_language_layers finetuning_type
    tuner_type lora_enable adapter peft use_peft quantization_bit quant_bits bits load_in_4bit quantization
    cutoff_len max_length truncation_strategy model_max_length sequence_len pack_size neat_packing packing
    padding_free data_packing data_flatten sample_packing packed_sequence num_samples mix_strategy interleave_probs
    interleave_prob sample_ratio val_size split_dataset_ratio eval_path val_set_size eval_dataset dataset_dir
    custom_dataset_info data_path image_folder data_dict datasets dataset._target_ dataset_name image_size"""
    missing = [name for name in table.split() if name not in RIVALS]
    assert not missing


def test_all_problems_at_once() -> None:
    """Wrong by name, value, combination, strategy, rate and file: one answer."""
    found = problems(
        shlex.split(
            "--model_name_or_path Qwen/Qwen2.5-7B-VL-Chat --tuning_strategy full --no-train_vit --lora_rank 8 "
            "--vit_lr 1 --epochs -1 --min_pixels 9000000 --use_wandb maybe --learning_rate_vit 1e-5 "
            "--dataset_names bills"
        )
    )
    expected = [
        "--lora_rank belongs to",
        "--vit_lr",
        "--output_dir is missing; give a path (Folder of the run",
        "--epochs",
        "--use_wandb",
        "--min_pixels",
        "--learning_rate_vit is given",
        "--model_name_or_path",
        "--dataset_names",
    ]
    assert len(found) == len(expected), found
    for start in expected:
        assert sum(problem.startswith(start) for problem in found) == 1, start


def test_a_wrong_value_causes_no_second_problem() -> None:
    assert len(problems(words("--use_wandb maybe --wandb_project x"))) == 1
    assert len(problems(words("--max_pixels 3 --min_pixels 2000000"))) == 1
    assert len(problems(words("--per_device_train_batch_size 0"))) == 1
    assert len(problems(["--output_dir", *words("")[:2], *words("")[4:]])) == 1


@pytest.mark.parametrize(
    ("name", "real"),
    [
        ("Qwen/Qwen2.5-7B-VL-Chat", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen/Qwen2.5-3B-VL-Chat", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("Qwen/Qwen2.5-72B-VL-Chat", "Qwen/Qwen2.5-VL-72B-Instruct"),
        ("qwen2.5-7b-vl-chat", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen/Qwen2.5-VL-7B-Chat", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_model_names_of_older_guides(name: str, real: str) -> None:
    [problem] = problems(["--model_name_or_path", name, *words("")[2:]])
    assert problem.startswith(f"--model_name_or_path {name}: there is no such model")
    assert problem.endswith(f"give {real}.")


def test_model_folders(work: Path) -> None:
    (work / "models" / "tiny-qwen").mkdir(parents=True)
    rest = words("")[2:]
    assert parse(["--model_name_or_path", "models/tiny-qwen", *rest]).config.model_name_or_path == "models/tiny-qwen"
    [problem] = problems(["--model_name_or_path", "./models/tiny-qwn", *rest])
    assert "no such folder (the nearest is 'models/tiny-qwen')" in problem
    [problem] = problems(["--model_name_or_path", "tiny", *rest])
    assert "give a folder or a hub name (owner/name)" in problem


def test_a_hint_leads_to_what_was_asked_for(work: Path) -> None:
    """A folder that is called alike and holds other things helps nobody, nor does a folder where a file is wanted."""
    asked = words("--dataset_config_path configs/dataset_config.json")
    (work / "configs").rename(work / "ds_configs")
    [problem] = problems(asked)
    assert "no such file (the nearest is 'ds_configs/dataset_config.json')" in problem
    (work / "ds_configs" / "dataset_config.json").rename(work / "ds_configs" / "zero2.json")
    [problem] = problems(asked)
    assert problem.endswith("dataset_config.json: there is no such file; give the registry of datasets.")
    (work / "configs" / "dataset_configs").mkdir(parents=True)
    [problem] = problems(asked)
    assert problem.endswith("dataset_config.json: there is no such file; give the registry of datasets.")


def test_strategy_problems() -> None:
    base = [*CORE, "--lora_rank", "8"]
    assert problems([*CORE, "--tuning_strategy", "qlra", "--lora_rank", "8"])[0].startswith(
        "--tuning_strategy 'qlra' is unknown (the nearest is 'qlora'); installed: full, lora,"
    )
    assert len(problems([*CORE, "--tuning_strategy", "qlra", "--lora_rank", "8"])) == 1
    assert len(problems(base)) == 1
    assert "vlft plugins" in problems(base)[0]


def plug(work: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    info = work / "site" / "dist_x-3.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dist-x\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[vlft.strategies]\nmine = plugin_x:Mine\n")
    (work / "site" / "plugin_x.py").write_text(code)
    monkeypatch.syspath_prepend(str(work / "site"))
    monkeypatch.delitem(sys.modules, "plugin_x", raising=False)


PLUGIN = """
from typing import Annotated, Literal
from pydantic import Field
from vlft import StrategyConfig
class Options(StrategyConfig):
    spice: Annotated[int, Field(ge=1)] | None = Field(3, description="how hot, in peppers")
    mode: Literal["a", "b"] = "a"
    must: int
    def rates(self):
        return {RATES}
class Mine:
    Config = Options
    def prepare_model(self, source): ...
    def param_groups(self, model): ...
"""


def test_a_plugin_s_options(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plug(work, monkeypatch, PLUGIN.replace("{RATES}", "{'projector': 3e-4}"))
    run = parse(words("--spice 5 --must 1", "mine"))
    assert (run.distribution, run.rates) == ("dist-x 3.1", {"projector": 3e-4})
    assert [problem.split(";")[0] for problem in problems(words("--spice 0 --mode c", "mine"))] == [
        "--spice is '0'",
        "--mode is 'c'",
        "--must is missing",
    ]
    monkeypatch.setenv("COLUMNS", "110")  # a narrower terminal breaks the sentence that is looked for
    assert main(["--tuning_strategy", "mine", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Strategy mine (dist-x 3.1):" in shown
    assert "how hot, in peppers [a whole number at least 1; default: 3]" in shown


@pytest.mark.parametrize("rates", ["1/0", "{'nose': 1.0}", "{'llm': -1}", "{'llm': 'fast'}", "7"])
def test_a_plugin_that_cannot_say_its_rates(work: Path, monkeypatch: pytest.MonkeyPatch, rates: str) -> None:
    plug(work, monkeypatch, PLUGIN.replace("{RATES}", rates))
    with pytest.raises(StrategyError, match=r"'mine' of dist-x 3\.1"):
        parse(words("--must 1", "mine"))


@pytest.mark.parametrize("ranges", ["1/0", "{'nose': (1e-5, 1e-4)}", "{'llm': (1e-4, 1e-5)}", "{'llm': 1e-4}", "7"])
def test_a_plugin_whose_ranges_are_none(work: Path, monkeypatch: pytest.MonkeyPatch, ranges: str) -> None:
    more = f"        return {{'llm': 1e-5}}\n    def recommended(self):\n        return {ranges}"
    plug(work, monkeypatch, PLUGIN.replace("        return {RATES}", more))
    with pytest.raises(StrategyError, match=r"'mine' of dist-x 3\.1"):
        parse(words("--must 1", "mine"))


def test_a_plugin_s_ranges(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = "        return {'llm': 1e-5}\n    def recommended(self):\n        return {'llm': (1e-6, 2e-5)}"
    plug(work, monkeypatch, PLUGIN.replace("        return {RATES}", more))
    assert parse(words("--must 1 --learning_rate_llm 2e-5", "mine")).notes == ()
    (note,) = parse(words("--must 1 --learning_rate_llm 3e-5", "mine")).notes
    assert note.startswith("--learning_rate_llm is 3e-5, above the 1e-6 to 2e-5 that mine recommends")


def test_a_broken_plugin(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plug(work, monkeypatch, "import no_such_library_x")
    assert main(words("--epocs 1", "full")) == 2
    assert "no_such_library_x" not in capsys.readouterr().err
    assert main(words("", "mine")) == StrategyError.exit_code
    assert "'mine' of dist-x 3.1 (plugin_x:Mine) cannot be imported" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "dist-x 3.1" in capsys.readouterr().out
    assert main(["plugins"]) == 0
    assert re.search(r"mine\s+broken\s+dist-x 3\.1\s+.*no_such_library_x", capsys.readouterr().out)


# YAML -----------------------------------------------------------------------------------------------------------------


def config_file(work: Path, text: str) -> list[str]:
    (work / "run.yaml").write_text(text)
    return ["--config", "run.yaml"]


YAML = "model_name_or_path: a/b\noutput_dir: out\ntuning_strategy: lora\n"


def test_flags_override_the_file(work: Path) -> None:
    config = config_file(work, YAML + "epochs: 2\nseed: 1\nlora_rank: 8\nlearning_rate_llm: 1e-5\nuse-wandb: yes\n")
    run = parse([*config, "--seed", "5"])
    assert (run.config.epochs, run.config.seed, run.config.use_wandb) == (2, 5, True)
    assert run.options.model_dump()["lora_rank"] == 8
    assert run.rates == {"llm": 1e-5}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epochs: many", "run.yaml: epochs is 'many'; give a number above 0."),
        ("epochs: true", "run.yaml: epochs is 'True'; give a number above 0."),
        ("vit_lr: 1e-5", "run.yaml: vit_lr is not an option of vlft; use --learning_rate_vit."),
        ("vit_lr: null", "run.yaml: vit_lr is not an option of vlft; use --learning_rate_vit."),
        ("processor.max_pixels: 3", "run.yaml: processor.max_pixels is not an option of vlft; use --max_pixels."),
        ("llm_frozen_layers: 3", "run.yaml: llm_frozen_layers belongs to partial_llm_full_vit; lora does not use it"),
        ("learning_rate_vit: 1e-5", "run.yaml: learning_rate_vit is given, but lora with these options keeps the vit"),
        ("min_pixels: 2000000", "run.yaml: min_pixels is 2000000, above max_pixels"),
        ("seed: 1\nseed: 2", "run.yaml is not valid YAML: seed is written twice"),
        ("max_steps: 1\nmax-steps: 2", "run.yaml: max-steps is written twice"),
        ("seed: [1", "--config run.yaml is not valid YAML"),
        ("schema: 2", "run.yaml: schema is 2, vlft 0.1.0 reads 1"),
        ("mixed_precision: yes", "run.yaml: mixed_precision is 'True'"),
        ("dataset_names: {a: b}", "run.yaml: dataset_names is"),
        ("- a", "YAML"),
        ("model: {name: x}", "run.yaml: model is not an option of vlft; use --model_name_or_path."),
        ("processor: {max_pixels: 3}", "run.yaml: processor.max_pixels is not an option of vlft; use --max_pixels."),
        ("optimizer: {lr: 1e-4}", "run.yaml: optimizer.lr is not an option of vlft; use --learning_rate_llm."),
        ("step: {max_steps: 3}", "run.yaml: step.max_steps is not an option; use --max_steps."),
        ("extra: {max_pixls: 3}", "run.yaml: extra is not an option"),
        ("eval_dataset_scripts: {invoices: []}", "run.yaml: eval_dataset_scripts needs a dataset and its scripts"),
        ("eval_dataset_scripts: 3", "run.yaml: eval_dataset_scripts"),
        ("3: 4", "run.yaml: 3 is not an option"),
    ],
)
def test_bad_yaml(work: Path, text: str, problem: str) -> None:
    found = problems(config_file(work, YAML + text + "\n"))
    assert len(found) == 1, found
    assert problem in found[0]


def test_sections_of_another_project_s_file(work: Path) -> None:
    """Nested settings are answered one by one, those without advice too: vlft's own file is flat."""
    text = "peft: {dim: 8, alpha: 32, match_all: true}\nfreeze_config: {freeze_vision_tower: true}\n"
    assert problems(config_file(work, YAML + text)) == [
        "run.yaml: peft.dim is not an option of vlft; use --lora_rank.",
        "run.yaml: peft.alpha is not an option of vlft; use --lora_alpha.",
        "run.yaml: peft.match_all is not an option; 'vlft --help' lists all.",
        "run.yaml: freeze_config.freeze_vision_tower is not an option of vlft; choose the parts with --train_vit or "
        "--no-train_vit.",
    ]


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"word", b"\xff\xfe\x00bad"])
def test_a_file_without_options(work: Path, content: bytes) -> None:
    (work / "run.yaml").write_bytes(content)
    [problem] = problems(["--config", "run.yaml"])
    assert problem.startswith("--config run.yaml")


def test_yaml_spellings(work: Path) -> None:
    text = YAML + (
        "mixed_precision: no\ndataset_names: invoices\nmax_steps: null\nlearning_rate_llm: 1e-4\nschema: 1\n"
        "eval_dataset_scripts: {invoices: [exact_match]}\n"
    )
    run = parse(config_file(work, text))
    assert (run.config.mixed_precision, run.config.dataset_names) == ("no", ("invoices",))
    assert run.config.eval_dataset_scripts == {"invoices": ("exact_match",)}
    assert run.rates == {"llm": 1e-4}


def test_overriding_one_of_two_that_belong_together(work: Path) -> None:
    """A run.yaml holds every option, so a flag must be able to switch off what others hang on."""
    first = parse(words("--augmentation geometric --use_wandb --wandb_project p --train_vit --learning_rate_vit 1e-5"))
    (work / "run.yaml").write_text(resolved_yaml(first))
    again = load_run("run.yaml", ["--no-use_data_augmentation", "--no-use_wandb", "--no-train_vit"])
    assert (again.config.use_data_augmentation, again.config.augmentation) == (False, None)
    assert again.config.wandb_project is None
    assert again.rates == {"llm": 1e-4}
    assert any("learning_rate_vit is left out" in note for note in again.notes)
    (work / "run.yaml").write_text(resolved_yaml(parse(words(""))))
    assert load_run("run.yaml", ["--augmentation", "geometric"]).config.use_data_augmentation
    with pytest.raises(ConfigError, match="keeps the vit frozen"):
        load_run("run.yaml", ["--learning_rate_vit", "1e-5"])


def test_another_strategy_over_a_file(work: Path) -> None:
    (work / "run.yaml").write_text(resolved_yaml(parse(words("", "lora"))))
    with pytest.raises(ConfigError, match=r"run\.yaml: lora_rank belongs to lora, .*full does not use it"):
        load_run("run.yaml", ["--tuning_strategy", "full"])


# The folder of the run, several processes -----------------------------------------------------------------------------


def test_output_dir_is_refused_on_the_main_process_only(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "out").mkdir()
    (work / "out" / "run.yaml").touch()
    assert "is not empty" in problems(words(""))[0]
    assert "no run of vlft" in problems(words("--resume_from_checkpoint latest"))[0]
    (work / "out" / "run_card.json").touch()
    assert parse(words("--resume_from_checkpoint latest"))
    assert parse(words(""), start=False)
    monkeypatch.setenv("RANK", "0")
    assert "is not empty" in problems(words(""))[0]
    monkeypatch.setenv("RANK", "1")
    assert parse(words(""))


def test_environment_of_other_projects_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_PIXELS", "1000")
    assert parse(words("")).notes == ("The environment's MAX_PIXELS is not read; use --max_pixels.",)


def test_bundled_deepspeed_by_an_old_path(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "zero2.json").write_text("{}")
    monkeypatch.setattr("vlft.config.bundled", lambda kind, suffix: {"zero2": work / "zero2.json"})
    run = parse(words("--deepspeed ./configs/zero2.json"))
    assert run.config.deepspeed == "zero2"
    assert run.notes == ("--deepspeed ./configs/zero2.json does not exist; the bundled zero2 is used.",)


def test_missing_packages_are_found_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all other problems, and from a YAML file under its name there."""
    for package in ("wandb", "tensorboard", "deepspeed"):
        monkeypatch.setitem(sys.modules, package, None)
    assert problems(words("--use_wandb --report_to tensorboard --deepspeed zero2 --epochs 0")) == [
        "--epochs is '0'; give a number above 0.",
        "--report_to needs tensorboard: pip install 'vlft[tensorboard]', or leave it out.",
        "--use_wandb needs wandb: pip install 'vlft[wandb]', or leave it out.",
        "--deepspeed needs DeepSpeed: pip install 'vlft[deepspeed]', or leave it out.",
    ]


def test_trackers_are_listed_and_switched_off(work: Path) -> None:
    run = parse(words("--report_to tensorboard trackio --use_wandb --wandb_run_name first"), start=False)
    assert run.config.trackers == ("tensorboard", "trackio", "wandb")
    (work / "run.yaml").write_text(resolved_yaml(run))
    # What only names a run there goes with the last tracker that has names.
    again = load_run("run.yaml", ["--report_to", "tensorboard", "--no-use_wandb"])
    assert (again.config.trackers, again.config.wandb_run_name) == (("tensorboard",), None)
    assert load_run("run.yaml", ["--report_to", "none"]).config.trackers == ("wandb",)
    assert load_run("run.yaml", ["--report_to", "none", "--use_wandb", "false"]).config.trackers == ()
    assert parse(words("--report_to wandb --wandb_project x")).config.trackers == ("wandb",)
    assert problems(words("--report_to tensorbord")) == [
        "--report_to is 'tensorbord' (the nearest is 'tensorboard'); give one or more of wandb, tensorboard, trackio."
    ]
    assert "add --use_wandb" in problems(words("--report_to tensorboard --wandb_project x"))[0]


# Commands and exit codes ----------------------------------------------------------------------------------------------


def fake_train(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    module = types.ModuleType("vlft.train")
    module.main = action  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlft.train", module)
    monkeypatch.setattr(vlft, "train", module, raising=False)


@pytest.mark.parametrize("prefix", [[], ["train"], ["--local_rank=0"], ["--local_rank=0", "train"]])
def test_training_starts(monkeypatch: pytest.MonkeyPatch, prefix: list[str]) -> None:
    seen: list[Any] = []
    fake_train(monkeypatch, seen.append)
    assert main([*prefix, *words("--epochs 2")]) == 0
    assert seen[0].config.epochs == 2


def throw(error: BaseException) -> Any:
    def action(run: Any) -> None:
        raise error

    return action


def test_errors_are_printed_once_and_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("--epocs 1")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "vlft: --epocs is not an option (the nearest is 'epochs'); 'vlft --help' lists all.\n"
    assert main(words("--epocs 1 --seed x")) == 2
    assert capsys.readouterr().err.startswith("vlft: 2 problems:\n  * --epocs")
    fake_train(monkeypatch, throw(ModelError("no such model.")))
    assert main(words("")) == ModelError.exit_code
    assert capsys.readouterr().err == "vlft: no such model.\n"
    fake_train(monkeypatch, throw(KeyboardInterrupt()))
    assert main(words("")) == 130
    fake_train(monkeypatch, throw(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(words(""))


def test_other_processes_do_not_repeat_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "vlft.train", raising=False)
    monkeypatch.setattr(cli, "SILENT_SECONDS", 0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(words("--epocs 1")) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(words("--epocs 1")) == 2
    assert capsys.readouterr().err.startswith("vlft (rank 3): --epocs")
    # An error of this rank alone, in training, is not lost.
    monkeypatch.setenv("LOCAL_RANK", "1")
    fake_train(monkeypatch, throw(ModelError("gone.")))
    assert main(words("")) == ModelError.exit_code
    assert capsys.readouterr().err == "vlft (rank 3): gone.\n"


def test_connected_processes_agree_who_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, int] = {}

    class Store:
        def set_timeout(self, timeout: Any) -> None: ...
        def add(self, key: str, amount: int) -> int:
            said[key] = said.get(key, 0) + amount
            return said[key]

    distributed = types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        distributed_c10d=types.SimpleNamespace(_get_default_store=Store),
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(distributed=distributed))  # type: ignore[arg-type]
    assert [cli._first_to_say("a"), cli._first_to_say("a"), cli._first_to_say("b")] == [True, False, True]


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlft {vlft.__version__}\n"
    assert main(["trian", "--x"]) == 2
    assert "'trian' is not a command (the nearest is 'train'); commands: train, " in capsys.readouterr().err
    assert main(["plugins", "--x"]) == 2
    capsys.readouterr()
    assert main(["plugins", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("vlft plugins\n")
    assert "--model_name_or_path" not in shown
    assert main([]) == 0
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert all(f"--{name} is missing" in err for name in ("model_name_or_path", "output_dir", "tuning_strategy"))


def test_merge(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[Path, Path, str]] = []
    module = types.ModuleType("vlft.export")
    module.merge = lambda *args: seen.append(args) or "merged."  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlft.export", module)
    monkeypatch.setattr(vlft, "export", module, raising=False)
    (work / "model").mkdir()
    assert main(["merge", "model", "--output_dir", "merged"]) == 0
    assert main(["merge", "model", "--output-dir=merged", "--base", "original"]) == 0
    assert capsys.readouterr().out == "merged.\nmerged.\n"
    assert seen == [(Path("model"), Path("merged"), "trained"), (Path("model"), Path("merged"), "original")]
    assert main(["merge", "modl", "x", "--output_dir", "configs", "--base", "new", "--seed", "1"]) == 2
    err = capsys.readouterr().err
    assert "5 problems" in err
    assert "no such folder (the nearest is 'model')" in err
    assert "not an empty folder" in err
    assert main(["merge"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  * MODEL is missing; give a path (Run folder, or its result: output_dir/model).",
        "  * --output_dir is missing; give a path (Folder for the merged model; must be empty).",
    ]
    assert main(["merge", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "\n  MODEL  " in shown
    assert "--model" not in shown
    assert "--base" in shown


def test_help_about_an_unknown_strategy_says_that_it_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tuning_strategy", "qlra", "--help"]) == 2
    assert "'qlra' is unknown (the nearest is 'qlora'); installed: full, lora," in capsys.readouterr().err


def test_help_says_where_the_launcher_s_files_are(capsys: pytest.CaptureFixture[str]) -> None:
    """In a wheel and in a checkout; an option that takes a bundled name lists them."""
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    folder = Path(shown.rpartition("accelerate launch --config_file")[2].split(":\n")[1].split()[0])
    names = shown.rpartition("accelerate launch --config_file")[2].split("(")[1].split(")")[0].split(", ")
    assert sorted(names) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert ", ".join(bundled("ds_configs", ".json")) in options_of(RunConfig)["deepspeed"].text


def test_help_and_page_show_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tuning_strategy", "qlora", "--help"]) == 0
    shown = capsys.readouterr().out
    flags = set(re.findall(r"^  --(\w+)", shown, flags=re.MULTILINE))
    assert flags == {*RunConfig.model_fields, *load_strategy("qlora")[0].Config.model_fields}
    assert main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert set(re.findall(r"^  --(\w+)", shown, flags=re.MULTILINE)) == set(RunConfig.model_fields)
    assert all(re.search(rf"^  {name}\s+vlft ", shown, flags=re.MULTILINE) for name in ("full", "qlora"))
    assert shown.count("1e-4 to 2e-4") == 3


def test_options_page_is_current() -> None:
    """Make it again with: python -c "import vlft.manual; vlft.manual.write_options_page()"."""
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == manual.options_page()
    listed = set(re.findall(r"^\| `--(\w+)`", page, flags=re.MULTILINE))
    known = set(RunConfig.model_fields)
    for name, found in find(STRATEGIES).items():
        if found.distribution == "vlft":
            known |= set(load_strategy(name)[0].Config.model_fields)
    assert listed == known


def test_nearest() -> None:
    assert nearest("epocs", options_of(RunConfig)) == " (the nearest is 'epochs')"
    assert nearest("", ["a"]) == ""
    assert nearest("x", []) == ""


SCRIPT = """
import sys
import vlft.cli
for argv in {argvs}:
    vlft.cli.main(argv)
heavy = {{"torch", "transformers", "peft", "accelerate", "kornia", "numpy"}} & set(sys.modules)
assert not heavy, heavy
vlft.cli.main(["plugins"])  # imports the metrics, whose libraries may want numpy
assert "torch" not in sys.modules
"""


def test_brief_commands_are_seldom_collected(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = gc.get_threshold(), []
    plan = COMMANDS["plan"]
    for brief in (True, False):
        note = replace(plan, brief=brief, read=lambda _: None, run=lambda _: seen.append(gc.get_threshold()))
        monkeypatch.setitem(COMMANDS, "plan", note)
        assert main(["plan"]) == 0
        assert gc.get_threshold() == before
    assert seen[0][0] > 100 * before[0]
    assert seen[1] == before


def test_answers_without_torch(work: Path) -> None:
    """The answer to a wrong flag costs no torch; every strategy's options are read for it."""
    argvs = [
        words("--epocs 1 --llm_frozen_layers 3"),
        ["--help"],
        ["--tuning_strategy", "qlora", "--help"],
        ["merge", "x"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(argvs=argvs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the nearest is 'epochs'" in done.stderr


def test_module_and_exit_code(work: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlft", *words("--epocs 1")],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    assert done.stderr.count("epocs") == 1
    assert "Traceback" not in done.stderr
