"""The options themselves: ranges, combinations, what a resume may change, the folder of the run."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from vlft import config as c
from vlft.config import RunConfig, check_resume
from vlft.errors import CheckpointError, ConfigError
from vlft.parse import load_run, parse

ISSUE = shlex.split("""model_name_or_path output_dir resume_from_checkpoint dataset_config_path dataset_names
train_split_ratio use_data_augmentation augmentation epochs max_steps per_device_train_batch_size
per_device_eval_batch_size
gradient_accumulation_steps learning_rate_llm learning_rate_vit learning_rate_projector weight_decay warmup_steps
lr_scheduler_type max_grad_norm max_seq_length on_too_long min_pixels max_pixels tuning_strategy save_steps
save_total_limit eval_steps eval_dataset_scripts report_to use_wandb wandb_project wandb_run_name deepspeed
mixed_precision
gradient_checkpointing seed num_workers max_bad_fraction allow_remote_images trust_remote_code""")


def make(**values: Any) -> RunConfig:
    return RunConfig(**{"model_name_or_path": "a/b", "output_dir": "out", "tuning_strategy": "full", **values})


def run(*words: str, strategy: str = "full") -> c.Run:
    base = ["--model_name_or_path", "a/b", "--output_dir", "out", "--tuning_strategy", strategy]
    return parse([*base, *words], start=False)


ISSUE += shlex.split("eval_max_new_tokens eval_limit metric_for_best")
OURS = {
    "memory",
    "optim",
    "reference",
    "cache_dir",
    "max_skipped_steps",
    "eval_on_start",
    "report",
    "skip_probe",
    "eval_temperature",
    "greater_is_better",
}


def test_every_option_of_the_issue_and_no_other_but_ours() -> None:
    assert set(RunConfig.model_fields) == {*ISSUE, *OURS}


def test_defaults_of_the_issue() -> None:
    config = make()
    expected = {
        "train_split_ratio": 0.9,
        "epochs": 1,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "weight_decay": 0.01,
        "warmup_steps": None,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "max_seq_length": 2048,
        "on_too_long": "shrink",
        "max_pixels": 1003520,
        "min_pixels": None,
        "save_steps": 200,
        "save_total_limit": 3,
        "eval_steps": 200,
        "max_bad_fraction": 0.01,
        "seed": 42,
        "num_workers": min(4, os.cpu_count() or 1),
        "mixed_precision": None,
        "augmentation": None,
        "eval_dataset_scripts": {},
        "dataset_config_path": Path("configs/dataset_config.json"),
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_option_has_group_text_and_shown_default() -> None:
    for option in c.options_of(RunConfig).values():
        assert option.group in c.GROUPS, option.name
        assert option.text.endswith("."), option.name
        assert option.default, option.name
        if option.kind in ("a number", "a whole number"):
            assert option.limits, f"{option.name} has no range"


def test_numeric_fields_say_their_unit() -> None:
    units = ("step", "token", "pixel", "sample", "passes", "share", "rate", "norm", "seed", "process", "factor")
    for option in c.options_of(RunConfig).values():
        if "number" in option.kind and option.name != "save_total_limit":
            assert any(unit in option.text.lower() for unit in units), option.name


def test_evaluation_batch_is_the_training_batch() -> None:
    assert make(per_device_train_batch_size=8).per_device_eval_batch_size == 8
    assert make(per_device_train_batch_size=8, per_device_eval_batch_size=2).per_device_eval_batch_size == 2


def test_augmentation_switches() -> None:
    assert make(augmentation="geometric").use_data_augmentation
    assert make(use_data_augmentation=True).augmentation == "photometric"
    assert make(use_data_augmentation=True, augmentation="geometric").augmentation == "geometric"
    with pytest.raises(ValidationError, match="use_data_augmentation is false"):
        make(augmentation="geometric", use_data_augmentation=False)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"min_pixels": 2000, "max_pixels": 1000}, "above max_pixels 1000"),
        ({"wandb_project": "x"}, "add --use_wandb"),
        ({"wandb_run_name": "x"}, "add --use_wandb"),
        ({"eval_limit": 5}, "eval_limit is 5, but no answers are generated; add --eval_dataset_scripts"),
        ({"eval_max_new_tokens": 32}, "no answers are generated"),
        ({"eval_temperature": 0.7}, "no answers are generated"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1}, "give --lr_scheduler_type constant_with_warmup"),
        ({"epochs": 0}, "greater than 0"),
        ({"epochs": float("inf")}, "finite"),
        ({"weight_decay": float("nan")}, "finite"),
        ({"learning_rate_llm": 2}, "less than or equal to 1"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type"),
        ({"eval_dataset_scripts": ["invoices"]}, "needs a dataset"),
        ({"eval_dataset_scripts": ["a:x,p/x.py"]}, "two scripts 'x'"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        make(**values)


@pytest.mark.parametrize("values", [{"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant_with_warmup"}])
def test_no_warmup_is_no_contradiction(values: dict[str, Any]) -> None:
    """A file may say 0, and `constant` alone has none."""
    assert make(**values).warmup_steps is None
    assert make(**values, warmup_steps=0).warmup_steps == 0


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        make().seed = 3  # type: ignore[misc]


def test_scripts_in_every_spelling() -> None:
    want = {"a": ("x", "y.py"), "b": ("z",)}
    assert c.parse_scripts(["a:x,y.py", "b:z"]) == want
    assert c.parse_scripts({"a": ["x", "y.py"], "b": "z"}) == want
    assert c.parse_scripts(["a:x", "a: y.py ", "b:z"]) == want
    assert c.parse_scripts("b:z") == {"b": ("z",)}
    assert c.parse_scripts("b:~/z.py") == {"b": (str(Path("~/z.py").expanduser()),)}


def test_home_is_expanded() -> None:
    home = str(Path("~").expanduser())
    config = make(model_name_or_path="~/m", resume_from_checkpoint="~/c", deepspeed="~/d.json", output_dir="~/o")
    for value in (config.model_name_or_path, config.resume_from_checkpoint, config.deepspeed, str(config.output_dir)):
        assert str(value).startswith(home)


def test_null_means_not_given_and_no_is_a_word() -> None:
    assert make(max_seq_length=None, max_steps=None).max_seq_length == 2048
    assert make(mixed_precision=False).mixed_precision == "no"
    assert make(dataset_names="invoices").dataset_names == ("invoices",)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLFT_CACHE", "/somewhere")
    assert make().cache_dir == Path("/somewhere")
    monkeypatch.delenv("VLFT_CACHE")
    assert make().cache_dir == Path("~/.cache/vlft").expanduser()
    assert make(cache_dir="~/x").cache_dir == Path("~/x").expanduser()


# Rates ----------------------------------------------------------------------------------------------------------------


def test_rates_are_given_or_the_strategy_s() -> None:
    assert run().rates == {"llm": 2e-5, "vit": 1e-5, "projector": 1e-4}
    assert run("--learning_rate_vit", "2e-4").rates == {"llm": 2e-5, "vit": 2e-4, "projector": 1e-4}
    assert run(strategy="qlora").rates == {"llm": 1e-4}
    assert run("--train_vit", strategy="qlora").rates == {"llm": 1e-4, "vit": 1e-5, "projector": 1e-4}


@pytest.mark.parametrize(
    ("strategy", "words", "parts"),
    [
        ("full", "--no-train_vit", {"llm", "projector"}),
        ("full", "--no-train_vit --no-train_projector", {"llm"}),
        ("partial_llm_full_vit", "--no-train_vit", {"llm", "projector"}),
        ("lora_llm_full_vit", "--no-train_vit", {"llm", "projector"}),
        ("vit_only", "--no-train_vit", {"projector"}),
        ("vit_only", "--no-train_projector", {"vit"}),
        ("lora", "", {"llm"}),
        ("lora", "--train_vit --no-train_projector", {"llm", "vit"}),
        ("qlora", "--train_projector", {"llm", "projector"}),
    ],
)
def test_parts_that_train(strategy: str, words: str, parts: set[str]) -> None:
    """`full --no-train_vit` is the recipe of the Qwen authors."""
    assert set(run(*words.split(), strategy=strategy).rates) == parts


# run.yaml -------------------------------------------------------------------------------------------------------------


def test_run_yaml_repeats_the_run(tmp_path: Path) -> None:
    words = shlex.split(
        "--lora_rank 8 --lora_target_modules q_proj v_proj --train_vit --eval_dataset_scripts a:x,y b:z "
        "--augmentation geometric --learning_rate_llm 3e-4 --dataset_names one two --mixed_precision no"
    )
    first = run(*words, strategy="qlora")
    path = tmp_path / "run.yaml"
    path.write_text(c.resolved_yaml(first))
    again = load_run(path)
    assert again.rates == first.rates
    assert again.options == first.options
    assert (again.strategy, again.distribution) == (first.strategy, first.distribution)
    assert c.resolved_yaml(again) == path.read_text()
    same = {"output_dir", "dataset_config_path", *(f"learning_rate_{part}" for part in c.RATE_PARTS)}
    assert again.config.model_dump(exclude=same) == first.config.model_dump(exclude=same)


def test_a_flag_decides_for_what_depends_on_it(tmp_path: Path) -> None:
    """Otherwise the file's `max_steps` would hold against `--epochs`, and its direction for another metric."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(stored() | {"max_steps": 2, "metric_for_best": "a/f1", "greater_is_better": True}))
    assert load_run(path).config.max_steps == 2
    new = load_run(path, ["--epochs", "3", "--metric_for_best", "a/loss"]).config
    assert (new.epochs, new.max_steps, new.greater_is_better) == (3, None, None)
    new = load_run(path, ["--epochs", "3", "--max_steps", "5"]).config
    assert (new.epochs, new.max_steps, new.greater_is_better) == (3, 5, True)


