"""The tuning guide says what the code says, in both languages: tables, flags, commands, ranges, memory."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vlft import guide
from vlft.commands import COMMANDS, parse_command
from vlft.config import RATE_PARTS, Run, RunConfig
from vlft.family import FAMILIES, Parts
from vlft.parse import parse, rate_notes, short_rate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
from workload import SIZES, make_config  # noqa: E402

PAGES = {language: path.read_text(encoding="utf-8") for language, path in guide.PAGES.items()}
LANGUAGES = pytest.mark.parametrize("language", PAGES)
LAUNCHERS = {"master_port", "module"}
"""Flags in the page that belong to a launcher."""
AGAIN = 'python -c "import vlft.guide; vlft.guide.write()"'


def _blocks(page: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


def _words(page: str) -> list[list[str]]:
    """The words after `vlft` of every command on the page."""
    lines = [line for block in _blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    return [(words := shlex.split(line))[words.index("vlft") + 1 :] for line in lines if line.strip()]


def _headings(page: str) -> list[tuple[int, str]]:
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", text, flags=re.MULTILINE)]


def _every_flag() -> set[str]:
    known = set(RunConfig.model_fields)
    for cls in guide.built_in().values():
        known |= set(cls.Config.model_fields)
    for command in COMMANDS.values():
        known |= set(command.options.model_fields) - set(command.first)
    return known


# ---------------------------------------------------------------------------------------------------------------------
# Options and their tables


def test_chinese_has_every_text() -> None:
    say = guide.words("zh")
    guide.tables(say)
    assert not say.missing, "docs/options.zh.yaml lacks the Chinese of:\n" + "\n".join(dict.fromkeys(say.missing))
    unused = sorted(set(say.dictionary or ()) - say.used)
    assert not unused, f"docs/options.zh.yaml has texts that no option has any more: {unused}"


@LANGUAGES
def test_every_table_is_there_once_and_current(language: str) -> None:
    page, name = PAGES[language], guide.PAGES[language].name
    found, wanted = guide.named_tables(page), list(guide.tables(guide.words(language)))
    for table in wanted:
        assert found.count(table) == 1, (
            f"{name} has no table '{table}': write <!-- table: {table} --> and <!-- /table -->"
        )
    assert set(found) == set(wanted)
    assert page == guide.with_tables(page, guide.words(language)), f"the tables of {name} are old; run {AGAIN}"


@LANGUAGES
def test_every_flag_is_in_the_guide_and_every_flag_in_it_exists(language: str) -> None:
    name = guide.PAGES[language].name
    listed = set(re.findall(r"^\| (?:`vlft [\w-]+` \| )?`--(\w+)`", PAGES[language], flags=re.MULTILINE))
    named = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z]\w*)", PAGES[language]))
    missing = sorted(_every_flag() - listed)
    assert not missing, f"{name} does not list --{', --'.join(missing)}; run {AGAIN}"
    unknown = sorted(named - _every_flag() - LAUNCHERS)
    assert not unknown, f"{name} speaks of --{', --'.join(unknown)}, which no command has"


@LANGUAGES
def test_every_strategy_and_command_is_explained(language: str) -> None:
    titles = [title for _, title in _headings(PAGES[language])]
    for name in guide.built_in():
        assert name in titles, f"{guide.PAGES[language].name} has no section '### {name}'"
    for name in COMMANDS:
        assert f"`vlft {name}" in PAGES[language]


def test_both_languages_have_the_same_structure() -> None:
    english, chinese = PAGES["en"], PAGES["zh"]
    assert [level for level, _ in _headings(english)] == [level for level, _ in _headings(chinese)]
    assert _blocks(english) == _blocks(chinese)
    assert guide.named_tables(english) == guide.named_tables(chinese)
    for pattern in (r"^\|.*\|$", r"^\d\. ", r"\]\(([^)#]+)\)"):
        shapes = [re.findall(pattern, page, flags=re.MULTILINE) for page in (english, chinese)]
        assert len(shapes[0]) == len(shapes[1]), pattern
    tables = [[row for row in page.splitlines() if row.startswith("|")] for page in (english, chinese)]
    for row, same in zip(*tables, strict=True):
        assert row.count("|") == same.count("|"), (row, same)
        assert re.findall(r"`--\w+`", row) == re.findall(r"`--\w+`", same), (row, same)
    links = [set(re.findall(r"\]\(([^)#]+)\)", page)) for page in (english, chinese)]
    assert links[0] - {"tuning-guide.zh.md"} == links[1] - {"tuning-guide.md"}


def test_short_rates() -> None:
    assert [short_rate(rate) for rate in (1e-5, 0.0002, 1.5e-4)] == ["1e-5", "2e-4", "1.5e-4"]


def test_a_text_without_chinese_is_named() -> None:
    say = guide.Words({})
    guide.tables(say)
    assert any(text.startswith("--lora_rank of qlora: 'Rank of") for text in say.missing)
    with pytest.raises(ValueError, match="no table 'cooking'"):
        guide.with_tables("<!-- table: cooking -->\n<!-- /table -->", guide.Words())


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def _run(words: list[str]) -> Run:
    run = parse(words, start=False)
    flags = {word.removeprefix("--").removeprefix("no-") for word in words if word.startswith("--")}
    assert flags - {"config"} <= run.config.model_fields_set | run.options.model_fields_set
    return run


@pytest.mark.parametrize("words", _words(PAGES["en"]), ids=lambda words: " ".join(words)[:50])
def test_command_line_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dataset_config.json").write_text('{"datasets": {"invoices": {"json_path": "a"}}}')
    (tmp_path / "output" / "full").mkdir(parents=True)
    (tmp_path / "output" / "full" / "run.yaml").write_text("{model_name_or_path: a/b, tuning_strategy: full}")
    if words[0] in COMMANDS:
        assert parse_command(COMMANDS[words[0]], words[1:])
    else:
        run = _run(words)
        assert not run.notes, "an example stays within its own guide's ranges"


@pytest.mark.parametrize("strategy", ["qlora", "lora_llm_full_vit", "full"])
def test_an_example_is_the_script_s(strategy: str) -> None:
    """The three commands are those of examples/, the paths' variables at their defaults."""
    script = (ROOT / "examples" / f"{strategy}.sh").read_text()
    command = re.sub(r'"\$\{\w+:-([^}]*)\}"', r"\1", script.partition("accelerate launch -m vlft")[2])
    words = shlex.split(command.replace('"$@"', "").replace("\\\n", " "))
    (example,) = [w for w in _words(PAGES["en"]) if f"output/{strategy}" in w]
    assert (_run(example).config, _run(example).options) == (_run(words).config, _run(words).options)


