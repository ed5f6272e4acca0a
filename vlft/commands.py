"""What stands beside training: the small commands, their options, and how their words are read.

To add one: a class of its options, a function that runs it (which imports what is slow), and a row in `COMMANDS`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vlft import discovery
from vlft.augmentation.policy import problem_of as policy_problem
from vlft.config import CommandOptions as Options
from vlft.config import (
    DoctorOptions,
    EvalOptions,
    Option,
    PlanOptions,
    Run,
    default_cache_dir,
    options_of,
    output_dir_problem,
    parse_scripts,
)
from vlft.errors import ConfigError
from vlft.parse import read_training
from vlft.rivals import nearest
from vlft.words import Flags, Given, build, plain_name, read_flags, read_yaml, sibling, split_words


@dataclass(frozen=True)
class Command:
    name: str
    summary: str
    """One line for `vlft --help`."""
    options: type[Options]
    run: Callable[[Any], None]
    first: tuple[str, ...] = ()
    """Options that are given as plain words, in this order; a list takes all that are left."""
    complete: Callable[[dict[str, Given]], dict[str, Given]] = dict
    """Adds what is not given but known, and refuses with a ConfigError what cannot be."""
    read: Callable[[Sequence[str]], Any] | None = None
    """Reads the words in its own way, in place of `parse_command`."""
    brief: bool = False
    """Most of its time goes into libraries' imports, and when it has printed, no thread, process or file is left."""

    @property
    def usage(self) -> str:
        known = options_of(self.options)
        words = [name.upper() + (" ..." if known[name].is_list else "") for name in self.first]
        words = [w if known[n].required else f"[{w}]" for n, w in zip(self.first, words, strict=True)]
        needed = [f"--{o.name} {o.name.upper()}" for o in known.values() if o.required and o.name not in self.first]
        optional = [] if all(o.required for o in known.values()) else ["[options]"]
        return " ".join(["vlft", self.name, *words, *needed, *optional])


def parse_command(command: Command, words: Sequence[str]) -> Any:
    """The options of a command, in the manner of `vlft.parse.parse`.

    Raises:
        ConfigError: every problem at once.
    """
    if command.read is not None:
        return command.read(words)
    stray, flags = split_words(words)
    problems: list[str] = []
    known = options_of(command.options)
    given, broken = read_flags(_joined(flags, known), known, problems)
    _take_plain(command, known, stray, given, problems)
    for name in command.first:
        if known[name].required and name not in given and name not in broken:
            broken.add(name)
            problems.append(f"{name.upper()} is missing; give {known[name].values} ({known[name].text.rstrip('.')}).")
    problems += [
        f"{one.place} is not an option of {command.name}{nearest(name, known)}; see 'vlft {command.name} --help'."
        for name, one in given.items()
        if name not in known and name not in broken
    ]
    given = command.complete({name: one for name, one in given.items() if one.value is not None})
    config, failed = build(command.options, given, problems, broken, missing=True)
    if config:
        problems += config.problems(failed)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _joined(flags: Flags, known: dict[str, Option]) -> Flags:
    """A list may be given word by word: `--image a.png --image b.png`."""
    joined: dict[str, tuple[str, list[str]]] = {}
    rest: Flags = []
    for flag, words in flags:
        name = plain_name(flag)
        if name in known and known[name].is_list and words:
            joined[name] = (flag, [*joined.get(name, (flag, []))[1], *words])
        else:
            rest.append((flag, words))
    return [*rest, *joined.values()]


def _take_plain(
    command: Command, known: dict[str, Option], stray: list[str], given: dict[str, Given], problems: list[str]
) -> None:
    left = list(stray)
    for name in command.first:
        if left and known[name].is_list:
            given[name], left = Given(left, name.upper(), flag=True), []
        elif left:
            given[name] = Given(left.pop(0), name.upper(), flag=True)
    takes = " and ".join(name.upper() for name in command.first) or "no words without a --name"
    problems += [f"'{word}' is one word too many; {command.name} takes {takes}." for word in left]


