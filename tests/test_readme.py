"""The README does what it says: its plugin conforms and trains, its lines parse; the run folder is as documented."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import write_run
from runs import command, environment, start, write_data

from demo.draw import write_demo
from vlft.commands import COMMANDS, parse_command, plugins_table
from vlft.manual import help_text
from vlft.parse import parse
from vlft.testing import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_FOLDER = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for written, text in blocks if written == language]


# ---------------------------------------------------------------------------------------------------------------------
# The command lines


def _command_lines() -> list[list[str]]:
    """The words of every line of the README that starts vlft, what stands before and including `vlft` left out."""
    found = []
    for block in _blocks(""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["accelerate", "launch"]:
                found.append(words[words.index("vlft") + 1 :])
            elif words[:1] == ["vlft"]:
                found.append(words[1:])
    return found


def test_there_are_command_lines() -> None:
    strategies = {
        words[words.index("--tuning_strategy") + 1] for words in _command_lines() if "--tuning_strategy" in words
    }
    assert strategies == {"qlora", "lora", "lora_llm_full_vit", "partial_llm_full_vit", "vit_only", "full"}


@pytest.mark.parametrize("words", _command_lines(), ids=lambda words: " ".join(words)[:60])
def test_command_line_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "qlora" / "model").mkdir(parents=True)
    (tmp_path / "output" / "qlora" / "run.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "a/b", "output_dir": "output/qlora", "tuning_strategy": "qlora"})
    )
    (tmp_path / "output" / "invoices-7b").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0001.png").touch()
    if words[0] == "export":
        (tmp_path / "output" / "invoices-7b").rmdir()  # not made yet
    if words[0] == "merge":
        assert parse_command(COMMANDS["merge"], words[1:]).model == Path("output/qlora/model")
    elif words[0] in ("export", "verify", "chat"):
        options = parse_command(COMMANDS[words[0]], words[1:])
        assert options.model == words[1]
        assert {w.removeprefix("--") for w in words if w.startswith("--")} <= options.model_fields_set
    elif words[0] == "eval":
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "dataset_config.json").touch()
        options = parse_command(COMMANDS["eval"], words[1:])
        assert (options.model, options.output_dir) == ("output/qlora/model", Path("output/qlora/eval/model"))
    elif words[0] == "doctor":
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "dataset_config.json").write_text('{"datasets": {"invoices": {"json_path": "a"}}}')
        options = parse_command(COMMANDS["doctor"], words[1:])
        assert {w.removeprefix("--") for w in words if w.startswith("--")} <= options.model_fields_set
    elif words == ["plugins"]:
        assert "exact_match" in plugins_table()
    elif "--help" in words:
        assert "--lora_rank" in help_text(words)
    else:
        run = parse(words, start=False)
        flags = {word.removeprefix("--").removeprefix("no-") for word in words if word.startswith("--")} - {"config"}
        known = run.config.model_fields_set | run.options.model_fields_set
        assert flags <= known, "every flag of the line reached an option"


@pytest.mark.slow
def test_the_newcomer_s_path(tmp_path: Path) -> None:
    """The bash blocks of README, run as they stand, but for the activation: from twenty pictures to an answer."""
    text = "set -e\n" + "".join(_blocks("bash"))
    text = text.replace(". .venv/bin/activate", f'export PATH="{Path(sys.executable).parent}:$PATH"')
    write_demo(tmp_path / "runs/demo/data", 8, 20)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    write_run(tmp_path / "runs/demo/run")
    env = environment(VLFT_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "runs/mine/merged says what step" in done.stdout
    assert len(done.stdout.rsplit("answers and values: ", 1)[1].splitlines()) >= 2, "the chat's answer comes last"
    assert "<svg" in (tmp_path / "runs/mine/report.html").read_text()
    assert (tmp_path / "runs/comparison.html").exists()
    assert not re.search(r"Warning|WARNING|Traceback", done.stderr), "a newcomer reads every line"


def test_launcher_s_files_are_there() -> None:
    """In a checkout under the path that the README gives; `vlft --help` ends with their folder anywhere else."""
    named = re.findall(r"--config_file (\S+\.yaml)", README)
    assert named
    assert all((ROOT / name).is_file() for name in named)
    listed = set(re.search(r"`accelerate_configs/` \(([^)]*)\)", README)[1].replace("`", "").split(", "))  # type: ignore[index]
    assert listed == {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert help_text().splitlines()[-1].strip() == str(ROOT / "accelerate_configs")


def test_what_the_text_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of the Qwen authors trains the LLM and the projector, and not the vision tower."""
    (line,) = [words for words in _command_lines() if "--no-train_vit" in words]
    assert set(parse(line, start=False).rates) == {"llm", "projector"}


# ---------------------------------------------------------------------------------------------------------------------
# The plugin in 30 lines, and the folder that its run leaves


