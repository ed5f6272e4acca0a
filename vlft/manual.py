"""`--help` and docs/options.md, made from the fields of the options."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlft import __version__, discovery
from vlft.commands import COMMANDS, Command
from vlft.config import GROUPS, Option, RunConfig, bundled, options_of
from vlft.errors import ConfigError
from vlft.parse import find_strategy, strategy_name
from vlft.rivals import RIVALS
from vlft.strategy import Strategy
from vlft.words import read_file, split_words


def help_text(argv: Sequence[str] = ()) -> str:
    """`vlft --help`; with a strategy among the words its options are shown too. Other plugins are not imported."""
    _, words = split_words(argv)
    file, words, _ = read_file(words, [])
    name = strategy_name(words, file)
    # The options that are asked for are not there: a page without them would hide that.
    problems: list[str] = []
    strategy, found = find_strategy(name, problems)
    if problems:
        raise ConfigError(problems)
    width = max(80, min(120, shutil.get_terminal_size((110, 24)).columns))
    commands = "\n".join(f"  {'vlft ' + c.name:<43}{c.summary}" for c in COMMANDS.values())
    lines = [_USAGE.format(version=__version__, commands=commands)]
    options = options_of(RunConfig)
    for group, title in GROUPS.items():
        lines += ["", f"{title}:", *help_lines([one for one in options.values() if one.group == group], width)]
    if strategy and found:
        own = options_of(strategy.Config, name).values()
        lines += ["", f"Strategy {name} ({found.source}):", *help_lines(own, width)]
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
{commands}
  vlft --version

A switch is written --x, --no-x or --x false. In YAML every option has the same name, without the hyphens."""


def command_help(command: Command) -> str:
    """`vlft COMMAND --help`."""
    lines = [command.usage, "", command.summary[0].upper() + command.summary[1:] + ".", ""]
    for line in help_lines(options_of(command.options).values(), 110):
        name = line.split()[0].removeprefix("--") if line.startswith("  --") else ""
        lines.append(line.replace(f"--{name}", name.upper().ljust(len(name) + 2), 1) if name in command.first else line)
    return "\n".join(lines)


def help_lines(options: Iterable[Option], width: int) -> list[str]:
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
    """docs/options.md; `python -c "import vlft.manual; vlft.manual.write_options_page()"` writes it."""
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
there on are not those of the shorter run; fewer steps than are done are refused. Options of a strategy, and the rates,
never change on a resume: to change them, start a second stage with `--model_name_or_path RUN/model`."""


def _row(option: Option, resume: str) -> str:
    cells = (f"`--{option.name}`", option.text, option.values, option.default, resume)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