def test_a_run_that_was_moved_says_where_it_goes_on(tmp_path: Path) -> None:
    """Its run.yaml names the folder that it had, where a resume would begin anew in silence."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "run_card.json").write_text("{}")
    path = here / "run.yaml"
    path.write_text(yaml.safe_dump(stored() | {"output_dir": str(there)}))
    with pytest.raises(ConfigError, match=f"whose folder was {there}, and lies in {here}; give --output_dir"):
        load_run(path, ["--resume_from_checkpoint", "latest"])
    assert load_run(path).config.output_dir == there  # repeats the run
    more = ["--resume_from_checkpoint", "latest", "--output_dir", str(here)]
    assert load_run(path, more).config.output_dir == here
    path.write_text(yaml.safe_dump(stored() | {"output_dir": str(here)}))
    assert load_run(path, more[:2]).config.output_dir == here


def test_run_yaml_is_flat_and_complete() -> None:
    data = yaml.safe_load(c.resolved_yaml(run("--resume_from_checkpoint", "latest", strategy="lora")))
    assert next(iter(data)) == "schema"
    assert data["schema"] == 1
    assert set(data) >= {*ISSUE, "lora_rank", "lora_alpha", "train_vit"}
    assert data["resume_from_checkpoint"] is None
    assert data["learning_rate_llm"] == 1e-4
    assert data["learning_rate_vit"] is None
    assert Path(data["output_dir"]).is_absolute()


@pytest.mark.parametrize("strategy", ["full", "vit_only", "partial_llm_full_vit", "lora", "lora_llm_full_vit", "qlora"])
def test_run_yaml_of_every_strategy(tmp_path: Path, strategy: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(c.resolved_yaml(run(strategy=strategy)))
    assert c.resolved_yaml(load_run(path)) == path.read_text()


# Resume ---------------------------------------------------------------------------------------------------------------


def stored(*words: str, strategy: str = "full") -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(c.resolved_yaml(run(*words, strategy=strategy)))
    return data


CHANGED = {
    "output_dir": "other",
    "resume_from_checkpoint": "latest",
    "trust_remote_code": "true",
    "max_bad_fraction": "0.5",
    "max_skipped_steps": "7",
    "epochs": "3",
    "max_steps": "7",
    "per_device_eval_batch_size": "4",
    "save_steps": "7",
    "save_total_limit": "7",
    "eval_steps": "7",
    "eval_dataset_scripts": "a:exact_match",
    "eval_max_new_tokens": "7",
    "eval_limit": "7",
    "eval_temperature": "0.5",
    "eval_on_start": "true",
    "metric_for_best": "a/loss",
    "use_wandb": "true",
    "report_to": "tensorboard",
    "report": "false",
    "deepspeed": "zero2",
    "gradient_checkpointing": "true",
    "skip_probe": "true",
    "memory": "low",
    "num_workers": "0",
    "cache_dir": "x",
    "model_name_or_path": "c/d",
    "dataset_config_path": "x.json",
    "dataset_names": "x",
    "train_split_ratio": "0.5",
    "use_data_augmentation": "true",
    "augmentation": "geometric",
    "max_seq_length": "7",
    "on_too_long": "drop",
    "min_pixels": "1000",
    "max_pixels": "1000",
    "allow_remote_images": "true",
    "warmup_steps": "7",
    "lr_scheduler_type": "linear",
    "weight_decay": "0.5",
    "max_grad_norm": "7",
    "seed": "7",
    "learning_rate_llm": "7e-6",
    "learning_rate_vit": "7e-6",
    "learning_rate_projector": "7e-6",
}
ELSEWHERE = {
    "optim",
    "reference",
    "greater_is_better",
    "mixed_precision",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "tuning_strategy",
    "wandb_project",
}


def test_every_option_is_tried_on_a_resume() -> None:
    assert {*CHANGED, *ELSEWHERE, "wandb_run_name"} == set(RunConfig.model_fields)


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_resume_may_change(name: str, tmp_path: Path) -> None:
    old = stored("--eval_dataset_scripts", "b:anls")  # else nothing is generated, which eval_limit limits
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(old))
    new = load_run(path, [f"--{name}", CHANGED[name]])
    if c.options_of(RunConfig)[name].resume == "yes":
        check_resume(old, new, stored_global_batch=1, world_size=1, precision=("no", "no"))
    else:
        with pytest.raises(CheckpointError, match=f"--{name} was .* and is now"):
            check_resume(old, new, stored_global_batch=1, world_size=1, precision=("no", "no"))


def test_a_file_of_old_may_limit_answers_that_nobody_generates(tmp_path: Path) -> None:
    """It was legal, and a finished run is built again from its file; a flag that says so is refused."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(stored() | {"eval_limit": 5, "eval_temperature": 0.5}))
    assert load_run(path, []).config.eval_limit is None
    with pytest.raises(ConfigError, match="--eval_limit is 4, but no answers are generated"):
        load_run(path, ["--eval_limit", "4"])