def resolve_model(path: str | Path, place: str) -> tuple[str, list[str]]:
    """The folder or hub name that MODEL means, and what is wrong with it: a run's folder means its result.

    Args:
        place: what the sentences begin with: `MODEL`, or a flag.
    """
    name = str(path)
    folder = Path(name).expanduser()
    run = next((one for one in (folder, folder.parent) if (one / "run.yaml").is_file()), None)
    if run and folder in (run, run / "model"):
        found = [] if (run / "model").is_dir() else [_no_result(run, place)]
        return str(run / "model"), found
    if folder.is_dir():
        return str(folder), []
    if _HUB_NAME.fullmatch(name) and not folder.exists() and name[0] not in "./~":
        return name, []
    where = f"{place} {name}: there is no such folder{sibling(folder, folder=True)}"
    return name, [f"{where}; give a run folder, a model folder or a hub name."]


def _no_result(run: Path, place: str) -> str:
    checkpoint = f"vlft export {shlex.quote(str(run))} --checkpoint latest --output_dir DIR"
    return f"{place} {run} has no result yet; give its command --resume_from_checkpoint latest, or use '{checkpoint}'."


# ---------------------------------------------------------------------------------------------------------------------
# The commands


class PluginsOptions(Options):
    """`vlft plugins` takes none."""


def _plugins(_: PluginsOptions) -> None:
    print(plugins_table())


def plugins_table() -> str:
    """`vlft plugins`: group, name, state, distribution, and what it is or what is wrong with it."""
    rows = [("kind", "name", "state", "distribution", "")]
    rows += [
        (one.group.removeprefix("vlft."), one.found.name, one.state, one.found.source, one.detail)
        for one in discovery.inspect()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows)


class ReportOptions(Options):
    runs: tuple[Path, ...] = Field(description="Folders of runs: one, or several to compare.")
    output: Path | None = Field(
        None,
        description="The page's file.",
        json_schema_extra={"shown": "report.html in the run's folder; comparison.html here for several"},
    )

    def problems(self, failed: set[str]) -> list[str]:
        return [
            f"RUNS {run}: there is no such folder{sibling(run, folder=True)}; give the output_dir of a run."
            for run in self.runs
            if not run.is_dir() and "runs" not in failed
        ]


def _report(options: ReportOptions) -> None:
    from vlft import report

    runs = options.runs
    output = options.output or (runs[0] / report.NAME if len(runs) == 1 else Path("comparison.html"))
    print(report.compare(runs, output))


class MergeOptions(Options):
    model: Path = Field(description="Run folder, or its result: output_dir/model.")
    output_dir: Path = Field(description="Folder for the merged model; must be empty.")
    base: Literal["trained", "original"] = Field(
        "trained",
        description="Weights to merge onto: those trained with (a 4-bit base: dequantised), or the original ones.",
    )

    def problems(self, failed: set[str]) -> list[str]:
        model, found = resolve_model(self.model, "MODEL") if "model" not in failed else ("", [])
        if not found and model and not Path(model).is_dir():
            hint = sibling(self.model, folder=True)
            found = [f"MODEL {model}: there is no such folder{hint}; give a run, or its result."]
        if "output_dir" not in failed and output_dir_problem(self.output_dir, None):
            found.append(f"--output_dir {self.output_dir} is not an empty folder; give a new one.")
        return found


def _merge(options: MergeOptions) -> None:
    from vlft import export

    print(export.merge(Path(resolve_model(options.model, "MODEL")[0]), options.output_dir, options.base))


