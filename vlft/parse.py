"""Words -> a valid `Run`, or every problem at once.

Two sources: the file of `--config`, then flags. Two phases: core options are known at once, the options of the strategy
after its plugin was found. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from vlft import discovery
from vlft.augmentation.policy import problem_of as policy_problem
from vlft.config import (
    ANSWERS,
    RATE_PARTS,
    Option,
    Run,
    RunConfig,
    deepspeed_path,
    is_main_process,
    no_folder,
    options_of,
    output_dir_problem,
)
from vlft.errors import ConfigError, StrategyError
from vlft.family import PARTS, Part
from vlft.rivals import ENVIRONMENT, RIVALS, nearest
from vlft.strategy import Strategy, StrategyConfig
from vlft.words import Flags, Given, build, plain_name, read_file, read_flags, sibling, split_words, without_local_rank

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def _merge(file: dict[str, Given], flags: dict[str, Given]) -> dict[str, Given]:
    """Flags over file. Where two options depend on each other, the flag decides for both: a run.yaml holds them all."""
    merged = {name: given for name, given in (file | flags).items() if given.value is not None}
    if _is_off(flags.get("use_data_augmentation")) and "augmentation" not in flags:
        merged.pop("augmentation", None)
    if not _names_its_runs(merged) and {"use_wandb", "report_to"} & {*flags}:
        for name in ("wandb_project", "wandb_run_name"):
            if name not in flags:
                merged.pop(name, None)
    if "eval_dataset_scripts" not in merged:  # a file may be of a time in which nobody minded
        for name in ANSWERS:
            if name not in flags:
                merged.pop(name, None)
    for flag, depending in (
        ("augmentation", "use_data_augmentation"), ("epochs", "max_steps"), ("metric_for_best", "greater_is_better"),
    ):  # fmt: skip
        if flag in flags and depending not in flags:
            merged.pop(depending, None)
    return merged


def _is_off(given: Given | None) -> bool:
    return given is not None and str(given.value).lower() in ("false", "0", "no", "off")


def _names_its_runs(given: Mapping[str, Given]) -> bool:
    """Whether one of the trackers that are asked for takes the name of a project and of a run."""
    trackers = given["report_to"].value if "report_to" in given else ()
    listed = {trackers} if isinstance(trackers, str) else {*map(str, trackers)}
    return bool(listed & {"wandb", "trackio"}) or ("use_wandb" in given and not _is_off(given["use_wandb"]))


def parse(argv: Sequence[str], *, start: bool = True) -> Run:
    """The run that these words describe.

    Args:
        argv: words after `vlft` or `vlft train`.
        start: also check what is on the disk (files exist, `output_dir` is free). False to read a configuration only.
    Raises:
        ConfigError: every problem at once, one sentence each.
        StrategyError: the strategy's plugin is broken or claimed twice.
    """
    read = read_training(argv, RunConfig, start=start)
    if read.strategy is None or read.options is None or read.found is None:
        raise ConfigError("--tuning_strategy is missing; 'vlft plugins' lists those there are.")
    return Run(read.config, read.strategy, read.options, read.found.source, read.notes)


@dataclass(frozen=True)
class Read(Generic[ConfigT]):
    """The words of a training, for whoever takes them: training itself, or a command that looks at one."""

    config: ConfigT
    strategy: type[Strategy] | None
    """None where none was named, and `config` can do without."""
    options: StrategyConfig | None
    found: discovery.Found | None
    notes: tuple[str, ...]


def read_training(argv: Sequence[str], model: type[ConfigT], *, start: bool = True) -> Read[ConfigT]:
    """`parse` for any kind of RunConfig.

    Raises:
        ConfigError, StrategyError: as `parse`.
    """
    problems: list[str] = []
    notes = _environment_notes()
    stray, words = split_words(without_local_rank(argv))
    problems += [f"'{word}' stands before the first option; options are written --name value." for word in stray]
    file, words, readable = read_file(words, problems)
    name = strategy_name(words, file)
    strategy, found = find_strategy(name, problems)
    own = options_of(strategy.Config, "strategy") if strategy else _every_strategy_option()
    known = options_of(model) | own
    flags, broken = read_flags(words, known, problems)
    unknown = {key: one for key, one in (file | flags).items() if key not in known and key not in broken}
    problems += _unknown(unknown, known, name)
    given = _merge(file, flags)

    problems += _moved(given, flags, words_of=argv)
    # A file that could not be read may hold what is missing.
    config, failed = build(model, given, problems, broken, missing=readable)
    options: StrategyConfig | None = None
    if strategy and found:
        where = f"--tuning_strategy {name}: "
        options, _ = build(strategy.Config, given, problems, broken, missing=readable, where=where)
        if config and options:
            config = _check_rates(config, options, given, found, problems, notes)
    if config and start:
        config = _check_disk(config, given, failed, problems, notes)
    if problems or config is None:
        raise ConfigError(problems)
    return Read(config, strategy, options, found, tuple(notes))


def _moved(given: Mapping[str, Given], flags: Mapping[str, Given], *, words_of: Sequence[str]) -> list[str]:
    """A run.yaml names its folder; from a copy or another place a resume would begin anew, or go on there, unasked."""
    config = next((words[0] for flag, words in split_words(words_of)[1] if flag == "--config" and words), None)
    if config is None or "resume_from_checkpoint" not in given or "output_dir" in flags or "output_dir" not in given:
        return []
    here, there = Path(config).expanduser().absolute().parent, Path(str(given["output_dir"].value)).expanduser()
    if not (here / "run_card.json").is_file() or here.resolve() == there.resolve():
        return []
    return [
        f"{config} is of a run whose folder was {there}, and lies in {here}; give --output_dir with the one you mean."
    ]


def _environment_notes() -> list[str]:
    present = [name for name in ENVIRONMENT if name in os.environ]
    advice = {name: RIVALS.get(name.lower(), f"use --{name.lower()}") for name in present}
    return [f"The environment's {name} is not read; {advice[name]}." for name in present]


def load_run(path: str | Path, overrides: Sequence[str] = (), *, start: bool = False) -> Run:
    """The run that a run.yaml describes, flags over it. Reads only: nothing on the disk is checked unless `start`."""
    return parse(["--config", str(path), *overrides], start=start)


def strategy_name(words: Flags, file: Mapping[str, Given]) -> str:
    for flag, values in words:
        if plain_name(flag) == "tuning_strategy" and values:
            return values[0]
    return str(file["tuning_strategy"].value or "") if "tuning_strategy" in file else ""


def find_strategy(name: str, problems: list[str]) -> tuple[type[Strategy] | None, discovery.Found | None]:
    """An unknown name is one problem among others; a plugin that is there and broken ends here."""
    strategies = discovery.find(discovery.STRATEGIES)
    if not name:
        return None, None
    if name not in strategies:
        rival = RIVALS.get(name.lower().replace("-", "_"), "")
        advice = f"{rival}; installed" if rival.startswith("give --tuning_strategy") else "installed"
        hint = nearest(name, strategies)
        problems.append(f"--tuning_strategy '{name}' is unknown{hint}; {advice}: {', '.join(strategies)}.")
        return None, None
    return discovery.load_strategy(name)


def _other_strategies() -> dict[str, type[Strategy]]:
    """Every strategy that can be imported. Only asked for when something is wrong already."""
    loaded: dict[str, type[Strategy]] = {}
    for name in discovery.find(discovery.STRATEGIES):
        try:
            loaded[name] = discovery.load_strategy(name)[0]
        except StrategyError:
            continue
    return loaded


def _every_strategy_option() -> dict[str, Option]:
    """Without a strategy, an option that some strategy has is no problem of its own."""
    return {
        name: one for cls in _other_strategies().values() for name, one in options_of(cls.Config, "strategy").items()
    }


def _unnested(given: Mapping[str, Given], known: Mapping[str, Option]) -> dict[str, str]:
    """Names and places; the sections of another project's YAML (`processor: {max_pixels: 1}`) by what is in them."""
    places: dict[str, str] = {}
    for name, one in given.items():
        inner = {str(key): f"{name}.{key}" for key in one.value} if isinstance(one.value, dict) else {}
        if any(path.lower() in RIVALS or key in known for key, path in inner.items()):
            places |= {path: f"{one.place}.{key}" for key, path in inner.items()}
        else:
            places[name] = one.place
    return places