def test_the_precision_that_was_used_counts_not_the_word() -> None:
    """`--mixed_precision` may be left to the device: on another device that would be another run in silence."""
    old, new = stored(), run("--mixed_precision", "bf16")
    check_resume(old, new, stored_global_batch=1, world_size=1, precision=("bf16", "bf16"))
    with pytest.raises(CheckpointError, match="--mixed_precision was 'bf16' and is now 'no'"):
        check_resume(old, run(), stored_global_batch=1, world_size=1, precision=("bf16", "no"))


def test_resume_lists_all_and_strategy_options_too() -> None:
    new = run("--lora_rank", "8", "--seed", "1", "--learning_rate_llm", "1e-3", strategy="lora")
    with pytest.raises(CheckpointError) as caught:
        check_resume(stored(strategy="lora"), new, stored_global_batch=1, world_size=1, precision=("no", "no"))
    problems = str(caught.value).split("\n")
    assert len(problems) == 3
    assert all(any(f"--{name} was" in p for p in problems) for name in ("lora_rank", "seed", "learning_rate_llm"))


def test_resume_with_another_strategy() -> None:
    with pytest.raises(CheckpointError, match="--tuning_strategy was 'lora' and is now 'full'"):
        check_resume(stored(strategy="lora"), run(), stored_global_batch=1, world_size=1, precision=("no", "no"))


