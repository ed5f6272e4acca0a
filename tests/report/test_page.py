"""The page: whole, without a network, safe with hostile texts, the same each time, quick."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from report_runs import write_run
from runs import command, train, write_data

from vlft import report
from vlft.errors import CheckpointError, ConfigError
from vlft.report.page import differing_options, duration, labels
from vlft.report.read import read

_VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = """"><script>alert(1)</script><img src=x onerror=alert(2)>'{{ 7*7 }}$\\frac$"""

_WORDS = (
    "invoices", "total", "1,284.50 EUR", "image_missing", "images/0119.png is not there.", "exact_match", "gasket",
    "NVIDIA H100 80GB HBM3", "kornia", "screw", "vit", "llm",
)  # fmt: skip


class Page(HTMLParser):
    """Collects elements, and fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(a_run: Path) -> str:
    return report.write(a_run).read_text()


def test_it_is_well_formed_and_ids_are_unique(page: str, a_run: Path, other_run: Path, tmp_path: Path) -> None:
    for text in (page, report.compare([a_run, other_run], tmp_path / "both.html").read_text()):
        ids = [attrs["id"] for _, attrs in Page(text).elements if "id" in attrs]
        assert len(ids) == len(set(ids))
        known = set(ids)
        for _, attrs in Page(text).elements:
            if (attrs.get("href") or "").startswith("#"):
                assert (attrs["href"] or "")[1:] in known


def test_nothing_is_loaded(page: str) -> None:
    for tag, attrs in Page(page).elements:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        for key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attrs.get(key)
            assert value is None or value.startswith(("#", "data:image/jpeg;base64,", "data:,")), (tag, key, value)
        assert not any(key.startswith("on") for key in attrs)
    assert not re.search(r"url\((?!#)|@import|https?://", page)
    assert "default-src 'none'" in page


def test_what_it_says(page: str) -> None:
    text = Page(page).text
    for words in (
        "Qwen/Qwen2.5-VL-7B-Instruct", "NVIDIA H100 80GB HBM3", "Step 240 of 240, finished", "torch 2.13.0",
        "float32, bfloat16", "Seen to train: vit, projector, llm", "Train loss", "Best box_iou/mean_iou on parts",
        "Tokens per second", "Peak memory", "Duration", "Samples not used", "of 13,474", "Which checkpoint",
        "Train loss by data set", "Held-out loss", "Held-out exact_match", "Learning rate by part",
        "Gradient norm by part", "Model FLOPs utilisation", "Tokens of a sample", "Size of a picture", "on disk",
        "inv-0119: images/0119.png is not there.", "--lora_rank 64", "Before training", "same as the reference",
    ):  # fmt: skip
        assert words in text, words


def test_boxes_are_drawn_where_they_lie(page: str) -> None:
    """The gasket's reference is (180,260),(520,700) in thousandths of 1120 x 840; the screw's is JSON with a label."""
    rects = [a for tag, a in Page(page).elements if tag == "rect" and "over reference" in (a.get("class") or "")]
    corners = [tuple(float(r[k] or 0) for k in ("x", "y", "width", "height")) for r in rects]
    assert corners[0] == (201.6, 218.4, 380.8, 369.6)
    kinds = {a.get("class") for tag, a in Page(page).elements if tag == "rect"}
    assert kinds >= {"mark over reference", "mark over before", "mark over after-1", "mark under reference"}
    assert "Reference: screw" in Page(page).text
    assert re.search(r"IoU 0\.9\d", page)


def test_boxes_in_pixels(a_run: Path, tmp_path: Path) -> None:
    root = write_run(tmp_path / "pixels", steps=24)
    path = root / "gallery" / "gallery.json"
    path.write_text(path.read_text().replace("relative1000", "resized_pixels"))
    rects = [a for tag, a in Page(report.write(root).read_text()).elements if tag == "rect"]
    first = next(r for r in rects if r.get("class") == "mark over reference")
    assert [float(first[k] or 0) for k in ("x", "y", "width", "height")] == [180, 260, 340, 440]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """Every text of a run comes from somebody's data: names, ids, messages, answers, options."""
    root = write_run(tmp_path / "run", steps=24)
    for path in [*root.rglob("*.json"), *root.rglob("*.jsonl"), root / "run.yaml"]:
        text = path.read_text()
        if path.name == "run.yaml":
            options = yaml.safe_load(text)
            text = yaml.safe_dump(options | {"model_name_or_path": HOSTILE, HOSTILE: HOSTILE})
        for word in _WORDS:
            text = text.replace(json.dumps(word)[1:-1], json.dumps(HOSTILE + word)[1:-1])
        path.write_text(text)
    for text in (report.write(root).read_text(), report.compare([root, root], tmp_path / "both.html").read_text()):
        found = Page(text)
        assert {tag for tag, _ in found.elements}.isdisjoint({"script", "iframe"})
        assert not any(key.startswith("on") for _, attrs in found.elements for key in attrs)
        assert all((a.get("src") or "data:").startswith("data:") for _, a in found.elements)
        assert "<script>alert(1)" in found.text
        assert "49" not in re.findall(r"onerror=alert\(2\)>'(..)", found.text)


def test_half_surrogates_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"dataset": "a", "id": "\\udcff", "reason": "x", "message": "\\ud800"}\n')
    (tmp_path / "metrics.jsonl").write_text("")
    assert "a/?" in report.write(tmp_path).read_text()