# ---------------------------------------------------------------------------------------------------------------------
# Rates


@LANGUAGES
def test_the_ranges_are_those_of_the_strategies(language: str) -> None:
    rows = dict(
        re.findall(r"^\| (`--learning_rate_\w+`[^|]*) \| ([\de-]+ \S+ [\de-]+) \|$", PAGES[language], re.MULTILINE)
    )
    ranges = [tuple(float(x) for x in re.findall(r"\de-\d", text)) for text in rows.values()]
    own = {name: cls.Config().recommended() for name, cls in guide.built_in().items()}
    full, adapters = own["full"], own["lora_llm_full_vit"]
    assert ranges == [full["vit"], full["projector"], adapters["llm"], full["llm"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning_rate_llm 2e-4", ""),
        ("--learning_rate_llm 3e-4", "--learning_rate_llm is 3e-4, above the 1e-4 to 2e-4 that qlora recommends"),
        ("--learning_rate_llm 1e-6", ""),
        ("--learning_rate_llm 1e-8", "--learning_rate_llm is 1e-8, below 1e-7: the llm will hardly change"),
        ("--train_vit --learning_rate_vit 1e-3", "--learning_rate_vit is 1e-3, above the 1e-4 to 2e-4"),
        ("--train_vit", ""),
    ],
)
def test_a_start_remarks_on_rates(words: str, said: str) -> None:
    base = "--model_name_or_path a/b --output_dir o --tuning_strategy qlora"
    notes = parse(shlex.split(f"{base} {words}"), start=False).notes
    assert len(notes) == bool(said)
    assert all(said in note for note in notes)