def _environment(site: Path) -> dict[str, str]:
    return environment(PYTHONPATH=os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's three files side by side, as a reader has them."""
    folder = tmp_path_factory.mktemp("norms")
    source, test = _blocks("python")
    (settings,) = _blocks("toml")
    for name, text in (("norms.py", source), ("test_norms.py", test), ("pyproject.toml", settings)):
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip installed the README's plugin; nothing is installed into this environment."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--target", str(folder), "."], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_plugin_is_thirty_lines() -> None:
    source = _blocks("python")[0]
    assert len([line for line in source.splitlines() if line.strip()]) <= 30


def test_the_plugin_conforms(project: Path, site: Path) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."]
    done = subprocess.run(words, cwd=project, capture_output=True, text=True, check=False, env=_environment(site))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 passed" in done.stdout


@pytest.fixture(scope="module")
def finished(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the README's plugin with an evaluation, a bad record and checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    base = make_checkpoint("qwen2_5_vl", folder / "base")
    registry = write_data(folder / "data", 16)
    bad = {"id": "bad", "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "no"}]}
    with (registry.parent / "toy.jsonl").open("a") as out:
        out.write(json.dumps({**bad, "images": ["absent.png"]}) + "\n")
    words = command(
        base, registry, folder / "out", "norms", max_steps=3, save_steps=2, eval_steps=2, train_split_ratio=0.8,
        max_bad_fraction=0.2, eval_dataset_scripts="toy:exact_match", train_projector=True,
        report=True,
    )  # fmt: skip
    said = start(words, PYTHONPATH=_environment(site)["PYTHONPATH"]).stdout
    assert "norms from norms 0.1.0" in said
    assert " proved " in said
    return folder / "out"


def _documented(heading: str, column: int = 0) -> list[str]:
    """What stands in backticks in a column of the tables below a heading, up to the next heading."""
    _, _, rest = RUN_FOLDER.partition(f"## {heading}\n")
    section = rest.split("\n## ")[0]
    rows = [line.split("|")[1:] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[column])]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_run_folder_files(finished: Path) -> None:
    tree = re.search(r"```\n(output_dir/.*?)```", RUN_FOLDER, flags=re.DOTALL)
    assert tree
    documented = {line.strip().split("/")[0] for line in tree[1].splitlines()[1:]}
    assert {path.name for path in finished.iterdir()} == documented - {
        "base",
        "budget.json",
        "best.json",
        "trackers.json",
        "tensorboard",
    }
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert [p.name for p in (finished / "eval" / "step-000002").iterdir()] == ["toy.jsonl"]


def test_run_card(finished: Path) -> None:
    assert list(json.loads((finished / "run_card.json").read_text())) == _documented("run_card.json")


def test_metrics(finished: Path) -> None:
    _, _, rest = RUN_FOLDER.partition("## metrics.jsonl\n")
    kinds = dict(re.findall(r"^\| `([^`]+)` \| (\w+) \|", rest.split("\n## ")[0], flags=re.MULTILINE))
    perf = set(
        re.findall(r"`(\w+_\w+)`", rest.split("In `perf` of a train line:")[1].split("In `perf` of an eval line:")[0])
    )  # `mfu` is of a GPU
    lines = _lines(finished / "metrics.jsonl")
    assert {line["kind"] for line in lines} == {"train", "eval"}
    for line in lines:
        own = {re.sub(r"^eval/toy/exact_match/\w+$", "eval/<dataset>/<script>/<metric>", key) for key in line}
        own = {key.replace("eval/toy/loss", "eval/<dataset>/loss") for key in own}
        assert own == {key for key, kind in kinds.items() if kind in ("both", line["kind"])} - {"failed"}
        assert set(line["perf"]) == (perf if line["kind"] == "train" else {"eval_seconds"})
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 3]
    assert set(lines[1]["learning_rate"]) == {"llm", "projector"}
    assert lines[1]["padding"] == 0
    assert lines[1]["dataset_loss"] == {"toy": pytest.approx(lines[1]["loss"])}


def test_data(finished: Path) -> None:
    about = json.loads((finished / "data.json").read_text())
    assert list(about) == _documented("data.json")
    assert about["unused"] == {"image_missing": 1}
    counts = about["datasets"]["toy"]
    assert counts["train"] + counts["held_out"] == 16 == sum(about["tokens"]["counts"])
    gallery = json.loads((finished / "gallery" / "gallery.json").read_text())
    assert list(gallery) == ["schema", "boxes", "samples"]
    assert all((finished / "gallery" / p["file"]).is_file() for s in gallery["samples"] for p in s["pictures"])


def test_ledger(finished: Path) -> None:
    (line,) = _lines(finished / "ledger.jsonl")
    assert list(line) == _documented("ledger.jsonl")
    assert line["reason"] == "image_missing"


def test_checkpoint(finished: Path) -> None:
    folder = finished / "checkpoints" / "step-000003"
    state = json.loads((folder / "state.json").read_text())
    names = _documented("checkpoints/")
    assert {path.name for path in folder.iterdir()} == {n for n in names if "." in n}
    assert set(state) == {n for n in names if "." not in n}
    assert state["options"] == yaml.safe_load((finished / "run.yaml").read_text())
    assert set(state["files"]["weights-000-00.safetensors"]) == {"bytes", "xxh3_128"}


def test_predictions(finished: Path) -> None:
    lines = _lines(finished / "eval" / "step-000003" / "toy.jsonl")
    assert lines
    assert all(list(line) == _documented("eval/") for line in lines)


def test_model(finished: Path) -> None:
    patterns = [n for n in _documented("model/") if "." in n or "*" in n]
    unknown = [p.name for p in (finished / "model").iterdir() if not any(p.match(pattern) for pattern in patterns)]
    # "the checkpoint's own": what the base has of these.
    assert set(unknown) <= {"generation_config.json", "video_preprocessor_config.json"}
    meta = json.loads((finished / "model" / "vlft.json").read_text())
    keys = [n for n in _documented("model/") if n in (*meta, "merged_onto")]
    assert keys == [*meta, "merged_onto"]


def test_run_yaml(finished: Path) -> None:
    run = yaml.safe_load((finished / "run.yaml").read_text())
    assert run["schema"] == 1
    assert run["train_projector"] is True
    assert run["resume_from_checkpoint"] is None
    assert run["learning_rate_llm"] == 1e-3