def test_twice_the_same(a_run: Path, other_run: Path, tmp_path: Path) -> None:
    assert report.write(a_run).read_bytes() == report.write(a_run).read_bytes()
    both = [report.compare([a_run, other_run], tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert both[0] == both[1]


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_run_that_has_just_begun(tmp_path: Path, lines: int) -> None:
    (tmp_path / "run.yaml").write_text("schema: 1\n")
    step = {
        "schema": 1,
        "kind": "train",
        "loss": 1.0,
        "tokens": 10,
        "perf": {"step_seconds": 1.0, "peak_memory_gib": 1},
    }
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step | {"step": i + 1}) + "\n" for i in range(lines)))
    text = Page(report.write(tmp_path).read_text()).text
    assert "no result in model/ yet" in text
    assert "Every sample is used." in text


def test_a_real_run(tiny, tmp_path: Path) -> None:
    """What train writes today is what the report reads."""
    registry = write_data(tmp_path / "data", 24)
    words = command(tiny(), registry, tmp_path / "run", "full", max_steps=4, eval_steps=2, train_split_ratio=0.8)
    train(words)
    text = Page(report.write(tmp_path / "run").read_text()).text
    for wanted in ("Step 4 of 4, finished", "Seen to train: ", "Held-out loss on toy", "Learning rate by part"):
        assert wanted in text, wanted


def test_comparison(a_run: Path, other_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "both.html"
    assert report.compare([a_run, other_run], output) == output
    text = Page(output.read_text()).text
    for words in (
        "lora-64 and full-vit", "Final and best figures", "Options that differ", "Held-out box_iou/mean_iou on parts",
        "Gradient norm: vit", "Train loss: parts", "full-vit, step",
    ):  # fmt: skip
        assert words in text, words


def test_options_that_differ(a_run: Path, other_run: Path) -> None:
    rows = {row.head: row.cells for row in differing_options([read(a_run), read(other_run)])}
    assert rows == {
        "tuning_strategy": ("lora_llm_full_vit", "vit_only"),
        "learning_rate_vit": ("2e-06", "1e-05"),
        "lora_rank": ("64", "null"),
    }


def test_an_option_that_one_run_does_not_have(tmp_path: Path) -> None:
    for name, options in (("a", {"lora_rank": None}), ("b", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(yaml.safe_dump(options | {"seed": 1}))
    rows = differing_options([read(tmp_path / n) for n in "ab"])
    assert [(row.head, row.cells) for row in rows] == [("lora_rank", ("null", "–"))]


def test_names_of_runs(tmp_path: Path) -> None:
    roots = [tmp_path / "x" / "out", tmp_path / "y" / "out", tmp_path / "y" / "out"]
    for root in roots:
        root.mkdir(parents=True, exist_ok=True)
        (root / "run.yaml").write_text("{}")
    runs = [read(root) for root in roots]
    assert labels(runs[:1]) == ["out"]
    assert labels(runs[:2]) == ["x/out", "y/out"]
    assert labels(runs) == ["x/out", "y/out (2)", "y/out (3)"]


def test_many_runs_and_data_sets(tmp_path: Path) -> None:
    """More than there are colours."""
    roots = []
    for r in range(10):
        roots.append(tmp_path / f"run-{r}")
        roots[-1].mkdir()
        lines = [
            {
                "step": s,
                "kind": kind,
                **({f"eval/d{i}/loss": 1.0 for i in range(12)} if kind == "eval" else {"loss": 1.0}),
            }
            for s in (1, 2)
            for kind in ("train", "eval")
        ]
        (roots[-1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Page(report.write(roots[0]).read_text())
    assert "10 runs compared" in Page(report.compare(roots, tmp_path / "all.html").read_text()).text


def test_the_gallery_is_shared_between_data_sets(tmp_path: Path) -> None:
    """Not the first forty-eight, which would all be of the first data set."""
    samples = [{"dataset": d, "id": f"{d}-{i}", "question": "q", "reference": "r"} for d in "abc" for i in range(60)]
    (tmp_path / "run.yaml").write_text("{}")
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "gallery.json").write_text(json.dumps({"samples": samples}))
    text = report.write(tmp_path).read_text()
    assert [text.count(f'<p class="source">{d} · ') for d in "abc"] == [16, 16, 16]


def test_a_script_that_could_not_score_is_named(tmp_path: Path) -> None:
    lines = [{"kind": "eval", "step": 1, "eval/a/loss": 1.0, "failed": {"a/bleu": "ZeroDivisionError: <b>"}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Could not score: a/bleu (ZeroDivisionError: <b>)." in Page(report.write(tmp_path).read_text()).text


def test_errors(tmp_path: Path, a_run: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run"):
        report.compare([], tmp_path / "x.html")
    with pytest.raises(ConfigError, match="not the folder of a run"):
        report.compare([a_run, tmp_path], tmp_path / "x.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        report.compare([a_run], tmp_path / "file" / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_ten_thousand_steps(tmp_path: Path) -> None:
    """Seconds of this process, which neighbours do not stretch; 3 is the promise, imports included."""
    root = write_run(tmp_path / "long", steps=10_000)
    began = time.process_time()
    path = report.write(root)
    assert time.process_time() - began < 3
    assert path.stat().st_size < 2**20


@pytest.mark.parametrize(
    ("spent", "text"), [(0.62, "0.6 s"), (59.96, "1 min 00 s"), (3599.9, "1 h 00 min"), (7380, "2 h 03 min")]
)
def test_durations(spent: float, text: str) -> None:
    assert duration(spent) == text
