"""Words -> a valid `Run`, or every problem at once; the commands; errors printed once; exit codes.

Plain code instead of argparse or pydantic-settings: both stop at the first unknown flag. Two sources: the file of
`--config`, then flags. Two phases: core options are known at once, the options of the strategy after its plugin was
found. Nothing here imports torch before the configuration is valid.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlft import __version__, discovery
from vlft.config import (
    GROUPS,
    RATE_PARTS,
    SCHEMA,
    Option,
    Run,
    RunConfig,
    bundled,
    deepspeed_path,
    is_main_process,
    no_folder,
    options_of,
    output_dir_problem,
)
from vlft.errors import ConfigError, StrategyError, VlftError
from vlft.family import PARTS, Part
from vlft.rivals import ENVIRONMENT, RIVALS, nearest
from vlft.strategy import Strategy, StrategyConfig

ModelT = TypeVar("ModelT", bound=BaseModel)

# ---------------------------------------------------------------------------------------------------------------------
# Words and YAML -> values by name


@dataclass(frozen=True)
class Given:
    """One option as it was written."""

    value: Any
    place: str
    """`--epochs`, or `run.yaml: epochs`."""
    flag: bool


Flags = list[tuple[str, list[str]]]


def split_words(words: Iterable[str]) -> tuple[list[str], Flags]:
    """`a --b 1 2 --c=3` -> (`[a]`, `[(--b, [1, 2]), (--c, [3])]`). Needs no knowledge of the options."""
    stray: list[str] = []
    flags: Flags = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word.partition("=")
            flags.append((flag, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            stray.append(word)
    return stray, flags


def _plain_name(written: str) -> str:
    return written.removeprefix("--").replace("-", "_")


def _read_flag(flag: str, words: list[str], options: Mapping[str, Option]) -> tuple[str, Any]:
    """Name and value of one flag; the name is returned as written (plain) when no option has it.

    Raises:
        ValueError: the words do not fit the option; the text ends the sentence that begins with the flag.
    """
    name = _plain_name(flag)
    positive = name.removeprefix("no_")
    if name not in options and positive != name and positive in options and options[positive].is_bool:
        if words:
            raise ValueError(f"takes no value, but {' '.join(words)!r} follows; leave that out.")
        return positive, False
    if name not in options:
        return name, words
    option = options[name]
    if "" in words:
        raise ValueError(f"has an empty value (an unset shell variable?); give {option.values}.")
    if not words and option.is_bool:
        return name, True
    if not words:
        raise ValueError(f"needs a value; give {option.values}.")
    if option.nullable and words in (["none"], ["null"]):
        return name, None
    if option.is_list:
        return name, words
    if len(words) > 1:
        raise ValueError(f"takes one value, but {' '.join(words)!r} follows; give {option.values}.")
    return name, words[0]


def _read_flags(flags: Flags, options: Mapping[str, Option], problems: list[str]) -> tuple[dict[str, Given], set[str]]:
    """The options that the flags give, and the names of those that could not be read."""
    given: dict[str, Given] = {}
    broken: set[str] = set()
    for flag, words in flags:
        try:
            name, value = _read_flag(flag, words, options)
        except ValueError as error:
            name, value = _plain_name(flag), None
            broken.add(name)
            problems.append(f"{flag} {error}")
        if name in given:
            problems.append(f"{flag} is given twice; leave one out.")
        given[name] = Given(value, flag, flag=True)
    return given, broken


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice: the standard one keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a configuration file.

    Raises:
        ConfigError: missing (with the nearest name), unreadable, not a flat mapping, or of another schema.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file{_sibling(path)}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}; give a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}; correct it.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} holds no options; write one 'name: value' a line.")
    schema = data.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ConfigError(
            f"{path.name}: schema is {schema!r}, vlft {__version__} reads {SCHEMA}; use the vlft it is from."
        )
    return data


def _read_file(flags: Flags, problems: list[str]) -> tuple[dict[str, Given], Flags, bool]:
    """The options of `--config`, the flags that are left, and whether the file could be read."""
    configs = [words for flag, words in flags if flag == "--config"]
    rest = [(flag, words) for flag, words in flags if flag != "--config"]
    if not configs:
        return {}, rest, True
    words = [word for one in configs for word in one]
    if len(words) != 1 or not words[0]:
        problems.append(
            f"--config takes one YAML file, found {' '.join(words) or 'none'}; flags override what it says."
        )
        return {}, rest, False
    path = Path(words[0]).expanduser()
    try:
        data = read_yaml(path)
    except ConfigError as error:
        problems.extend(error.problems)
        return {}, rest, False
    given: dict[str, Given] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in given:
            problems.append(f"{path.name}: {key} is written twice (a hyphen is an underscore); leave one out.")
        given[name] = Given(value, f"{path.name}: {key}", flag=False)
    return given, rest, True


def _merge(file: dict[str, Given], flags: dict[str, Given]) -> dict[str, Given]:
    """Flags over file. Where two options depend on each other, the flag decides for both: a run.yaml holds them all."""
    merged = {name: given for name, given in (file | flags).items() if given.value is not None}
    for switch, dependents in (
        ("use_data_augmentation", ("augmentation",)),
        ("use_wandb", ("wandb_project", "wandb_run_name")),
    ):
        off = switch in flags and str(flags[switch].value).lower() in ("false", "0", "no", "off")
        for name in dependents:
            if off and name not in flags:
                merged.pop(name, None)
    if "augmentation" in flags and "use_data_augmentation" not in flags:
        merged.pop("use_data_augmentation", None)
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# Values -> Run


def parse(argv: Sequence[str], *, start: bool = True) -> Run:
    """The run that these words describe.

    Args:
        argv: words after `vlft` or `vlft train`.
        start: also check what is on the disk (files exist, `output_dir` is free). False to read a configuration only.
    Raises:
        ConfigError: every problem at once, one sentence each.
        StrategyError: the strategy's plugin is broken or claimed twice.
    """
    problems: list[str] = []
    notes = _environment_notes()
    stray, words = split_words(_without_local_rank(argv))
    problems += [f"'{word}' stands before the first option; options are written --name value." for word in stray]
    file, words, readable = _read_file(words, problems)
    name = _strategy_name(words, file)
    strategy, found = _find_strategy(name, problems)
    own = options_of(strategy.Config, "strategy") if strategy else _every_strategy_option()
    known = options_of(RunConfig) | own
    flags, broken = _read_flags(words, known, problems)
    unknown = {key: one for key, one in (file | flags).items() if key not in known and key not in broken}
    problems += _unknown(unknown, known, name)
    given = _merge(file, flags)

    # A file that could not be read may hold what is missing.
    config, failed = build(RunConfig, given, problems, broken, missing=readable)
    options: StrategyConfig | None = None
    if strategy and found:
        where = f"--tuning_strategy {name}: "
        options, _ = build(strategy.Config, given, problems, broken, missing=readable, where=where)
        if config and options:
            config = _check_rates(config, options, given, found, problems, notes)
    if config and start:
        config = _check_disk(config, given, failed, problems, notes)
    if problems or config is None or options is None or strategy is None or found is None:
        raise ConfigError(problems)
    return Run(config, strategy, options, found.source, tuple(notes))


def _environment_notes() -> list[str]:
    present = [name for name in ENVIRONMENT if name in os.environ]
    advice = {name: RIVALS.get(name.lower(), f"use --{name.lower()}") for name in present}
    return [f"The environment's {name} is not read; {advice[name]}." for name in present]


def load_run(path: str | Path, overrides: Sequence[str] = (), *, start: bool = False) -> Run:
    """The run that a run.yaml describes, flags over it. Reads only: nothing on the disk is checked unless `start`."""
    return parse(["--config", str(path), *overrides], start=start)


def build(
    model: type[ModelT],
    given: Mapping[str, Given],
    problems: list[str],
    broken: Iterable[str] = (),
    *,
    missing: bool,
    where: str = "",
) -> tuple[ModelT | None, set[str]]:
    """Validate the part of `given` that belongs to `model`; problems are added as sentences.

    Fields that are wrong are replaced by their default (or a stand-in) for another try, so that options which
    contradict each other are reported together with those that are wrong by themselves.

    Args:
        broken: names that were reported before.
        missing: report required options that are not there.
        where: stands before a problem of several options together, for a model that does not name them itself.
    Returns:
        the model, None when there is none to be had, and the names that failed.
    """
    options = options_of(model)
    values = {name: one.value for name, one in given.items() if name in options}
    failed = set(broken)
    # pydantic takes true for 1, but `epochs: yes` is a slip.
    for name in [name for name, value in values.items() if value is True and "number" in options[name].kind]:
        failed.add(name)
        problems.append(f"{given[name].place} is '{values.pop(name)}'; give {options[name].values}.")
    context = {"places": {name: one.place for name, one in given.items()}, "failed": failed}
    for _ in ("fields", "contradictions", "what is left"):
        try:
            return model.model_validate(values, context=context), failed
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                name = str(detail["loc"][0]) if detail["loc"] else ""
                if detail["type"] == "default_factory_not_called":
                    continue
                if name not in failed and (missing or detail["type"] != "missing"):
                    problems += _sentences(name, detail, given, options, where)
                failed.add(name)
                values.pop(name, None)
                if name and options[name].required:
                    values[name] = "?"
    return None, failed


def _sentences(
    name: str, detail: Any, given: Mapping[str, Given], options: Mapping[str, Option], where: str
) -> list[str]:
    cause = (detail.get("ctx") or {}).get("error")
    if not name:
        return [f"{where}{line.rstrip('.')}." for line in str(cause or detail["msg"]).split("\n")]
    option = options[name]
    if detail["type"] == "missing":
        return [f"--{name} is missing; give {option.values} ({option.text.rstrip('.')})."]
    place, value = given[name].place, given[name].value
    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if cause is not None:
        return [f"{place} {cause}; found '{shown}'."]
    return [f"{place} is '{shown}'{nearest(shown, option.choices)}; give {option.values}."]


def _strategy_name(words: Flags, file: Mapping[str, Given]) -> str:
    for flag, values in words:
        if _plain_name(flag) == "tuning_strategy" and values:
            return values[0]
    return str(file["tuning_strategy"].value or "") if "tuning_strategy" in file else ""


def _find_strategy(name: str, problems: list[str]) -> tuple[type[Strategy] | None, discovery.Found | None]:
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
        if owners:
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


def _default_rates(options: StrategyConfig, found: discovery.Found) -> dict[Part, float]:
    """What the plugin answers, checked: a wrong rate would surface hours later, as a loss that does not fall."""
    try:
        rates = options.rates()
        for part, rate in rates.items():
            if part not in PARTS or not 0 < rate < math.inf:
                raise ValueError(f"{part!r}: {rate!r} is no part with a rate above 0")
    except Exception as error:
        raise StrategyError(
            f"Strategy '{found.name}' of {found.source} cannot say its rates: {type(error).__name__}: {error}; "
            "ask its author for a fix."
        ) from error
    return rates


def _check_rates(
    config: RunConfig,
    options: StrategyConfig,
    given: Mapping[str, Given],
    found: discovery.Found,
    problems: list[str],
    notes: list[str],
) -> RunConfig:
    """A rate for a part that stays frozen is refused; one that a run.yaml holds gives way to flags that freeze it."""
    rates = _default_rates(options, found)
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
    return config


# ---------------------------------------------------------------------------------------------------------------------
# What must be on the disk, looked at before torch is loaded


def _check_disk(
    config: RunConfig, given: Mapping[str, Given], failed: set[str], problems: list[str], notes: list[str]
) -> RunConfig:
    def place(name: str) -> str:
        return given[name].place if name in given else f"--{name}"

    if "model_name_or_path" not in failed:
        problems += _model_problem(config.model_name_or_path, place("model_name_or_path"))
    resume = config.resume_from_checkpoint
    if "output_dir" not in failed and is_main_process() and (problem := output_dir_problem(config.output_dir, resume)):
        problems.append(problem)
    if resume and resume != "latest" and not Path(resume).expanduser().is_dir():
        hint = nearest(resume, ["latest"]) or _sibling(Path(resume))
        where = f"{place('resume_from_checkpoint')} {resume}"
        problems.append(f"{where}: there is no such folder{hint}; give a checkpoint's folder or 'latest'.")
    if "dataset_config_path" not in failed:
        problems += _registry_problems(config, place)
    if "cache_dir" not in failed and (found := no_folder(config.cache_dir)):
        problems.append(f"{place('cache_dir')} {config.cache_dir} cannot be made: {found}; choose another.")
    for option, package, wanted in (
        ("use_wandb", "wandb", config.use_wandb),
        ("deepspeed", "DeepSpeed", config.deepspeed),
    ):
        extra = package.lower()
        if wanted and importlib.util.find_spec(extra) is None:
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
    return [f"{place} {name}: there is no such folder{_sibling(path)}; give a folder or a hub name (owner/name)."]


def _registry_problems(config: RunConfig, place: Callable[[str], str]) -> list[str]:
    """The registry exists and knows the datasets. What its entries say is `vlft.data`'s business."""
    path = config.dataset_config_path
    where = f"{place('dataset_config_path')} {path}"
    try:
        registry = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{where}: there is no such file{_sibling(path)}; give the registry of datasets."]
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
        return "" if path.is_file() else f"{where}: there is no script {script}{_sibling(path)}; check the path."
    metrics = discovery.find(discovery.METRICS)
    if script in metrics:
        return ""
    return (
        f"{where}: there is no script '{script}'{nearest(script, metrics)}; installed: {', '.join(metrics) or 'none'}."
    )