def test_rates_of_a_strategy_without_advice() -> None:
    assert rate_notes({"llm": 0.5, "vit": 1e-4}, {}, "mine") == []
    assert len(rate_notes({"llm": 1e-9}, {}, "mine")) == 1
    assert set(RATE_PARTS) == set(guide.built_in()["full"].Config().recommended())


def test_what_a_step_of_adam_does_to_bf16_weights() -> None:
    """The page's 70%: an early step of Adam is the rate itself, up or down."""
    import torch

    weights = (0.02 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    moved = (weights.float() - 2e-5).bfloat16()
    assert (moved == weights).float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert all("70%" in page for page in PAGES.values())


def test_the_demo_s_rates() -> None:
    demo = (ROOT / "demo" / "run.py").read_text(encoding="utf-8")
    rates = re.findall(r'"--learning_rate_(\w+)", "([^"]+)"', demo)
    assert dict(rates) == {"llm": "2e-3", "vit": "1e-3", "projector": "1e-3"}
    assert '"--lora_rank", 32, "--lora_alpha", 64' in demo


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@dataclass
class _Source:
    """A published size without any weights, as strategies load one."""

    size: str
    compute_dtype: Any = None
    quant_storage: Any = None

    def __post_init__(self) -> None:
        self.config = make_config(self.size, _Ids())
        self.tied_head = SIZES[self.size].tied

    @property
    def parts(self) -> Parts:
        return FAMILIES[SIZES[self.size].family].parts

    def load(self, **_: Any) -> Any:
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.config)


class _Ids:
    def convert_tokens_to_ids(self, token: str) -> int:
        return len(token)


NF4 = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a weight: a half, a scale of 8 bits for 64 of them, and one of 32 bits for 256 of these."""
STATIC = {"partial_llm_full_vit": {"llm_frozen_layers": 20}}


def _static_gib(strategy: str, size: str, trained: int = 16) -> float:
    """Weights, gradients and states before the first sample; what trains, the strategy says itself."""
    import torch

    source, four_bits = _Source(size), strategy == "qlora"
    cls = guide.built_in()["lora" if four_bits else strategy]
    with torch.device("meta"):
        model = cls(cls.Config(**STATIC.get(strategy, {}))).prepare_model(source)
    total = 0.0
    for name, p in model.named_parameters():
        quantised = four_bits and f"{source.parts.layers}." in name and p.dim() == 2
        total += p.numel() * (trained if p.requires_grad else NF4 if quantised else 2)
    return total / 2**30


@LANGUAGES
def test_the_table_of_static_memory(language: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", PAGES[language], flags=re.MULTILINE)
    assert {name for name, *_ in rows} == set(guide.built_in())
    for name, small, large in rows:
        told = f"| `{name}` | {_static_gib(name, '3B'):.1f} | {_static_gib(name, '7B'):.1f} |"
        assert told == f"| `{name}` | {small} | {large} |"


def test_what_the_ladder_says() -> None:
    """Half the rank saves 1.2 GiB of 7B; adamw_8bit takes 7B to less than half."""
    source = _Source("7B")
    import torch

    layers = [
        m
        for n, m in source.load().named_modules()
        if n.startswith(source.parts.layers + ".") and isinstance(m, torch.nn.Linear)
    ]
    half = 32 * 16 * sum(m.in_features + m.out_features for m in layers) / 2**30
    assert f"{half:.1f}" == "1.2"
    assert all("1.2 GiB" in page for page in PAGES.values())
    assert _static_gib("full", "7B", trained=6) < _static_gib("full", "7B") / 2


def test_tokens_of_a_picture() -> None:
    assert RunConfig.model_fields["max_pixels"].default // 28**2 == 1280


# ---------------------------------------------------------------------------------------------------------------------


def test_the_readme_links_both_pages() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in guide.PAGES.values():
        assert f"(docs/{path.name})" in readme
    assert os.path.exists(guide.CHINESE)