def _unknown(given: Mapping[str, Given], known: Mapping[str, Option], strategy: str) -> list[str]:
    """One sentence for each name that is not an option here."""
    others = {other: cls.Config.model_fields for other, cls in _other_strategies().items()} if given else {}
    problems = []
    for name, place in _unnested(given, known).items():
        lower, positive = name.lower(), name.lower().removeprefix("no_")
        owners = ", ".join(other for other, fields in others.items() if name.removeprefix("no_") in fields)
        if (option := known.get(name.removeprefix("no_"))) and name.startswith("no_"):
            how = (
                f"write '{option.name}: false'" if option.is_bool else f"--{option.name} takes a value and is no switch"
            )
            problems.append(f"{place} is not an option; {how}.")
        elif owners:
            problems.append(f"{place} belongs to {owners}; {strategy} does not use it: leave it out.")
        elif lower in known:
            problems.append(f"{place} is not an option; use --{lower}.")
        elif advice := RIVALS.get(lower) or RIVALS.get(positive):
            problems.append(f"{place} is not an option of vlft; {advice}.")
        elif (last := lower.rpartition(".")[2]) in known:
            problems.append(f"{place} is not an option; use --{last}.")
        else:
            # The nearest of `no_wandb` is use_wandb, not num_workers.
            hint = nearest(lower, known) or nearest(positive, known)
            problems.append(f"{place} is not an option{hint}; 'vlft --help' lists all.")
    return problems