def _check_deepspeed(config: RunConfig, place: str, problems: list[str], notes: list[str]) -> RunConfig:
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


def _sibling(path: Path) -> str:
    """The nearest name in the deepest folder of `path` that exists."""
    path = path.expanduser()
    for part in (path, *path.parents):
        if part.parent.is_dir():
            hint = nearest(part.name, (entry.name for entry in part.parent.iterdir()))
            return hint.replace("'", f"'{part.parent}/", 1) if hint and str(part.parent) != "." else hint
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Help and docs, from the fields


def help_text(argv: Sequence[str] = ()) -> str:
    """`vlft --help`; with a strategy among the words its options are shown too. Other plugins are not imported."""
    _, words = split_words(argv)
    file, words, _ = _read_file(words, [])
    name = _strategy_name(words, file)
    # The options that are asked for are not there: a page without them would hide that.
    problems: list[str] = []
    strategy, found = _find_strategy(name, problems)
    if problems:
        raise ConfigError(problems)
    width = max(80, min(120, shutil.get_terminal_size((110, 24)).columns))
    lines = [_USAGE.format(version=__version__)]
    options = options_of(RunConfig)
    for group, title in GROUPS.items():
        lines += ["", f"{title}:", *_help_lines([one for one in options.values() if one.group == group], width)]
    if strategy and found:
        own = options_of(strategy.Config, name).values()
        lines += ["", f"Strategy {name} ({found.source}):", *_help_lines(own, width)]
        lines += textwrap.wrap(_rates_line(strategy), width, initial_indent="  ", subsequent_indent="  ")
    else:
        strategies = discovery.find(discovery.STRATEGIES)
        lines += ["", "Strategies (vlft --tuning_strategy NAME --help shows the options of one):"]
        lines += [f"  {one.name:<28}{one.source}" for one in strategies.values()]
    if launch := bundled("accelerate_configs", ".yaml"):
        folder = next(iter(launch.values())).parent
        lines += ["", f"Files for accelerate launch --config_file ({', '.join(launch)}):", f"  {folder}"]
    return "\n".join(lines)


