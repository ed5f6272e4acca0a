"""Plugins are found without being imported, and a bad one is named without hurting the others."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from vlft import discovery
from vlft.errors import StrategyError

Install = Callable[..., Path]

GOOD = """
    from pydantic import Field
    from vlft import StrategyConfig

    class Options(StrategyConfig):
        spice: int = Field(3, ge=0, description="how hot")
        train_vit: bool = False
        def rates(self):
            return {"llm": 1e-4, **({"vit": 1e-5} if self.train_vit else {})}

    class Good:
        '''A fine one.'''
        Config = Options
        def __init__(self, config): ...
        def prepare_model(self, source): ...
        def param_groups(self, model): ...
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install("dist", "1.0", "name = module:attr", module="source")` puts a distribution on sys.path."""

    def put(
        name: str, version: str, entry: str, code: str | None = None, group: str = "vlft.strategies", where: str = ""
    ) -> Path:
        folder = tmp_path / (where or f"site_{name}")
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        if code is not None:
            module = entry.split("=")[1].split(":")[0].strip()
            (folder / f"{module}.py").write_text(textwrap.dedent(code))
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return put


def test_built_ins_are_found_like_anyone_s() -> None:
    found = discovery.find(discovery.STRATEGIES)
    assert {"full", "vit_only", "partial_llm_full_vit", "lora", "lora_llm_full_vit", "qlora"} <= found.keys()
    assert found["full"].distribution == "vlft"
    assert found["full"].others == ()


@pytest.mark.parametrize("name", ["full", "vit_only", "partial_llm_full_vit", "lora", "lora_llm_full_vit", "qlora"])
def test_built_ins_load(name: str) -> None:
    cls, found = discovery.load_strategy(name)
    assert cls(cls.Config()) is not None  # type: ignore[call-arg]
    assert found.source.startswith("vlft ")


def test_finding_imports_nothing(install: Install) -> None:
    install("hot-plugin", "1.2", "hot = hot_module:Good", GOOD)
    assert discovery.find(discovery.STRATEGIES)["hot"] == discovery.Found("hot", "hot_module:Good", "hot-plugin", "1.2")
    assert "hot_module" not in sys.modules
    cls, found = discovery.load_strategy("hot")
    assert cls.__name__ == "Good"
    assert found.source == "hot-plugin 1.2"


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(StrategyError, match=r"no tuning strategy 'qlor' \(the nearest is 'qlora'\); installed: full, "):
        discovery.load_strategy("qlor")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import no_such_library_x", ModuleNotFoundError),
        ("raise RuntimeError('boom')", RuntimeError),
        ("x = 1", AttributeError),
        ("import sys; sys.exit(3)", SystemExit),
        ("def (", SyntaxError),
    ],
)
def test_broken_plugin_is_named_with_its_cause(install: Install, code: str, cause: type[BaseException]) -> None:
    install("bad-plugin", "0.9", "bad = bad_module:Bad", code)
    with pytest.raises(
        StrategyError, match=r"'bad' of bad-plugin 0\.9 \(bad_module:Bad\) cannot be imported"
    ) as caught:
        discovery.load_strategy("bad")
    assert isinstance(caught.value.__cause__, cause)
    discovery.load_strategy("full")


def test_one_name_two_distributions(install: Install) -> None:
    install("one-plugin", "1.0", "twin = one_module:Good", GOOD)
    install("two-plugin", "2.0", "twin = two_module:Good", GOOD)
    with pytest.raises(StrategyError, match="claimed by") as caught:
        discovery.load_strategy("twin")
    assert "one-plugin 1.0 (one_module:Good)" in str(caught.value)
    assert "two-plugin 2.0 (two_module:Good)" in str(caught.value)
    discovery.load_strategy("full")


def test_claiming_a_built_in_name_is_refused(install: Install) -> None:
    install("thief", "1.0", "full = thief_module:Good", GOOD)
    with pytest.raises(StrategyError, match="vlft"):
        discovery.load_strategy("full")
    discovery.load_strategy("lora")


def test_same_distribution_listed_twice_is_no_conflict(install: Install) -> None:
    """An editable install beside its build, with another spelling of the name."""
    install("my-plugin", "1.0", "mine = mine_module:Good", GOOD, where="a")
    install("my_plugin", "1.0", "mine = mine_module:Good", GOOD, where="b")
    assert discovery.find(discovery.STRATEGIES)["mine"].others == ()
    discovery.load_strategy("mine")


BASE = "from vlft import StrategyConfig\nclass C(StrategyConfig):\n    def rates(self): return {'llm': 1.0}\n"
METHODS = "    def prepare_model(self, source): ...\n    def param_groups(self, model): ...\n"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("S = 3", "is no class but int"),
        ("class S: pass", "has no 'Config'"),
        ("class S:\n    Config = dict", "has no 'Config'"),
        (BASE + "class S:\n    Config = C", r"lacks prepare_model\(\) and param_groups\(\)"),
        (BASE + "class S:\n    Config = C\n    def prepare_model(self, s): ...", r"lacks param_groups\(\)"),
        (
            "from vlft import StrategyConfig\nclass S:\n    Config = StrategyConfig\n" + METHODS,
            r"must override rates\(\)",
        ),
        (
            BASE.replace("    def", "    seed: int = 1\n    def") + "class S:\n    Config = C\n" + METHODS,
            "core options",
        ),
    ],
)
def test_contract_is_checked(install: Install, code: str, problem: str) -> None:
    install("lax-plugin", "0.1", "lax = lax_module:S", code)
    with pytest.raises(StrategyError, match=rf"'lax' of lax-plugin 0\.1 \(lax_module:S\) .*{problem}"):
        discovery.load_strategy("lax")


def test_unreadable_metadata_hurts_nobody(install: Install) -> None:
    folder = install("odd-plugin", "1.0", "odd = odd_module:Good", GOOD)
    next(folder.glob("*.dist-info/METADATA")).unlink()
    assert discovery.find(discovery.STRATEGIES)["odd"].value == "odd_module:Good"
    discovery.load_strategy("full")


def test_inspect_reports_each(install: Install) -> None:
    install("bad-plugin", "0.9", "bad = bad_module:Bad", "raise RuntimeError('boom')")
    install("one-plugin", "1.0", "twin = one_module:Good", GOOD)
    install("two-plugin", "2.0", "twin = two_module:Good", GOOD)
    install("hot-plugin", "1.2", "hot = hot_module:Good", GOOD)
    install("sums", "1.0", "sums = sums_module:evaluate", "evaluate = 3", group="vlft.metrics")
    state = {one.found.name: (one.state, one.detail) for one in discovery.inspect()}
    assert state["hot"] == ("ok", "A fine one.")
    assert state["bad"][0] == "broken"
    assert "boom" in state["bad"][1]
    assert state["twin"][0] == "conflict"
    assert state["full"][0] == "ok"
    assert state["sums"][0] == "broken"


def test_metrics(install: Install) -> None:
    install(
        "sums", "1.0", "sums = sums_module:evaluate", "def evaluate(predictions): return {'x': 1.0}", "vlft.metrics"
    )
    function, found = discovery.load_metric("sums")
    assert function([]) == {"x": 1.0}
    assert found.source == "sums 1.0"
    with pytest.raises(StrategyError, match="no evaluation script 'sum'"):
        discovery.load_metric("sum")