Ranges = Mapping[Part, tuple[float, float]]


def _rates_of(options: StrategyConfig, found: discovery.Found) -> tuple[dict[Part, float], Ranges]:
    """What the plugin answers, checked: a wrong rate would surface hours later, as a loss that does not fall."""
    try:
        rates, recommended = options.rates(), options.recommended()
        for part, rate in rates.items():
            if part not in PARTS or not 0 < rate < math.inf:
                raise ValueError(f"{part!r}: {rate!r} is no part with a rate above 0")
        for part, (low, high) in recommended.items():
            if part not in PARTS or not 0 < low <= high:
                raise ValueError(f"{part!r}: {(low, high)!r} is no part with a range of rates")
    except Exception as error:
        raise StrategyError(
            f"Strategy '{found.name}' of {found.source} cannot say its rates: {type(error).__name__}: {error}; "
            "ask its author for a fix."
        ) from error
    return rates, recommended


def short_rate(rate: float) -> str:
    """0.00015 -> 1.5e-4, as rates are written."""
    digits, _, power = f"{rate:e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


LOWEST_RATE = 1e-7
"""Below it a training changes nothing that anyone would see: a slip of the exponent."""


def rate_notes(rates: Mapping[Part, float], recommended: Ranges, strategy: str) -> list[str]:
    """Remarks on rates that are above what the strategy recommends, or far below any use; one sentence each."""
    notes = []
    for part, rate in rates.items():
        low, high = recommended.get(part, (LOWEST_RATE, math.inf))
        if rate > high:
            notes.append(
                f"--learning_rate_{part} is {short_rate(rate)}, above the {short_rate(low)} to {short_rate(high)} that "
                f"{strategy} recommends: the model may forget what it could, or the loss may jump; watch the held-out "
                "loss, or give less."
            )
        elif rate < LOWEST_RATE:
            notes.append(
                f"--learning_rate_{part} is {short_rate(rate)}, below {short_rate(LOWEST_RATE)}: the {part} will "
                "hardly change; look at the exponent."
            )
    return notes


def _check_rates(
    config: ConfigT,
    options: StrategyConfig,
    given: Mapping[str, Given],
    found: discovery.Found,
    problems: list[str],
    notes: list[str],
) -> ConfigT:
    """A rate for a part that stays frozen is refused; one that a run.yaml holds gives way to flags that freeze it."""
    rates, recommended = _rates_of(options, found)
    if not rates:
        problems.append(f"--tuning_strategy {found.name} with these options trains no part; switch one on.")
    own = type(options).model_fields
    retuned = any(given[name].flag for name in given if name in own or name == "tuning_strategy")
    for part in RATE_PARTS:
        name = f"learning_rate_{part}"
        if part in rates or name not in given:
            continue
        if retuned and not given[name].flag:
            notes.append(f"{given[name].place} is left out: the flags freeze the {part}.")
            config = config.model_copy(update={name: None})
            continue
        switch = f" or add --train_{part}" if f"train_{part}" in own else ""
        problems.append(
            f"{given[name].place} is given, but {found.name} with these options keeps the {part} frozen; "
            f"leave it out{switch}."
        )
    used = {part: getattr(config, f"learning_rate_{part}") or rates[part] for part in RATE_PARTS if part in rates}
    notes += rate_notes(used, recommended, found.name)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# What must be on the disk, looked at before torch is loaded