_USAGE = """vlft {version}: fine-tune vision-language models on conversations about images.

  vlft [train] --model_name_or_path MODEL --output_dir DIR --tuning_strategy NAME [options]
  vlft --config run.yaml [options]           options over those of the file
  accelerate launch -m vlft [options]        several GPUs; so do torchrun -m vlft and deepspeed --module vlft
  vlft plugins                               strategies and evaluation scripts, and whether they work
  vlft merge MODEL --output_dir DIR [--base trained|original]
  vlft --version

A switch is written --x, --no-x or --x false. In YAML every option has the same name, without the hyphens."""


def _help_lines(options: Iterable[Option], width: int) -> list[str]:
    lines = []
    for one in options:
        default = one.default if one.required else f"default: {one.default}"
        text = f"{one.text} [{one.values}; {default}]"
        wrapped = textwrap.wrap(text, width - 32, break_on_hyphens=False)
        head = f"  --{one.name}"
        if len(head) > 30:
            lines.append(head)
            head = ""
        lines += [f"{head:<32}{wrapped[0]}", *(" " * 32 + line for line in wrapped[1:])]
    return lines


def _rates_line(cls: type[Strategy]) -> str:
    try:
        rates = cls.Config().rates()
    except Exception:
        # Options that must be given: there is no default to show.
        return ""
    return "Trains by default: " + ", ".join(f"{part} at {rate:g}" for part, rate in rates.items()) + "."


