"""The report and the doctor's page in a browser: no complaint, nothing loaded, no sideways scrolling, axe content.

`make browser` installs what this needs and runs it (Debian's chromium; axe-core from npm into build/axe, which git
ignores). With VLFT_SCREENSHOTS=FOLDER the pages are photographed there as well.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doctor_data import ALONE, FAULTS, clean

from vlft import report
from vlft.commands import read_doctor
from vlft.doctor.examine import examine
from vlft.doctor.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(__file__).resolve().parents[2] / "build" / "axe" / "package" / "axe.min.js"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WIDTHS = (1280, 768, 390)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; `make browser` installs it")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here; `make browser` installs it")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def _crowded(root: Path) -> Path:
    """Many data sets with long names, and an answer without a space in it."""
    root.mkdir()
    names = [f"{'data_set_' * 6}{i}" for i in range(8)]
    losses = {f"eval/{name}/loss": 1.0 for name in names}
    lines = [{"step": s, "kind": k, "loss": 1.0, **losses} for s in (1, 2) for k in ("train", "eval")]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "run.yaml").write_text(f"schema: 1\nmodel_name_or_path: {root}\n")
    (root / "run_card.json").write_text(json.dumps({"command": ["vlft", "--model_name_or_path", str(root) * 3]}))
    (root / "ledger.jsonl").write_text(json.dumps({"dataset": names[0], "id": "i" * 200, "reason": "r" * 90}) + "\n")
    (root / "gallery").mkdir()
    sample = {"dataset": names[0], "id": "x" * 99, "question": "q" * 300, "reference": "r" * 900, "pictures": []}
    (root / "gallery" / "gallery.json").write_text(json.dumps({"samples": [sample]}))
    return root


def _doctor(folder: Path, model: Path, *, faults: bool) -> Path:
    """A page of `vlft doctor`, with a finding of every kind or with none."""
    made = clean(folder)
    if faults:
        for fault in FAULTS:
            if fault not in ALONE:
                fault(made)
        made.sets["data_set_" * 9] = made.sets.pop("held")
        made.specs["data_set_" * 9] = {"split": "eval"}
        made.sets["train"][70]["messages"][1]["content"] = "x" * 900
        made.words.pop("eval_dataset_scripts")
    words = ["--model_name_or_path", str(model), "--dataset_config_path", str(made.write()), "--num_workers", "0"]
    words += ["--cache_dir", str(folder / "cache")]
    for name, value in made.words.items():
        words += [f"--{name}", str(value)]
    return report.write_page(render(examine(read_doctor(words))), folder / "doctor.html")


@pytest.fixture(scope="module")
def pages(a_run: Path, other_run: Path, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    bare = folder / "bare"
    bare.mkdir()
    (bare / "run.yaml").write_text("schema: 1\n")
    crowded = [_crowded(folder / f"a-run-with-{'a-long-name-' * 8}{i}") for i in range(5)]
    return {
        "crowded": report.compare(crowded, folder / "crowded.html"),
        "crowded-run": report.write(crowded[0]),
        "run": report.write(a_run),
        "comparison": report.compare([a_run, other_run], folder / "comparison.html"),
        "bare": report.write(bare),
        "no-go": _doctor(folder / "no-go", tiny("qwen2_5_vl"), faults=True),
        "go": _doctor(folder / "go", tiny("qwen3_vl"), faults=False),
    }


class Visit:
    """A page, and everything that the browser complained about or asked the network for."""

    def __init__(self, browser: Any, path: Path, scheme: str, width: int) -> None:
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "comparison", "bare", "crowded", "crowded-run", "no-go", "go"])
def test_quiet_alone_and_within_its_width(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    for width in WIDTHS:
        with Visit(browser, pages[name], scheme, width) as visit:
            assert visit.complaints == []
            assert [r for r in visit.requests if not r.startswith("data:")] == [pages[name].as_uri()]
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
            boxes = "[...document.querySelectorAll('main :not(.scroll *)')]"  # a wide table may scroll inside its card
            out = f"{boxes}.filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
            assert visit.page.evaluate(f"{out}.map(e => e.outerHTML.slice(0, 80))") == []
            if folder := os.environ.get("VLFT_SCREENSHOTS"):
                visit.page.screenshot(path=f"{folder}/{name}-{scheme}-{width}.png", full_page=True)


def test_colours_follow_the_scheme(browser: Any, pages: dict[str, Path]) -> None:
    """The same drawing: its lines have other colours on the dark page, and the page's own on paper."""
    ask = "getComputedStyle([...document.querySelectorAll('.plot path')].find(p => /tone-1/.test(p.outerHTML))).stroke"
    with Visit(browser, pages["run"], "light", 1280) as light, Visit(browser, pages["run"], "dark", 1280) as dark:
        found = light.page.evaluate(ask), dark.page.evaluate(ask)
        assert found == ("rgb(31, 95, 168)", "rgb(130, 182, 247)")
        dark.page.emulate_media(media="print")
        assert dark.page.evaluate(ask) == found[0]


def test_boxes_can_be_hidden(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["run"], "light", 1280) as visit:
        seen = "getComputedStyle(document.querySelector('rect.mark.before')).display"
        assert visit.page.evaluate(seen) != "none"
        visit.page.uncheck("#show-before")
        assert visit.page.evaluate(seen) == "none"
        assert visit.page.evaluate(seen.replace("before", "reference")) != "none"


def test_pictures_are_decoded(browser: Any, pages: dict[str, Path]) -> None:
    """The content security policy lets them through."""
    with Visit(browser, pages["run"], "light", 1280) as visit:
        widths = visit.page.evaluate("[...document.images].map(i => i.naturalWidth)")
        assert len(widths) == 7
        assert all(widths)


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core in build/axe; `make browser` fetches it")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "comparison", "bare", "no-go", "go"])
def test_axe_finds_nothing(browser: Any, pages: dict[str, Path], name: str, scheme: str, width: int) -> None:
    """All rules of axe-core, everything that can be opened being open."""
    with Visit(browser, pages[name], scheme, width) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        visit.page.evaluate(AXE.read_text(encoding="utf-8"))
        found = visit.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []
        assert len(found["passes"]) > 15
