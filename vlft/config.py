"""Every option of a run, once: name, type, range, unit, default, group, and whether a resume may change it.

The command line, `--help`, docs/options.md and the check of a resume are all derived from the fields here. No torch at
import time: a wrong flag must answer in under a second.
"""

from __future__ import annotations

import json
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlft.errors import CheckpointError, ConfigError
from vlft.family import Part
from vlft.rivals import nearest
from vlft.strategy import Strategy, StrategyConfig

SCHEMA = 1
"""Version of run.yaml's layout."""

Resume = Literal["no", "yes", "batch"]
"""May a resume change the option: no, yes, or only while the global batch stays the same."""

GROUPS: dict[str, str] = {
    "model": "Model and strategy",
    "data": "Data",
    "training": "Training",
    "rates": "Learning rates",
    "saving": "Saving",
    "evaluation": "Evaluation",
    "tracking": "Tracking",
    "machine": "Machine",
}
TrackerName = Literal["wandb", "tensorboard", "trackio"]
RATE_PARTS: tuple[Part, ...] = ("llm", "vit", "projector")
"""Parts with a rate of their own; the head takes the LLM's."""


def _option(group: str, default: Any, text: str, *, resume: Resume = "no", shown: str = "", **limits: Any) -> Any:
    """A field. `shown` is what help and docs print as default where the value itself says nothing."""
    extra: JsonDict = {"group": group, "resume": resume, "shown": shown}
    if callable(default):
        return Field(default_factory=default, description=text, json_schema_extra=extra, **limits)
    return Field(default, description=text, json_schema_extra=extra, **limits)


_model = partial(_option, "model")
_data = partial(_option, "data")
_training = partial(_option, "training")
_rate = partial(_option, "rates", None, shown="the strategy's", gt=0, le=1)
_saving = partial(_option, "saving")
_evaluation = partial(_option, "evaluation")
_tracking = partial(_option, "tracking", resume="yes")
_machine = partial(_option, "machine", resume="yes")


def default_cache_dir() -> Path:
    return Path(os.environ.get("VLFT_CACHE") or "~/.cache/vlft").expanduser()


class CommandOptions(BaseModel):
    """Base of every command's options: fields with descriptions, from which flags and help are made."""

    # `model_name_or_path` is the field's name everywhere; pydantic would keep "model_" for itself.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )

    def problems(self, failed: set[str]) -> list[str]:  # noqa: ARG002
        """What is wrong on the disk; options in `failed` were told already."""
        return []