def options_page() -> str:
    """docs/options.md. Written by `python -c "import vlft.cli; vlft.cli.write_options_page()"`; a test compares."""
    core = options_of(RunConfig)
    lines = [_PAGE_HEAD]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", *_TABLE_HEAD]
        lines += [_row(one, _RESUME[one.resume]) for one in core.values() if one.group == group]
    lines += ["", "## Options of the built-in strategies", "", _STRATEGIES_HEAD, ""]
    for name, found in discovery.find(discovery.STRATEGIES).items():
        if found.distribution == "vlft":
            cls, _ = discovery.load_strategy(name)
            own = options_of(cls.Config, "strategy").values()
            lines += [f"### {name}", "", _rates_line(cls), "", *_TABLE_HEAD]
            lines += [*(_row(one, _RESUME[one.resume]) for one in own), ""]
    lines += ["## Names in other projects", "", _RIVALS_HEAD, "", "| there | here |", "|---|---|"]
    lines += [f"| `{name}` | {advice} |" for name, advice in sorted(RIVALS.items())]
    return "\n".join(lines) + "\n"


def write_options_page() -> None:
    (Path(__file__).resolve().parent.parent / "docs" / "options.md").write_text(options_page(), encoding="utf-8")


_RESUME = {"no": "no", "yes": "yes", "batch": "if the global batch stays"}
_TABLE_HEAD = ("| option | meaning and unit | values | default | may change on a resume |", "|---|---|---|---|---|")
_STRATEGIES_HEAD = (
    "They become flags and YAML keys once `--tuning_strategy` names the strategy; another one refuses them."
)
_RIVALS_HEAD = "vlft answers each of these with the text on the right. No `--` is needed in YAML."
_PAGE_HEAD = """# Options

This page is made from the fields of `vlft/config.py` and of the built-in strategies; a test compares the two.

Every option is a flag (`--max_steps 100`, `--max-steps=100`) and a key of the same name in the YAML file of
`--config`. Flags override the file. A switch is written `--use_wandb`, `--no-use_wandb` or `--use_wandb false`. A
list takes several words: `--dataset_names invoices charts`. `null` in YAML, or the word `none` for an option without
a value by default, means "not given". An unknown name, a name given twice and an option that the strategy cannot use
are errors, all of them reported at once.

A resume keeps the global batch (`per_device_train_batch_size` x `gradient_accumulation_steps` x processes). On
another number of processes the accumulation is chosen anew; a batch size or accumulation that differs from the run's
must multiply to the same global batch. A larger `epochs` or `max_steps` makes the schedule longer, so the rates from
there on are not those of the shorter run. Options of a strategy, and the rates, never change on a resume: to change
them, start a second stage with `--model_name_or_path RUN/model`."""