class ExportOptions(Options):
    model: str = Field(description="Run folder, result (adapter or whole model), Hugging Face folder or hub name.")
    output_dir: Path = Field(description="Folder for the whole model; must be empty.")
    format: str = Field("hf", description="Layout of the files: hf (safetensors, for transformers and vLLM).")
    checkpoint: str | None = Field(
        None,
        description="Of a run folder: best, latest or a name such as step-000200.",
        json_schema_extra={"shown": "the run's result"},
    )
    base: Literal["trained", "original"] = Field(
        "trained",
        description="Weights to merge adapters onto: those trained with (a 4-bit base: dequantised), or the original.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Of the written weights.", json_schema_extra={"shown": "as they are"}
    )
    max_shard_size: str = Field("5GB", pattern=r"^\d+([KMG]i?B)$", description="Largest file of weights: 200MB, 5GB.")
    push_to_hub: str | None = Field(None, description="Also upload to this repository of the hub: OWNER/NAME.")
    private: bool = Field(False, description="The new repository is private.")

    def problems(self, failed: set[str]) -> list[str]:
        found = [f"--format {self.format}: {_FORMATS.get(self.format, _NO_FORMAT)}"] if self.format != "hf" else []
        run = (Path(self.model).expanduser() / "run.yaml").is_file()
        if "model" not in failed and not (self.checkpoint and run):
            found += resolve_model(self.model, "MODEL")[1]
        if self.checkpoint and "model" not in failed and not run:
            found.append(
                f"--checkpoint {self.checkpoint}: {self.model} is no run folder (no run.yaml); give the run's."
            )
        if "output_dir" not in failed and output_dir_problem(self.output_dir, None):
            again = ""
            if self.push_to_hub and (self.output_dir / "config.json").is_file():
                words = ["hf", "upload", self.push_to_hub, str(self.output_dir), *(["--private"] * self.private)]
                again = f", or upload what is there: '{shlex.join(words)}'"
            found.append(f"--output_dir {self.output_dir} is not an empty folder; give a new one{again}.")
        if self.push_to_hub is not None and not _HUB_NAME.fullmatch(self.push_to_hub):
            found.append(f"--push_to_hub {self.push_to_hub} is no repository's name; give OWNER/NAME.")
        return found


