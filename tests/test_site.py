"""The site: every page is in its navigation, the API page shows the public names, a build is without warnings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import vlft
import vlft.testing

ROOT = Path(__file__).resolve().parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for one in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(one)]


def test_the_navigation_names_every_page() -> None:
    named = _pages(SITE["nav"])
    assert len(named) == len(set(named))
    missing = sorted({path.name for path in (ROOT / "docs").glob("*.md")} - set(named))
    assert not missing, f"mkdocs.yml's nav does not name docs/{', docs/'.join(missing)}"
    # README is the first page; others outside of docs/ keep their paths.
    assert all((ROOT / "docs" / page).exists() or (ROOT / page).exists() for page in set(named) - {"index.md"})
    assert SITE["strict"] is True


def test_the_api_page_shows_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)}
    # The errors come as a whole module; FAMILIES is a table of data.
    assert {*vlft.__all__, *vlft.testing.__all__} - shown == {"VlftError", "FAMILIES"}
    assert "errors" in shown


def test_what_the_site_is_built_with_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^docs = (.*)$", project, flags=re.MULTILINE)
    assert extra
    for name in re.findall(r'"([a-z-]+)', extra[1]):
        assert re.search(rf"^{name}==", pins, flags=re.MULTILINE), f"constraints.txt does not pin {name}"


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the site's packages are the extra `docs`")
    words = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prepare_model" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