def _row(option: Option, resume: str) -> str:
    cells = (f"`--{option.name}`", option.text, option.values, option.default, resume)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# ---------------------------------------------------------------------------------------------------------------------
# Commands


class MergeConfig(BaseModel):
    """Options of `vlft merge`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Path = Field(description="Result of a run: output_dir/model.")
    output_dir: Path = Field(description="Folder for the merged model; must be empty.")
    base: Literal["trained", "original"] = Field(
        "trained",
        description="Weights to merge onto: those trained with (a 4-bit base: dequantised), or the original ones.",
    )


def _train(words: Sequence[str]) -> None:
    run = parse(words)
    # Only now: torch alone takes seconds, and a wrong flag must not wait for it.
    from vlft import train

    train.main(run)


def _plugins(words: Sequence[str]) -> None:
    if words:
        raise ConfigError(f"'vlft plugins' takes no options, found '{' '.join(words)}'; leave them out.")
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


def parse_merge(words: Sequence[str]) -> MergeConfig:
    """Options of `vlft merge`, in the manner of `parse`.

    Raises:
        ConfigError: every problem at once.
    """
    stray, flags = split_words(words)
    problems: list[str] = []
    options = options_of(MergeConfig)
    given, broken = _read_flags(flags, options, problems)
    for word in stray:
        if "model" in given:
            problems.append(f"'{word}' is one model too many; merge takes one.")
        given.setdefault("model", Given(word, "MODEL", flag=True))
    if "model" not in given:
        broken.add("model")
        problems.append("MODEL is missing; give the result of a run, its output_dir/model.")
    problems += [
        f"{one.place} is not an option of merge{nearest(name, options)}; see 'vlft merge --help'."
        for name, one in given.items()
        if name not in options and name not in broken
    ]
    given = {name: one for name, one in given.items() if one.value is not None}
    config, failed = build(MergeConfig, given, problems, broken, missing=True)
    if config and "model" not in failed and not config.model.is_dir():
        hint = _sibling(config.model)
        problems.append(f"MODEL {config.model}: there is no such folder{hint}; give output_dir/model of a run.")
    if config and "output_dir" not in failed and output_dir_problem(config.output_dir, None):
        problems.append(f"--output_dir {config.output_dir} is not an empty folder; give a new one.")
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _merge_command(words: Sequence[str]) -> None:
    config = parse_merge(words)
    from vlft import export

    print(export.merge(config.model, config.output_dir, config.base))


_MERGE_USAGE = "vlft merge MODEL --output_dir DIR [--base trained|original]\n"
_PLUGINS_USAGE = """vlft plugins