def test_same_words_on_another_number_of_processes() -> None:
    """G stays and the accumulation follows: 2 x 4 on one process is the 8 of 2 x 2 on two."""
    words = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    old = stored(*words)
    for world_size, accumulation in ((1, 4), (2, 2), (4, 1), (8, 1), (3, 2)):
        new = run(*words)
        check_resume(old, new, stored_global_batch=8, world_size=world_size, precision=("no", "no"))
        assert c.accumulation_for(new.config, world_size, 8) == accumulation


@pytest.mark.parametrize(
    ("words", "world_size", "fits"),
    [
        ("--per_device_train_batch_size 1 --gradient_accumulation_steps 8", 1, True),
        ("--per_device_train_batch_size 1 --gradient_accumulation_steps 4", 2, True),
        ("--per_device_train_batch_size 4", 1, True),
        ("--per_device_train_batch_size 1", 1, True),
        ("", 1, True),
        ("--per_device_train_batch_size 3", 1, False),
        ("--per_device_train_batch_size 1 --gradient_accumulation_steps 4", 1, False),
        ("--gradient_accumulation_steps 8", 1, True),
        ("--gradient_accumulation_steps 2", 1, False),
    ],
)
def test_flags_that_contradict_the_global_batch(words: str, world_size: int, fits: bool) -> None:
    old = stored("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    new = run(*words.split())
    if fits:
        check_resume(old, new, stored_global_batch=8, world_size=world_size, precision=("no", "no"))
        return
    with pytest.raises(CheckpointError, match="global batch of 8, which stays; give --per_device_train_batch_size 2"):
        check_resume(old, new, stored_global_batch=8, world_size=world_size, precision=("no", "no"))


def test_a_new_option_does_not_end_an_old_run() -> None:
    old = stored()
    del old["on_too_long"]
    check_resume(old, run("--on_too_long", "drop"), stored_global_batch=1, world_size=1, precision=("no", "no"))


# The folder, bundled files -------------------------------------------------------------------------------------------


def test_output_dir(tmp_path: Path) -> None:
    c.check_output_dir(make(output_dir=tmp_path / "new"))
    c.check_output_dir(make(output_dir=tmp_path))
    (tmp_path / ".keep").touch()
    c.check_output_dir(make(output_dir=tmp_path))
    (tmp_path / "run.yaml").touch()
    with pytest.raises(ConfigError, match="no run of vlft"):
        c.check_output_dir(make(output_dir=tmp_path, resume_from_checkpoint="latest"))
    (tmp_path / "run_card.json").touch()
    with pytest.raises(ConfigError, match="is not empty; give --resume_from_checkpoint latest"):
        c.check_output_dir(make(output_dir=tmp_path))
    c.check_output_dir(make(output_dir=tmp_path, resume_from_checkpoint="latest"))
    with pytest.raises(ConfigError, match="is a file"):
        c.check_output_dir(make(output_dir=tmp_path / "run.yaml", resume_from_checkpoint="latest"))


def test_deepspeed_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "zero2.json"
    shipped.write_text("{}")
    monkeypatch.setattr(c, "bundled", lambda kind, suffix: {"zero2": shipped})
    own = tmp_path / "mine.json"
    own.write_text("{}")
    assert c.deepspeed_path(str(own)) == own
    assert c.deepspeed_path("zero2") == shipped
    assert c.deepspeed_path("./configs/zero2.json") == shipped
    with pytest.raises(ConfigError, match=r"no such file \(the nearest is 'zero2'\); .* bundled name \(zero2\)"):
        c.deepspeed_path("zero22")


def test_global_batch() -> None:
    assert c.global_batch(make(per_device_train_batch_size=2, gradient_accumulation_steps=8), 4) == 64


def test_a_plan_of_memory_is_a_word_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "memory.yaml"
    path.write_text("vision: {attention: 12, attended: 8, input: 12}\n")
    assert [c.memory_plan(word) for word in ("auto", "all", "low")] == ["auto", "all", "low"]
    assert make(memory="all").kept == make(gradient_checkpointing=False).kept == "all"
    assert c.memory_plan(str(path)) == {"vision": {"attention": 12, "attended": 8, "input": 12}}
    assert make(memory=str(path)).memory == str(path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("40GiB", 40 * 2**30), ("24GB", 24 * 10**9), ("24G", 24 * 10**9), ("0.5 gib", 2**29), ("800MiB", 800 * 2**20),
     ("800m", 8 * 10**8)],
)  # fmt: skip
def test_a_plan_of_memory_is_a_size(text: str, size: int) -> None:
    assert c.memory_plan(text) == size
    assert make(memory=text).kept == size
    assert run("--memory", text).config.memory == text