_NO_FORMAT = "vlft writes hf only; leave it out."
_FORMATS = {
    "gguf": (
        "vlft does not write GGUF; export hf, then run llama.cpp's convert_hf_to_gguf.py on that folder twice, once as "
        "it is (the language model) and once with --mmproj (the vision tower)."
    )
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def _export(options: ExportOptions) -> None:
    from vlft import handover

    given = options.model_dump(exclude={"model", "output_dir", "format"})
    model = str(Path(options.model).expanduser()) if options.checkpoint else resolve_model(options.model, "MODEL")[0]
    print(handover.export_model(model, options.output_dir, **given))


class VerifyOptions(Options):
    model: str = Field(description="Result to check: run folder, adapter or whole model, a folder or a hub name.")
    against: Path = Field(description="The run that it came from: its output_dir.")
    samples: int = Field(8, ge=1, description="Held-out samples to compare on (training samples if none is held out).")
    max_new_tokens: int = Field(32, ge=1, description="Tokens of each greedy answer.")

    def problems(self, failed: set[str]) -> list[str]:
        found = resolve_model(self.model, "MODEL")[1] if "model" not in failed else []
        if "against" not in failed and not (self.against / "run.yaml").is_file():
            found.append(f"--against {self.against} is no run folder (no run.yaml); give the run's output_dir.")
        return found


def _verify(options: VerifyOptions) -> None:
    from vlft.verify import verify

    print(verify(resolve_model(options.model, "MODEL")[0], options.against, options.samples, options.max_new_tokens))


class ChatOptions(Options):
    model: str = Field(description="Run folder, result (adapter or whole model), Hugging Face folder or hub name.")
    question: str | None = Field(
        None, description="What to ask; without it, questions are read from the terminal, one a line."
    )
    image: tuple[Path, ...] = Field((), description="Pictures that are shown with the first question; may be repeated.")
    max_new_tokens: int = Field(512, ge=1, description="Most tokens of an answer.")
    system: str | None = Field(None, description="Text of a system turn.")
    temperature: float = Field(
        0.0,
        ge=0,
        description="0: the most likely token each time; above: sampled from all tokens. As in evaluation, the model's "
        "own top_k, top_p and repetition_penalty do not count.",
    )

    def problems(self, failed: set[str]) -> list[str]:
        found = resolve_model(self.model, "MODEL")[1] if "model" not in failed else []
        for path in self.image:
            if not path.is_file():
                swallowed = "; put QUESTION before --image" if " " in str(path) and self.question is None else ""
                found.append(f"--image {path}: there is no such file{sibling(path)}{swallowed or '; check the path'}.")
        return found


def _chat(options: ChatOptions) -> None:
    from vlft.chat import chat

    given = options.model_dump(exclude={"model", "question", "image"})
    chat(resolve_model(options.model, "MODEL")[0], options.question, options.image, **given)


_PICTURES = frozenset("avif bmp gif heic heif jpeg jpg png tif tiff webp".split())


def complete_chat(given: dict[str, Given]) -> dict[str, Given]:
    """`vlft chat MODEL --image a.png QUESTION`: the last word after --image that is no picture is the question."""
    image = given.get("image")
    if "question" in given or image is None or not isinstance(image.value, list) or len(image.value) < 2:
        return given
    *pictures, last = map(str, image.value)
    if Path(last).expanduser().exists() or Path(last).suffix.lower().removeprefix(".") in _PICTURES:
        return given
    return {**given, "image": replace(image, value=pictures), "question": Given(last, "QUESTION", flag=True)}


class EvalCommandOptions(EvalOptions):
    def problems(self, failed: set[str]) -> list[str]:
        return (resolve_model(self.model, "MODEL")[1] if "model" not in failed else []) + super().problems(failed)


def complete_eval(given: dict[str, Given]) -> dict[str, Given]:
    """Of a run's model: its folder, the options of run.yaml that are not given, a place for the answers."""
    if "model" not in given:
        return given
    model = Path(str(given["model"].value)).expanduser()
    run = next((folder for folder in (model, model.absolute().parent) if (folder / "run.yaml").is_file()), None)
    config = Path(str(given["config"].value)).expanduser() if "config" in given else run and run / "run.yaml"
    found: dict[str, Given] = {}
    if run:
        place = "model" if run == model else model.absolute().name
        found["output_dir"] = Given(run / "eval" / place, "output_dir", flag=False)
    if config:
        known = options_of(EvalOptions).keys() - {"output_dir", "model", "config"}
        values = {name: value for name, value in read_yaml(config).items() if name in known and value is not None}
        if "config" not in given:
            _refuse_code_of(config, values.keys() - given.keys(), values)
        found |= {name: Given(value, f"{config.name}: {name}", flag=False) for name, value in values.items()}
    found |= given
    if run == model:
        found["model"] = Given(str(model / "model"), given["model"].place, flag=True)
    return found


def _refuse_code_of(config: Path, taken: Set[str], values: Mapping[str, Any]) -> None:
    """A folder that is evaluated brings options along, and somebody else's must not run code or ask the network.

    Raises:
        ConfigError: they would; whoever wrote the file may name it.
    """
    asks = [f"{name} true" for name in ("trust_remote_code", "allow_remote_images") if name in taken and values[name]]
    if "eval_dataset_scripts" in taken:
        with suppress(ValueError):  # told where all options are read
            scripts = chain.from_iterable(parse_scripts(values["eval_dataset_scripts"]).values())
            asks += sorted({script for script in scripts if script.endswith(".py")})
    if asks:
        raise ConfigError(
            f"{config} asks for {', '.join(asks)}, which runs code or asks the network; if you trust whoever wrote it, "
            f"give --config {config}."
        )


def _eval(options: EvalOptions) -> None:
    from vlft import eval_model

    eval_model.main(options)


def read_doctor(words: Sequence[str]) -> DoctorOptions:
    """The words of a training, read as training reads them, and the doctor's own."""
    read = read_training(words, DoctorOptions)
    for note in read.notes:
        print(note)
    return read.config


def _doctor(options: DoctorOptions) -> None:
    from vlft.doctor.examine import main

    main(options)


@dataclass(frozen=True)
class _PlanWords:
    """A training, its own words, and the options of `vlft plan` among them."""

    options: PlanOptions
    run: Run
    words: tuple[str, ...]


def read_plan(words: Sequence[str]) -> _PlanWords:
    read = read_training(words, PlanOptions)
    if read.strategy is None or read.options is None or read.found is None:
        raise ConfigError("--tuning_strategy is missing; 'vlft plugins' lists those there are.")
    for note in read.notes:
        print(note)
    from vlft.planning.imports import import_libraries

    import_libraries()
    from vlft.planning.advice import with_flags

    own = with_flags(words, dict.fromkeys(("gpu", "gpus", "goal")))
    return _PlanWords(read.config, Run(read.config, read.strategy, read.options, read.found.source, ()), tuple(own))


def _plan(found: _PlanWords) -> None:
    from vlft.planning.command import main

    main(found.options, found.run, found.words, lambda words: read_plan(words).run)


class PreviewOptions(Options):
    model: str = Field(description="Base model of the training: folder or hub name; its tokenizer and picture sizes.")
    augmentation: str = Field(description="Policy: photometric, geometric, document, or a YAML file of Kornia's ops.")
    dataset_config_path: Path = Field(
        Path("configs/dataset_config.json"), description="Registry of datasets, a JSON file."
    )
    dataset_names: tuple[str, ...] | None = Field(
        None, description="Datasets of the registry to use.", json_schema_extra={"shown": "all"}
    )
    output: Path = Field(Path("augmentation.png"), description="The sheet, a PNG or JPEG file.")
    samples: int = Field(6, ge=1, le=50, description="Samples to show: those that training takes first.")
    epochs: int = Field(4, ge=1, le=20, description="Epochs to show each of them in.")
    seed: int = Field(42, ge=0, lt=2**32, description="Of the training.")
    train_split_ratio: float = Field(0.9, gt=0, le=1, description="Share of each dataset that trains, as in training.")
    max_pixels: int = Field(1003520, ge=784, description="Largest size of a picture, in pixels (width x height).")
    max_seq_length: int = Field(2048, gt=0, description="Longest sample, in tokens, pictures included.")
    cache_dir: Path = Field(
        default_factory=default_cache_dir,
        description="Folder of the data index.",
        json_schema_extra={"shown": "$VLFT_CACHE, or ~/.cache/vlft"},
    )

    def problems(self, failed: set[str]) -> list[str]:
        found = resolve_model(self.model, "MODEL")[1] if "model" not in failed else []
        if "augmentation" not in failed and (wrong := policy_problem(self.augmentation)):
            found.append(f"--augmentation {self.augmentation}: {wrong}")
        registry = self.dataset_config_path
        if "dataset_config_path" not in failed and not registry.is_file():
            found.append(
                f"--dataset_config_path {registry}: there is no such file{sibling(registry)}; give the registry."
            )
        if "output" not in failed and self.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            found.append(f"--output {self.output} is no picture's name; give one that ends in .png or .jpg.")
        return found


def _preview(options: PreviewOptions) -> None:
    from vlft.preview import preview

    given = options.model_dump(exclude={"model", "dataset_config_path", "output"})
    print(preview(resolve_model(options.model, "MODEL")[0], options.dataset_config_path, options.output, **given))


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "doctor",
            "before a training, with its options: machine, model and data; exit code 0 is go",
            DoctorOptions,
            _doctor,
            read=read_doctor,
        ),
        Command(
            "plan",
            "memory and time of a training, with its options, before it runs; what to change if it does not fit",
            PlanOptions,
            _plan,
            read=read_plan,
            brief=True,
        ),
        Command(
            "eval", "loss and metrics of a model on held-out data", EvalCommandOptions, _eval, ("model",), complete_eval
        ),
        Command(
            "report",
            "a run's curves, answers and data on one page; or runs side by side",
            ReportOptions,
            _report,
            ("runs",),
        ),
        Command("merge", "adapters into a whole model", MergeOptions, _merge, ("model",)),
        Command("export", "a whole model ready to serve, here or on the hub", ExportOptions, _export, ("model",)),
        Command("verify", "does a result say what its run trained?", VerifyOptions, _verify, ("model",)),
        Command("chat", "ask a model about pictures", ChatOptions, _chat, ("model", "question"), complete_chat),
        Command(
            "augment-preview", "training pictures as augmentation shows them", PreviewOptions, _preview, ("model",)
        ),
        Command("plugins", "strategies and metrics, and whether they work", PluginsOptions, _plugins),
    )
}