class SharedOptions(CommandOptions):
    """What training and `vlft eval` both take: which data, cut how, and how answers are made and scored."""

    trust_remote_code: bool = _model(False, "Run Python code that comes with the checkpoint.", resume="yes")

    dataset_config_path: Path = _data(Path("configs/dataset_config.json"), "Registry of datasets, a JSON file.")
    dataset_names: tuple[str, ...] | None = _data(None, "Datasets of the registry to use.", shown="all")
    train_split_ratio: float = _data(
        0.9, "Share of each dataset that trains; the rest is held out for evaluation (1: no evaluation).", gt=0, le=1
    )
    max_seq_length: int = _data(2048, "Longest sample, in tokens, pictures included.", gt=0)
    on_too_long: Literal["shrink", "drop", "error"] = _data(
        "shrink", "What to do with a longer sample: shrink its pictures (then drop), drop it to the ledger, or stop."
    )
    min_pixels: int | None = _data(
        None, "Smallest size of a picture, in pixels (width x height).", shown="the checkpoint's", ge=784
    )
    max_pixels: int = _data(1003520, "Largest size of a picture, in pixels (width x height).", ge=784)
    max_bad_fraction: float = _data(
        0.01,
        "Share of unusable samples above which the run stops (too long ones do not count).",
        resume="yes",
        ge=0,
        le=1,
    )
    allow_remote_images: bool = _data(False, "Fetch pictures that are given as http(s) addresses.")

    seed: int = _training(42, "Seed of order, split, augmentation, dropout and new weights.", ge=0, lt=2**32)

    eval_dataset_scripts: dict[str, tuple[str, ...]] = _evaluation(
        dict,
        "Metrics of generated answers: 'dataset:script1,script2', a script being an installed name or a Python file.",
        resume="yes",
        shown="none",
    )
    eval_max_new_tokens: int = _evaluation(256, "Longest generated answer, in tokens.", resume="yes", gt=0)
    eval_limit: int | None = _evaluation(
        None,
        "Held-out samples of a dataset that are answered in an evaluation, always the same ones; the loss takes all.",
        resume="yes",
        shown="all",
        gt=0,
    )
    eval_temperature: float = _evaluation(
        0.0,
        "Temperature, a factor of the distribution from which answers are drawn; 0: greedy, without penalties.",
        resume="yes",
        ge=0,
    )

    mixed_precision: Literal["no", "bf16", "fp16"] | None = _machine(
        None, "Dtype of the products.", resume="no", shown="bf16 where the device has it, else no"
    )
    num_workers: int = _machine(
        lambda: min(4, os.cpu_count() or 1),
        "Processes that decode pictures, per training process (0: in the process itself).",
        shown="4, or as many as there are processors",
        ge=0,
    )
    cache_dir: Path = _machine(default_cache_dir, "Folder of the data index.", shown="$VLFT_CACHE, or ~/.cache/vlft")

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _unquoted_no(cls, value: Any) -> Any:
        """YAML reads an unquoted `no` as false."""
        return "no" if value is False else value

    @field_validator("dataset_names", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("eval_dataset_scripts", mode="before")
    @classmethod
    def _scripts(cls, value: Any) -> dict[str, tuple[str, ...]]:
        return parse_scripts(value)

    @field_validator("dataset_config_path", "cache_dir")
    @classmethod
    def _home_of_shared(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="before")
    @classmethod
    def _not_given(cls, data: Any) -> Any:
        """`null` means not given, so that run.yaml can show an option that has its default."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class EvalOptions(SharedOptions):
    """Options of `vlft eval`. Where MODEL belongs to a run, what is not given is as it was in the run."""

    model: str = _model(..., "What to evaluate: a run, its model/, any Hugging Face folder or hub name.")
    output_dir: Path | None = _model(
        None,
        "Folder for predictions and metrics.json; must be empty, or hold an earlier evaluation.",
        shown="eval/model/ of the run",
    )
    config: Path | None = _model(None, "run.yaml to take the options from.", shown="that of the run, for a run's model")
    split: Literal["held_out", "all"] = _data(
        "held_out", "Which samples: those that training with this train_split_ratio holds out, or all."
    )
    max_pixels: int | None = _data(  # type: ignore[assignment]
        None, "Largest size of a picture, in pixels (width x height).", shown="the model's", ge=784
    )
    per_device_eval_batch_size: int = _evaluation(1, "Samples a process takes in one forward.", gt=0)

    def problems(self, failed: set[str]) -> list[str]:
        found = []
        if "output_dir" not in failed and self.output_dir is None:
            found.append("--output_dir is missing; give a folder for the answers (only a run has a place for them).")
        elif "output_dir" not in failed and self.output_dir is not None:
            found += self._folder_problem(self.output_dir)
        if "dataset_config_path" not in failed and not self.dataset_config_path.is_file():
            found.append(f"--dataset_config_path {self.dataset_config_path}: there is no such file; give the registry.")
        return found

    @staticmethod
    def _folder_problem(folder: Path) -> list[str]:
        if not folder.is_dir():
            return [problem] if (problem := output_dir_problem(folder, None)) else []
        here = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
        if strange := sorted(here - evaluation_files(folder)):
            return [f"--output_dir {folder} is not empty: it holds {strange[0]}; give a new folder."]
        unwritable = no_folder(folder, writable=True)
        return [f"--output_dir {folder}: {unwritable}; choose another."] if unwritable else []

    @field_validator("model")
    @classmethod
    def _home_of_model(cls, value: str) -> str:
        return str(Path(value).expanduser()) if value.startswith("~") else value


ANSWERS = ("eval_max_new_tokens", "eval_limit", "eval_temperature")
"""Options of the answers that scripts judge."""


class RunConfig(SharedOptions):
    """The core's options of a training. A strategy's own stand in its `Config`."""

    model_name_or_path: str = _model(..., "Base model: hub name, folder, or output_dir/model of an earlier run.")
    output_dir: Path = _model(..., "Folder of the run; must be empty unless the run is resumed.", resume="yes")
    resume_from_checkpoint: str | None = _model(
        None,
        "Checkpoint folder to go on from, or 'latest' in output_dir (with none there, the run starts fresh).",
        resume="yes",
    )
    tuning_strategy: str = _model(..., "Which parts train and how, by name; 'vlft plugins' lists them.")

    use_data_augmentation: bool = _data(False, "Change training pictures at random, seeded by the sample.")
    augmentation: str | None = _data(
        lambda values: "photometric" if values.get("use_data_augmentation") else None,
        "Policy: photometric (colour, blur, noise, JPEG), geometric (flips, turns and crops too), document (what pages "
        "undergo in scans and photographs), or a YAML file of Kornia's ops. Giving it switches augmentation on.",
        shown="photometric, when augmentation is on",
    )

    epochs: float = _training(
        1.0,
        "Passes over the training data; a fraction is rounded up to whole optimizer steps.",
        resume="yes",
        gt=0,
    )
    max_steps: int | None = _training(
        None,
        "Optimizer steps of the run; overrides epochs.",
        resume="yes",
        shown="epochs decides",
        gt=0,
    )
    per_device_train_batch_size: int = _training(
        1,
        "Samples a process takes in one forward; with accumulation and processes: the global batch.",
        resume="batch",
        gt=0,
    )
    per_device_eval_batch_size: int = _training(
        lambda values: values["per_device_train_batch_size"],
        "Samples a process takes in one forward of an evaluation.",
        resume="yes",
        shown="per_device_train_batch_size",
        gt=0,
    )
    gradient_accumulation_steps: int = _training(
        1, "Forwards a process sums in one optimizer step.", resume="batch", gt=0
    )
    warmup_steps: int | None = _training(
        None, "Optimizer steps over which the rates rise from zero.", shown="3% of the steps", ge=0
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        _training("cosine", "Course of the rates after the warmup.")
    )
    optim: Literal["adamw", "adamw_bf16", "adamw_8bit"] = _training(
        "adamw",
        "Digits of trained weights and of AdamW's states: adamw has fp32 for both (16 bytes a parameter, its gradient "
        "included; 14 on one GPU in steps of one forward), adamw_bf16 bf16 (8 bytes), adamw_8bit bf16 weights and "
        "states of 8 bits (6 bytes). The two last round stochastically, need bf16 and run on one GPU or on whole "
        "copies.",
    )
    weight_decay: float = _training(
        0.01, "AdamW's decoupled decay, a factor of the rate; norms and biases never decay.", ge=0
    )
    max_grad_norm: float = _training(1.0, "Gradients are scaled down to this norm (0: never).", ge=0)
    max_skipped_steps: int = _training(
        10, "Steps in a row whose loss or gradient is not finite before the run stops.", resume="yes", gt=0
    )

    learning_rate_llm: float | None = _rate(
        text="Peak rate of the LLM and head, per step. "
        "The tuning guide: 1e-4 to 2e-4 for adapters, 1e-5 to 5e-5 for weights."
    )
    learning_rate_vit: float | None = _rate(
        text="Peak rate of the vision tower, per step. The tuning guide: 1e-4 to 2e-4; the Qwen authors use lower ones."
    )
    learning_rate_projector: float | None = _rate(
        text="Peak rate of the projector, per step. The tuning guide: 1e-4 to 2e-4; the Qwen authors use lower ones."
    )

    save_steps: int = _saving(200, "A checkpoint every so many optimizer steps.", resume="yes", gt=0)
    save_total_limit: int = _saving(3, "Checkpoints to keep; older ones are deleted.", resume="yes", gt=0)

    eval_steps: int = _evaluation(200, "An evaluation every so many optimizer steps.", resume="yes", gt=0)
    eval_on_start: bool | None = _evaluation(
        None,
        "An evaluation before the first step, too: what the base model can do.",
        resume="yes",
        shown="on with eval_dataset_scripts",
    )
    metric_for_best: str | None = _evaluation(
        None,
        "Key of metrics.jsonl by which the best checkpoint is kept and becomes model/, as 'eval/invoices/anls/anls' or "
        "'invoices/loss'.",
        resume="yes",
        shown="none: model/ is of the last step",
    )
    greater_is_better: bool | None = _evaluation(
        None,
        "Direction of metric_for_best.",
        resume="yes",
        shown="by the metric: a loss or error rate should fall, the rest rise",
    )

    report: bool = _tracking(True, "Write report.html at every save.")
    report_to: tuple[TrackerName, ...] | None = _tracking(
        None, "Trackers to log to as well as to metrics.jsonl; TensorBoard's files lie in output_dir/tensorboard."
    )
    use_wandb: bool = _tracking(False, "Log to Weights & Biases: the same as wandb in report_to.")
    wandb_project: str | None = _tracking(None, "Project at Weights & Biases and in trackio.", shown="vlft")
    wandb_run_name: str | None = _tracking(
        None, "Name of the run at Weights & Biases and in trackio.", shown="the tracker's own"
    )

    deepspeed: str | None = _machine(
        None,
        "DeepSpeed configuration: a name that ships with vlft (zero2, zero3, zero3_offload) or a JSON file.",
        shown="none",
    )
    reference: bool = _machine(
        False, "Run transformers' own layers instead of vlft's faster ones, to compare the two.", resume="no"
    )
    memory: str = _machine(
        "auto",
        "What layers keep for the backward pass: auto (on a GPU, as much as fits; on a CPU, all), all, low (their "
        "inputs alone), a size such as 40GiB or 24GB (auto, on a GPU of which each process has that much), or a YAML "
        "file with a number of layers for each tower, e.g. vision: {attention: 12, attended: 8, input: 12}: so many "
        "drop the MLP's inner values, these and queries, keys and values, or all but their input.",
    )
    skip_probe: bool | None = _machine(
        None,
        "Start without running the largest micro-batch once, forward and backward, to see that it fits; false runs it "
        "on a CPU too.",
        shown="true on a CPU, false on a GPU",
    )
    gradient_checkpointing: bool | None = _machine(
        None,
        "Compute activations again in the backward pass: less memory, more time. On is --memory low, off is --memory "
        "all.",
        shown="by --memory",
    )

    @model_validator(mode="before")
    @classmethod
    def _augmentation_given(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("augmentation") is not None:
            return {"use_data_augmentation": True, **{k: v for k, v in data.items() if v is not None}}
        return data

    @field_validator("memory")
    @classmethod
    def _memory_is_a_plan(cls, value: str) -> str:
        try:
            memory_plan(value)
        except ConfigError as error:
            # The place that it was written in, and what was found, are added to every such sentence.
            raise ValueError(str(error).removeprefix(f"--memory {value} ").rstrip(".")) from error
        return value

    @field_validator("output_dir")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("model_name_or_path", "resume_from_checkpoint", "deepspeed", "augmentation")
    @classmethod
    def _home_in_words(cls, value: str | None) -> str | None:
        """A shell does not expand `~` in YAML."""
        return str(Path(value).expanduser()) if value and value.startswith("~") else value

    @model_validator(mode="after")
    def _together(self, info: ValidationInfo) -> Self:
        """Options that contradict each other. Those that were wrong by themselves (`failed`) are left alone."""
        context = info.context or {}
        failed, places = context.get("failed", ()), context.get("places", {})
        problems = []
        for names, wrong, text in self._contradictions():
            if wrong and not any(name in failed for name in names):
                problems.append(f"{places.get(names[0], '--' + names[0])} {text}")
        # "" has failed: they were reported before, and the rest of the options is wanted.
        if problems and "" not in failed:
            raise ValueError("\n".join(problems))
        return self

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """What is logged to beside metrics.jsonl, without repetitions."""
        found: tuple[TrackerName, ...] = (*(self.report_to or ()), *(("wandb",) if self.use_wandb else ()))
        return tuple(dict.fromkeys(found))

    @property
    def kept(self) -> str | int | MemoryPlan:
        """What layers keep for the backward pass, see `memory_plan`."""
        if self.gradient_checkpointing is not None:
            return "low" if self.gradient_checkpointing else "all"
        return memory_plan(self.memory)

    def _contradictions(self) -> list[tuple[tuple[str, ...], bool, str]]:
        low, high = self.min_pixels, self.max_pixels
        return [
            (
                ("min_pixels", "max_pixels"),
                low is not None and low > high,
                f"is {low}, above max_pixels {high}; lower it or raise --max_pixels.",
            ),
            (
                ("warmup_steps", "lr_scheduler_type"),
                bool(self.warmup_steps) and self.lr_scheduler_type == "constant",
                f"is {self.warmup_steps}, but the constant schedule has no warmup; give --lr_scheduler_type "
                "constant_with_warmup or leave it out.",
            ),
            (
                ("gradient_checkpointing", "memory"),
                self.gradient_checkpointing is not None and self.memory != "auto",
                f"is {self.gradient_checkpointing}, and memory is {self.memory}; leave one of the two out.",
            ),
            (
                ("greater_is_better", "metric_for_best"),
                self.greater_is_better is not None and self.metric_for_best is None,
                "is given, but there is no metric_for_best; add --metric_for_best or leave it out.",
            ),
            (
                ("augmentation", "use_data_augmentation"),
                self.augmentation is not None and not self.use_data_augmentation,
                f"is {self.augmentation}, but use_data_augmentation is false; leave one of the two out.",
            ),
            *(
                (
                    (name, "use_wandb", "report_to"),
                    getattr(self, name) is not None and not {"wandb", "trackio"} & {*self.trackers},
                    "is given, but nothing is logged there; add --use_wandb or leave it out.",
                )
                for name in ("wandb_project", "wandb_run_name")
            ),
            *(
                (
                    (name, "eval_dataset_scripts"),
                    getattr(self, name) != type(self).model_fields[name].default and not self.eval_dataset_scripts,
                    f"is {getattr(self, name)}, but no answers are generated; add --eval_dataset_scripts or leave it "
                    "out.",
                )
                for name in ANSWERS
            ),
        ]


class DoctorOptions(RunConfig):
    """Options of `vlft doctor`: those of the training that it looks at, and a few of its own."""

    output_dir: Path | None = _model(  # type: ignore[assignment]
        None, "Folder that the run will have: its disk is looked at.", shown="the current folder's disk"
    )
    tuning_strategy: str | None = _model(  # type: ignore[assignment]
        None, "Which parts train and how; its options are checked as training checks them.", shown="none"
    )
    page: Path = _model(Path("doctor.html"), "File of the page.")
    look: tuple[Literal["environment", "model", "data"], ...] = _model(
        ("environment", "model", "data"), "What to look at; data alone needs the model's tokenizer, not its weights."
    )
    sample_limit: int = _data(
        10_000,
        "Samples whose pictures are decoded and whose texts are read, chosen by a hash (0: all). Counts, exact "
        "duplicates and what would be left out are always of all.",
        ge=0,
    )

    @field_validator("look", mode="before")
    @classmethod
    def _one_place(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("page")
    @classmethod
    def _home_of_page(cls, value: Path) -> Path:
        return value.expanduser()


class PlanOptions(RunConfig):
    """Options of `vlft plan`: those of the training, and a few of its own."""

    output_dir: Path | None = _model(None, "Folder that the run will have.", shown="none")  # type: ignore[assignment]
    gpu: str | None = _machine(
        None, "GPU to plan for, e.g. 'RTX 4090 24GB'; a size goes before the usual one.", shown="the one at hand"
    )
    gpus: int = _machine(1, "How many of them.", gt=0)
    goal: str | None = _machine(
        None, "Search for the fewest changes with which it fits, e.g. 'fit 24GB'.", shown="none"
    )


def parse_scripts(value: Any) -> dict[str, tuple[str, ...]]:
    """`['a:x,y', 'b:z']` or `{'a': ['x', 'y'], 'b': 'z'}` -> `{'a': ('x', 'y'), 'b': ('z',)}`.

    Raises:
        ValueError: a part is missing, or two scripts of a dataset share the stem under which metrics.jsonl lists them.
    """
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        words = value if isinstance(value, list | tuple) else [value]
        pairs = [(dataset, names) for dataset, _, names in (str(word).partition(":") for word in words)]
    result: dict[str, tuple[str, ...]] = {}
    for written, names in pairs:
        dataset = str(written).strip()
        split = names if isinstance(names, list | tuple) else str(names or "").split(",")
        scripts = tuple(str(Path(script).expanduser()) for script in (str(one).strip() for one in split) if script)
        if not dataset or not scripts:
            raise ValueError("needs a dataset and its scripts, as in 'invoices:exact_match,my_metric.py'")
        result[dataset] = result.get(dataset, ()) + scripts
        stems = [Path(script).stem for script in result[dataset]]
        if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
            raise ValueError(f"names two scripts '{twice}' for dataset '{dataset}'; rename one of the files")
    return result


@dataclass(frozen=True)
class Option:
    """One field of a config as the command line, help and docs see it."""

    name: str
    kind: str
    limits: str
    default: str
    text: str
    group: str
    resume: Resume
    is_list: bool
    is_bool: bool
    nullable: bool
    required: bool
    choices: tuple[str, ...]

    @property
    def values(self) -> str:
        """What may be given: `a number above 0`."""
        return f"{self.kind} {self.limits}".strip()


def options_of(model: type[BaseModel], group: str = "") -> dict[str, Option]:
    """The fields of a config, in their order. `group` is for a strategy's options, which have none."""
    return {name: _describe(name, field, group) for name, field in model.model_fields.items()}


def _describe(name: str, field: FieldInfo, group: str) -> Option:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    types_, choices, limits = _flatten(field.annotation)
    limits += [word for item in field.metadata for word in _limit(item)]
    is_list = any(
        typing.get_origin(one) in (list, tuple, set, dict) or one in (list, tuple, set, dict) for one in types_
    )
    return Option(
        name=name,
        kind=_kind(types_, choices, is_list),
        limits=" and ".join(limits),
        default=str(extra.get("shown") or _shown(field)),
        text=(field.description or "").strip(),
        group=group or str(extra.get("group", "")),
        resume=typing.cast("Resume", extra.get("resume", "no")),
        is_list=is_list,
        is_bool=bool in types_,
        nullable=type(None) in types_,
        required=field.is_required(),
        choices=tuple(choices),
    )


def _flatten(annotation: Any) -> tuple[list[Any], list[str], list[str]]:
    """The alternatives of a type, the words of its Literals, the limits inside its Annotated parts."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return [str], [str(arg) for arg in args], []
    if origin is typing.Annotated:
        inner = _flatten(args[0])
        return inner[0], inner[1], inner[2] + [word for item in args[1:] for word in _limit(item)]
    if origin is tuple and typing.get_origin(args[0]) is Literal:
        return [annotation], [str(arg) for arg in typing.get_args(args[0])], []
    if origin not in (typing.Union, types.UnionType):
        return [annotation], [], []
    parts = [_flatten(arg) for arg in args]
    return [t for p in parts for t in p[0]], [c for p in parts for c in p[1]], [w for p in parts for w in p[2]]


def _limit(item: Any) -> list[str]:
    inner = getattr(item, "metadata", ())
    words = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"), ("multiple_of", "a multiple of"))
    found = [f"{word} {getattr(item, key)}" for key, word in words if getattr(item, key, None) is not None]
    return found + [word for part in inner for word in _limit(part)]


def _kind(types_: list[Any], choices: list[str], is_list: bool) -> str:
    if choices:
        return f"one or more of {', '.join(choices)}" if is_list else f"one of {', '.join(choices)}"
    if is_list:
        return "one or more words"
    for known, name in ((bool, "true or false"), (float, "a number"), (int, "a whole number"), (Path, "a path")):
        if known in types_:
            return name
    return "a word"


def _shown(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=False)
    if default is None or default is PydanticUndefined:
        return "none"
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, float):
        return f"{default:g}"
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


@dataclass(frozen=True)
class Run:
    """A valid configuration, ready to train."""

    config: RunConfig
    strategy: type[Strategy]
    options: StrategyConfig
    """The strategy's own options: `strategy(options)` builds it."""
    distribution: str
    """Name and version of the package that the strategy comes from."""
    notes: tuple[str, ...] = ()
    """What was understood though not written exactly so; one sentence each, to print at start-up."""

    @property
    def rates(self) -> dict[Part, float]:
        """Peak rate of every part that trains (llm, vit, projector): given, or the strategy's default."""
        given = {part: getattr(self.config, f"learning_rate_{part}") for part in RATE_PARTS}
        defaults = self.options.rates()
        return {part: float(given[part] or defaults[part]) for part in RATE_PARTS if part in defaults}


def resolved(run: Run) -> dict[str, Any]:
    """Everything that the run uses, flat, in plain YAML types: what run.yaml holds.

    Paths are absolute, so that the file means the same from another folder. `null` stands for what is decided by the
    device or the data. `resume_from_checkpoint` is null: a repeat starts at the beginning.
    """
    values = run.config.model_dump(mode="json")
    values |= {f"learning_rate_{part}": rate for part, rate in run.rates.items()}
    values["resume_from_checkpoint"] = None
    # The default folder belongs to the machine, not to the run.
    values["cache_dir"] = None if run.config.cache_dir == default_cache_dir() else values["cache_dir"]
    for name in ("output_dir", "dataset_config_path", "cache_dir"):
        values[name] = str(Path(values[name]).absolute()) if values[name] is not None else None
    for name in ("model_name_or_path", "deepspeed"):
        values[name] = _absolute(values[name])
    # The name of a policy stays one, though a folder here be called "document".
    policy = values["augmentation"]
    values["augmentation"] = _absolute(policy) if policy and {".", os.sep} & {*policy} else policy
    values["eval_dataset_scripts"] = {
        dataset: [_absolute(script) for script in scripts]
        for dataset, scripts in run.config.eval_dataset_scripts.items()
    } or None
    return {"schema": SCHEMA, **values, **run.options.model_dump(mode="json")}


def resolved_yaml(run: Run) -> str:
    """run.yaml: `vlft --config run.yaml --output_dir NEW` repeats the run."""
    text: str = yaml.safe_dump(resolved(run), sort_keys=False, allow_unicode=True, width=1000)
    return text


def _absolute(name: str | None) -> str | None:
    """Names stay names; what exists here as a file or folder becomes an absolute path."""
    return str(Path(name).expanduser().absolute()) if name and Path(name).expanduser().exists() else name


def global_batch(config: RunConfig, world_size: int) -> int:
    """G: samples of one optimizer step over all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size


def accumulation_for(config: RunConfig, world_size: int, stored_global_batch: int) -> int:
    """Accumulation steps that reach the stored global batch on this many processes (the last may be partly empty)."""
    return max(1, -(-stored_global_batch // (config.per_device_train_batch_size * world_size)))


def check_resume(
    old: Mapping[str, Any], run: Run, *, stored_global_batch: int, world_size: int, precision: tuple[str, str]
) -> None:
    """Refuse a resume that would silently become another run.

    Args:
        old: run.yaml of the run that wrote the checkpoint, as a dict.
        run: the run that wants to go on.
        stored_global_batch: G of the checkpoint. It stays: batch size and accumulation may be left out (then
            `accumulation_for` finds the accumulation on this many processes) or repeated; a change must multiply to G.
        world_size: processes now.
        precision: mixed precision that was used, and that will be; the option may be left to the device.
    Raises:
        CheckpointError: every option that differs and may not, with both values.
    """
    new = resolved(run)
    old, new["mixed_precision"] = {**old, "mixed_precision": precision[0]}, precision[1]
    options = {**options_of(RunConfig), **options_of(type(run.options))}
    fixed = [name for name in new if name in options and options[name].resume == "no"]
    problems = [
        f"--{name} was {old[name]!r} and is now {new[name]!r}; go on with the old value, or start a new --output_dir."
        for name in fixed
        if name in old and _plain(old[name]) != _plain(new[name])
    ]
    problems += _batch_problems(old, run.config, stored_global_batch, world_size)
    if problems:
        raise CheckpointError("\n".join(problems))


def _batch_problems(old: Mapping[str, Any], config: RunConfig, stored: int, world_size: int) -> list[str]:
    """Only a changed option can contradict G: the same words on another number of processes mean the same run."""
    size, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    changed = [n for n in names if n in config.model_fields_set and getattr(config, n) != old.get(n)]
    free = "gradient_accumulation_steps" not in config.model_fields_set
    if not changed or (stored % (size * world_size) == 0 if free else size * steps * world_size == stored):
        return []
    given = f"--{names[0]} {size}" + ("" if free else f" and --{names[1]} {steps}")
    return [
        f"{given} on {world_size} process(es) do not make the checkpoint's global batch of {stored}, which stays; "
        f"give --{names[0]} {old.get(names[0])} and --{names[1]} {old.get(names[1])} as before: "
        "the accumulation is chosen to fit the processes."
    ]


def _plain(value: Any) -> Any:
    """Tuples and lists, 1 and 1.0 are the same option."""
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def is_main_process() -> bool:
    """True in the one process of a run, or in rank 0 of a launcher's."""
    return os.environ.get("RANK", "0") == "0"


def check_output_dir(config: RunConfig) -> None:
    """Refuse an `output_dir` that holds something, unless the run is resumed. Call it on the main process only.

    Another process may look when the main one has begun to write there.

    Raises:
        ConfigError: the folder is not empty, or is a file.
    """
    if problem := output_dir_problem(config.output_dir, config.resume_from_checkpoint):
        raise ConfigError(problem)


def output_dir_problem(folder: Path, resume: str | None) -> str:
    """The sentence for `check_output_dir`, empty when all is well. Hidden files do not count."""
    if folder.exists() and not folder.is_dir():
        return f"--output_dir {folder} is a file; choose another name."
    if found := no_folder(folder, writable=True):
        return f"--output_dir {folder} cannot be made: {found}; choose another."
    if not folder.is_dir() or all(entry.name.startswith(".") for entry in folder.iterdir()):
        return ""
    if resume == "latest" and (folder / "model").is_dir() and not any(folder.glob("checkpoints/step-*/state.json")):
        return (
            f"--output_dir {folder} holds a result (model/) and no checkpoint to go on from: a fresh start would "
            "replace it; give a new folder, or move model/ away."
        )
    if resume and (resume != "latest" or _is_run_folder(folder)):
        return ""
    if resume:
        return f"--output_dir {folder} holds something that is no run of vlft; give a new folder, or that of the run."
    return (
        f"--output_dir {folder} is not empty; give --resume_from_checkpoint latest to go on with it, or a new folder."
    )


def evaluation_files(folder: Path) -> set[str]:
    """Names of the files in `folder` that an earlier `vlft eval` wrote, as its metrics.json says."""
    try:
        facts = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        answers = {f"{dataset}.jsonl" for dataset in facts["options"]["eval_dataset_scripts"]}
        here = {entry.name for entry in folder.iterdir() if entry.is_file()}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return here & {"metrics.json", "ledger.json", *answers}


def _is_run_folder(folder: Path) -> bool:
    """Whether `latest` may start fresh in it: a queue restarts a job that ended before its first checkpoint."""
    found = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    return "run_card.json" in found or found <= {"base"}  # what a run writes first


def no_folder(folder: Path, *, writable: bool = False) -> str:
    """Why nothing can be put into `folder`, which need not exist yet; empty when all is well."""
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir():
        return f"{there} is no folder"
    return f"{there} may not be written to" if writable and not os.access(there, os.W_OK | os.X_OK) else ""


def bundled(kind: Literal["ds_configs", "accelerate_configs"], suffix: str) -> dict[str, Path]:
    """Configurations that ship with vlft, by stem: inside the package (a wheel) or beside it (a checkout)."""
    here = Path(__file__).resolve().parent
    folder = next((parent / kind for parent in (here, here.parent) if (parent / kind).is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))} if folder else {}