@pytest.mark.parametrize("text", ["lo", "everything", "40", "0GiB", "-4GiB", "40Gi", "40 apples", "GiB"])
def test_a_word_that_is_no_plan_of_memory(text: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--memory is no word of it, no size and no file.*; give auto, all, low, a size such as 40GiB or "
        rf"24GB, or the path of a YAML file; found '{text}'\.$",
    ):
        run("--memory", text)


@pytest.mark.parametrize(
    "text", ["vision: {attention: -1}", "vision: 3", "tower: {input: 1}", "{", "- 1", "vision: {all: 2}"]
)
def test_a_plan_of_memory_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "memory.yaml"
    path.write_text(text)
    with pytest.raises(
        ConfigError,
        match=r"--memory is no such plan .*write e\.g\. vision: \{attention: 20, input: 12\}; found '.*memory\.yaml'",
    ):
        run("--memory", str(path))
    with pytest.raises(ConfigError, match=r"no word of it, no size and no file; give auto.*found '.*absent\.yaml'"):
        run("--memory", str(tmp_path / "absent.yaml"))


def test_memory_and_checkpointing_are_one_choice() -> None:
    with pytest.raises(
        ConfigError, match="gradient_checkpointing is True, and memory is low; leave one of the two out"
    ):
        run("--memory", "low", "--gradient_checkpointing")