def _check_disk(
    config: ConfigT, given: Mapping[str, Given], failed: set[str], problems: list[str], notes: list[str]
) -> ConfigT:
    def place(name: str) -> str:
        return given[name].place if name in given else f"--{name}"

    if "model_name_or_path" not in failed:
        problems += _model_problem(config.model_name_or_path, place("model_name_or_path"))
    resume = config.resume_from_checkpoint
    # A command that can do without a folder of the run has none.
    folder: Path | None = config.output_dir
    if "output_dir" not in failed and folder and is_main_process() and (problem := output_dir_problem(folder, resume)):
        problems.append(problem)
    if resume and resume != "latest" and not Path(resume).expanduser().is_dir():
        hint = nearest(resume, ["latest"]) or sibling(Path(resume), folder=True)
        where = f"{place('resume_from_checkpoint')} {resume}"
        problems.append(f"{where}: there is no such folder{hint}; give a checkpoint's folder or 'latest'.")
    if "dataset_config_path" not in failed:
        problems += _registry_problems(config, place)
    if "cache_dir" not in failed and (found := no_folder(config.cache_dir)):
        problems.append(f"{place('cache_dir')} {config.cache_dir} cannot be made: {found}; choose another.")
    chosen = config.augmentation
    if chosen and "augmentation" not in failed and (problem := policy_problem(chosen)):
        problems.append(f"{place('augmentation')} {chosen}: {problem}")
    needed: list[tuple[str, str]] = [
        ("use_wandb" if n == "wandb" and config.use_wandb else "report_to", n) for n in config.trackers
    ]
    needed += [("deepspeed", "DeepSpeed")] if config.deepspeed else []
    for option, package in needed:
        extra = package.lower()
        if importlib.util.find_spec(extra) is None:
            problems.append(f"{place(option)} needs {package}: pip install 'vlft[{extra}]', or leave it out.")
    for dataset, scripts in config.eval_dataset_scripts.items():
        where = f"{place('eval_dataset_scripts')} {dataset}"
        problems += [problem for script in scripts if (problem := _script_problem(script, where))]
    return _check_deepspeed(config, place("deepspeed"), problems, notes) if config.deepspeed else config


_WRONG_ORDER = re.compile(r"(?:Qwen/)?Qwen(2|2\.5|3)-(\d+B)-VL(?:-Chat|-Instruct)?", re.IGNORECASE)
_WRONG_END = re.compile(r"(?:Qwen/)?Qwen(2|2\.5|3)-VL-(\d+B)-Chat", re.IGNORECASE)


def _model_problem(name: str, place: str) -> list[str]:
    """A hub name is looked up later; here only what can be seen to be wrong at once."""
    path = Path(name).expanduser()
    if path.is_dir():
        return []
    if path.is_file():
        return [f"{place} {name} is a file; give the folder that it lies in."]
    if old := _WRONG_ORDER.fullmatch(name) or _WRONG_END.fullmatch(name):
        real = f"Qwen/Qwen{old[1]}-VL-{old[2].upper()}-Instruct"
        return [f"{place} {name}: there is no such model, older guides misname it; give {real}."]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "~")):
        return []
    hint = sibling(path, folder=True)
    return [f"{place} {name}: there is no such folder{hint}; give a folder or a hub name (owner/name)."]


def _registry_problems(config: RunConfig, place: Callable[[str], str]) -> list[str]:
    """The registry exists and knows the datasets. What its entries say is `vlft.data`'s business."""
    path = config.dataset_config_path
    where = f"{place('dataset_config_path')} {path}"
    try:
        registry = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{where}: there is no such file{sibling(path)}; give the registry of datasets."]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{where} cannot be read: {error}; give the registry of datasets."]
    except ValueError as error:
        return [f"{where} is not valid JSON: {error}; correct it."]
    datasets = registry.get("datasets") if isinstance(registry, dict) else None
    if not isinstance(datasets, dict):
        return [
            f'{where} has no "datasets"; write {{"datasets": {{"name": {{"json_path": ..., "image_root": ...}}}}}}.'
        ]
    wanted = [("dataset_names", name) for name in config.dataset_names or ()]
    wanted += [("eval_dataset_scripts", name) for name in config.eval_dataset_scripts]
    has = ", ".join(datasets) or "none"
    return [
        f"{place(option)}: there is no dataset '{name}' in {path}{nearest(name, datasets)}; it has {has}."
        for option, name in wanted
        if name not in datasets
    ]


def _script_problem(script: str, where: str) -> str:
    path = Path(script)
    if path.suffix == ".py":
        return "" if path.is_file() else f"{where}: there is no script {script}{sibling(path)}; check the path."
    metrics = discovery.find(discovery.METRICS)
    if script in metrics:
        return ""
    return (
        f"{where}: there is no script '{script}'{nearest(script, metrics)}; installed: {', '.join(metrics) or 'none'}."
    )


def _check_deepspeed(config: ConfigT, place: str, problems: list[str], notes: list[str]) -> ConfigT:
    value = config.deepspeed or ""
    try:
        path = deepspeed_path(value)
    except ConfigError as error:
        problems += [problem.replace("--deepspeed", place, 1) for problem in error.problems]
        return config
    if value == path.stem or Path(value).expanduser().is_file():
        return config
    notes.append(f"{place} {value} does not exist; the bundled {path.stem} is used.")
    return config.model_copy(update={"deepspeed": path.stem})
