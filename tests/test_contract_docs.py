"""The pages in docs/ say what the code says: strategy contract, exit codes, registry keys, formats, ledger reasons."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from vlft import Exporter, ModelSource, ParamGroup, Parts, Strategy, StrategyConfig, VlftError, errors
from vlft.data.formats import FORMATS
from vlft.data.registry import COLUMNS, KEYS, TAGS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CLASSES = {cls.__name__: cls for cls in (Exporter, ModelSource, ParamGroup, Parts, Strategy, StrategyConfig)}


def _page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def _code(text: str) -> list[str]:
    """What stands in backticks, fenced blocks aside."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def _members(cls: type) -> set[str]:
    """Public fields, annotations and methods that `cls` itself defines."""
    own = {name for name in vars(cls) if not name.startswith("_")} | set(inspect.get_annotations(cls))
    if dataclasses.is_dataclass(cls):
        own |= {field.name for field in dataclasses.fields(cls)}
    return own - {"model_config"}


def _arguments(cls: type, member: str) -> list[str]:
    found = inspect.getattr_static(cls, member, None)
    if not inspect.isfunction(found):
        return []
    return [name for name in inspect.signature(found).parameters if name != "self"]


@pytest.mark.parametrize("name", CLASSES)
def test_every_member_and_argument_is_on_the_page(name: str) -> None:
    code = _code(_page("strategy-contract.md"))
    cls = CLASSES[name]
    assert _members(cls), "nothing to compare"
    for member in _members(cls):
        shown = [text for text in code if re.match(rf"{name}\.{member}\b", text)]
        assert shown, f"docs/strategy-contract.md does not mention `{name}.{member}`"
        for argument in _arguments(cls, member):
            assert any(re.search(rf"\b{argument}\b", text) for text in shown), f"{name}.{member}: no `{argument}`"


def test_everything_on_the_page_exists() -> None:
    seen = 0
    for text in _code(_page("strategy-contract.md")):
        match = re.match(r"([A-Z]\w+)\.(\w+)", text)
        if not match or match[1] not in CLASSES:
            continue
        seen += 1
        cls, member = CLASSES[match[1]], match[2]
        assert member in _members(cls), f"`{match[0]}` is on the page but not in the code"
        if call := re.search(r"\((.*)\)", text):
            names = [re.sub(r"^\*+|=.*", "", one.strip()) for one in call[1].split(",") if one.strip()]
            assert names == _arguments(cls, member), f"`{text}` has other arguments in the code"
    assert seen >= 20


def test_every_public_name_is_on_the_page() -> None:
    import vlft

    code = set(_code(_page("strategy-contract.md")))
    assert set(vlft.__all__) <= code


# ---------------------------------------------------------------------------------------------------------------------


def test_exit_codes() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| `(\w+)`", _page("errors.md"), flags=re.MULTILINE))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VlftError)]
    real = {str(kind.exit_code): kind.__name__ for kind in kinds if kind is not errors.RecordError}
    assert rows == real
    assert "`RecordError`" in _page("errors.md")


def _table_after(page: str, heading: str) -> list[str]:
    """First column of the first table below a heading."""
    _, _, rest = page.partition(f"## {heading}\n")
    table = re.search(r"(?:^\|.*\n)+", rest, flags=re.MULTILINE)
    assert table, heading
    return [name for line in table[0].splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


def test_registry_keys() -> None:
    page = _page("data.md")
    assert sorted(_table_after(page, "The registry")) == sorted(KEYS)
    assert {*COLUMNS, *TAGS} <= set(_code(page))


def test_record_formats() -> None:
    assert sorted(_table_after(_page("data.md"), "Record formats")) == sorted(FORMATS)


def _reasons() -> set[str]:
    """Every reason that some line of vlft/data gives a ledger entry."""
    found: set[str] = set()
    for path in (ROOT / "vlft" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name in ("RecordError", "LedgerEntry", "_Rejected"):
                words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]  # type: ignore[attr-defined]
                found |= {word for word in words if isinstance(word, str) and re.fullmatch(r"[a-z]+(_[a-z]+)*", word)}
    return found


def test_ledger_reasons() -> None:
    assert sorted(_table_after(_page("data.md"), "The ledger")) == sorted(_reasons())


_CHECK_AT = {"find": 1, "_find": 1, "_warn": 0, "_error": 0, "grade": 0, "Finding": 2}
"""Functions of vlft/doctor that make a finding, and which argument names its check."""


def test_every_check_of_the_doctor_is_on_its_page() -> None:
    found: set[str] = set()
    for path in (ROOT / "vlft" / "doctor").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            at = _CHECK_AT.get(getattr(node.func, "id", "")) if isinstance(node, ast.Call) else None
            if at is not None and len(node.args) > at and isinstance(node.args[at], ast.Constant):  # type: ignore[attr-defined]
                found.add(str(node.args[at].value))  # type: ignore[attr-defined]
    on_page = {name for line in _page("doctor.md").splitlines() if line.startswith("| ") for name in _code(line)}
    assert len(found) > 40
    assert found - on_page == {"not_looked_at"}  # a consequence of the model's errors


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in _code(text):
        if re.fullmatch(r"(vlft|tests|plugins|docs)/[\w./-]+", path):
            assert (ROOT / path).exists(), f"{page.name} speaks of {path}"