def deepspeed_path(value: str) -> Path:
    """The file that `--deepspeed` means: a path, or a bundled name.

    A path that is absent but whose stem is a bundled name (`./configs/zero2.json` of older guides) means that one.

    Raises:
        ConfigError: neither; the bundled names are listed.
    """
    path = Path(value).expanduser()
    if path.is_file():
        return path
    shipped = bundled("ds_configs", ".json")
    if path.stem in shipped:
        return shipped[path.stem]
    hint, names = nearest(path.stem, shipped), ", ".join(shipped) or "none"
    raise ConfigError(f"--deepspeed {value}: there is no such file{hint}; give a path or a bundled name ({names}).")


MemoryPlan = dict[Literal["vision", "language"], dict[Literal["attention", "attended", "input"], NonNegativeInt]]


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MG](?:i?B)?)", re.IGNORECASE)
_UNITS = {"mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9, "m": 10**6, "g": 10**9}


def memory_plan(value: str) -> str | int | MemoryPlan:
    """What `--memory` means: "auto", "all", "low" (inputs alone), bytes (as "auto", on a GPU of which a process has so
    many), or the numbers of layers in a file. GiB and MiB are powers of 2, GB, G, MB and M powers of 10.

    Raises:
        ConfigError: none of these, or the file holds something else.
    """
    if value in ("auto", "all", "low"):
        return value
    if size := _SIZE.fullmatch(value.strip()):
        number, unit = size.groups()
        if found := int(float(number) * _UNITS[unit.lower()]):
            return found
    path = Path(value).expanduser()
    if not path.is_file():
        hint = nearest(value, ("auto", "all", "low"))
        raise ConfigError(
            f"--memory {value} is no word of it, no size and no file{hint}; give auto, all, low, a size such as 40GiB "
            "or 24GB, or the path of a YAML file."
        )
    try:
        return TypeAdapter(MemoryPlan).validate_python(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--memory {path} is no such plan ({str(error).splitlines()[0]}); write e.g. vision: "
            "{attention: 20, input: 12}."
        ) from error