List the installed strategies and evaluation scripts with the distribution that each comes from: ok, broken (and why),
or conflict, where two distributions claim one name. It takes no options."""
SILENT_SECONDS = 5.0
"""How long a process that repeats nothing stays; a launcher ends it sooner."""
COMMANDS = {"train": _train, "plugins": _plugins, "merge": _merge_command}


def main(argv: Sequence[str] | None = None) -> int:
    """The process: runs a command, prints an error once, returns the exit code (see `vlft.errors`)."""
    words = _without_local_rank(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(words)
    except VlftError as error:
        if _first_to_say(str(error)):
            print(_report(error), file=sys.stderr, flush=True)
        else:
            # A launcher ends all processes when the first one does: leave the one that speaks the time to do so.
            time.sleep(SILENT_SECONDS)
        return _leave_group(error.exit_code)
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        text = "another process of this run ended, so the others cannot go on; its own words say why."
        if _first_to_say(text):
            print(f"vlft (rank {os.environ.get('RANK', '0')}): {text}", file=sys.stderr, flush=True)
        return _leave_group(1)
    except BrokenPipeError:
        # `vlft plugins | head`: the reader has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _dispatch(words: list[str]) -> None:
    command, rest = ("train", words) if not words or words[0].startswith("-") else (words[0], words[1:])
    if command not in COMMANDS:
        raise ConfigError(f"'{command}' is not a command{nearest(command, COMMANDS)}; commands: {', '.join(COMMANDS)}.")
    if "--version" in rest:
        print(f"vlft {__version__}")
    elif {"--help", "-h"} & set(rest) or words == []:
        print(_help(command, [w for w in rest if w not in ("--help", "-h")]))
    else:
        COMMANDS[command](rest)


def _help(command: str, words: list[str]) -> str:
    if command == "plugins":
        return _PLUGINS_USAGE
    if command == "merge":
        lines = _help_lines(options_of(MergeConfig).values(), 110)
        return "\n".join([_MERGE_USAGE, *(line.replace("  --model ", "  MODEL   ", 1) for line in lines)])
    return help_text(words)


def _without_local_rank(words: Iterable[str]) -> list[str]:
    """The deepspeed launcher puts `--local_rank=N` before the options. The environment says it too: drop it."""
    kept: list[str] = []
    follows = False
    for word in words:
        name, equals, _ = word.partition("=")
        if follows and word.lstrip("-").isdigit():
            follows = False
            continue
        follows = name in ("--local_rank", "--local-rank") and not equals
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
    return kept


def _report(error: VlftError) -> str:
    # Indented lines are examples that belong to the problem before them.
    problems = error.problems if isinstance(error, ConfigError) else re.split(r"\n(?! )", str(error))
    rank = os.environ.get("RANK", "0")
    head = "vlft: " if rank == "0" else f"vlft (rank {rank}): "
    if len(problems) == 1:
        return head + problems[0]
    return "\n".join([f"{head}{len(problems)} problems:", *(f"  * {problem}" for problem in problems)])


def _leave_group(code: int) -> int:
    """The exit code; a process of several ends here and now.

    Unwinding a process group whose other members are gone, or wait in a collective, aborts or hangs.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return code
    if distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _lost_another(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone: its reason is worth reading, this one is not."""
    return any(
        word in str(error) for word in ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    )


def _first_to_say(text: str) -> bool:
    """Whether this process is the one to print an error that others may have met too.

    Once the processes are connected they ask their common store. Before that, every process of a machine reads the
    same words and files, so its first one speaks: another machine may lack a file that rank 0 has.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # A restart by torchrun uses the same store.
        said = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {text}"
        try:
            store = distributed.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=5))
            return bool(store.add("vlft said " + hashlib.sha256(said.encode()).hexdigest(), 1) == 1)
        except Exception:
            # The store died with its owner: better twice than never.
            return True
    return "vlft.train" in sys.modules or os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


if __name__ == "__main__":
    sys.exit(main())
