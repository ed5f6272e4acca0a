"""The benches run, on a tiny model; what they say of time is nobody's business here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import environment

BENCH = Path(__file__).resolve().parents[1] / "bench"


def run(script: str, *words: object, limit: float = 200) -> list[str]:
    line = [sys.executable, str(BENCH / script), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=limit, check=False)
    assert not done.returncode, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_row_gives_a_line_and_the_line_a_table(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 4, "--workers", 0, "--root", tmp_path / "root")
    batch = ("--option", "per_device_train_batch_size=1", "gradient_accumulation_steps=2")
    steps = ("--steps", 2, "--warm", 1, "--out", tmp_path / "out")
    (text,) = run("train.py", "--rows", "3B-lora", *tiny, *steps, *batch)
    line = json.loads(text)
    assert "error" not in line, line["error"]
    assert line["steps"] == line["samples_per_step"] == 2
    assert line["formula_over_count"] == 1.0, "two counts of the same FLOPs"
    assert {line[name] for name in ("weights", "gradients", "states")} == {"float32"}
    assert "| 3B `lora_llm_full_vit` | fp32 / fp32 / fp32 |" in "\n".join(run("table.py", tmp_path / "out/lines.jsonl"))


@pytest.mark.slow
def test_one_rank_of_several_trains_its_share(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 16, "--workers", 0, "--root", tmp_path / "root")
    steps = ("--steps", 2, "--warm", 1, "--batch", 2, "--ranks", 4, "--out", tmp_path / "out")
    one, *others = map(json.loads, run("one_rank.py", *tiny, *steps, "--layouts", "one,ddp,zero2,zero3"))
    assert [line["layout"] for line in others] == ["ddp", "zero2", "zero3"]
    assert one["ranks"] == one["of_one"] == 1
    for line in others:
        assert "error" not in line, line["error"]
        assert line["ranks"] == 4
        assert line["samples_per_step"] == 2
        assert line["of_one"] > 0
        assert line["trained_parameters"] == one["trained_parameters"]


@pytest.mark.slow
def test_a_row_that_fails_gives_a_line_with_its_error(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 4, "--workers", 0, "--root", tmp_path / "root")
    (text,) = run("train.py", "--rows", "3B-lora", *tiny, "--out", tmp_path, "--option", "no_such_option=1")
    assert "no_such_option" in json.loads(text)["error"]


def test_idle_spans_between_steps_are_those_in_which_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from profiling import shares

    kernels = [(0.0, 5.0), (6.0, 10.0), (11.0, 20.0), (12.0, 13.0), (22.0, 30.0)]
    found = shares(kernels, [0.0, 10.5, 21.0, 30.0])
    # 4 of 30 idle, 3 of them around the two borders; the third step's border is cut off.
    assert found == {"gpu_busy": round(26 / 30, 4), "gpu_idle_between": round(3 / 30 * 3 / 2, 4)}


@pytest.mark.slow
def test_the_host_s_work_is_that_of_the_code_of_a_gpu() -> None:
    pytest.importorskip("triton")
    repository = BENCH.parent
    states = ("--checkout", repository, "--checkout", repository)
    first, second = map(json.loads, run("host.py", "--rows", "3B-full-bf16", "--repeat", 5, "--processes", 1, *states))
    assert first["layers"] == 32 + 36
    # A layer's two norms, activation and rotation (in windows: attention too), forward and backward; the norms a second
    # time and their gradients' sums; those of biases, of two launches each, of which a language layer has one. Cross
    # entropy, forward and backward.
    assert first["kernels_of_triton"] == second["kernels_of_triton"] == 12 * 68 + 2 * (4 * 32 + 36) + 2
    assert "over_the_first" not in first
    assert second["over_the_first"] > 0


@pytest.mark.slow
def test_augmentation_s_share_of_a_step(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 4, "--workers", 0, "--root", tmp_path / "root")
    lines = run("augmentation.py", *tiny, "--steps", 1, "--warm", 1, "--out", tmp_path, "--policies", "none,geometric")
    none, moved = (json.loads(line) for line in lines[:2])
    assert 0 < none["share"] < moved["share"] < 1
    assert moved["worker_ms"] > 0
    assert lines[-1].startswith("| `geometric` |")


def test_the_study_s_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from augmentation_study import table, word_picture

    shares = {("none", 1): 0.5, ("none", 2): 0.6, ("geometric", 1): 0.7, ("geometric", 2): 0.7}
    lines = [{"arm": a, "seed": s, "held_out": x, "held_out_words": 0.5} for (a, s), x in shares.items()]
    rows = table(lines, ["none", "geometric"]).splitlines()
    assert rows[2] == "| shapes: colour, number | none | 50.0% | 60.0% | 55.0% | 7.1% |  |"
    assert rows[3].endswith("| 70.0% | 70.0% | 70.0% | 0.0% | +15.0% (+10.0% to +20.0%) |")
    assert word_picture(3)[0].tobytes() == word_picture(3)[0].tobytes()


@pytest.mark.slow
def test_predictions_beside_measurements(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 12, "--workers", 0, "--root", tmp_path / "root")
    steps = ("--steps", 1, "--warm", 1, "--out", tmp_path / "out", "--shapes", "1x1,2x2")
    lines = [json.loads(line) for line in run("planning.py", "--rows", "3B-lora,7B-full", *tiny, *steps)]
    assert [line.get("error") for line in lines] == [None] * 4
    assert [(line["row"], line["shape"]) for line in lines] == [
        ("3B-lora", "1x1"), ("3B-lora", "2x2"), ("7B-full", "1x1"), ("7B-full", "2x2")
    ]  # fmt: skip
    for line in lines:
        for what, unit in (("peak", "gib"), ("step", "s")):
            predicted, found = line[f"predicted_{what}_{unit}"], line[f"measured_{what}_{unit}"]
            assert line[f"{what}_error_percent"] == pytest.approx(100 * (predicted / found - 1), abs=1)
    assert lines[1]["tokens_of_largest_row"] > lines[0]["tokens_of_largest_row"]


def test_an_unknown_row_of_predictions_is_told(tmp_path: Path) -> None:
    line = [sys.executable, str(BENCH / "planning.py"), "--rows", "9B-lora"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    assert "unknown rows: 9B-lora; there are 3B-full" in done.stderr


@pytest.mark.slow
def test_two_processes_send_beside_products() -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    line += [str(BENCH / "beside.py"), "--device", "cpu", "--mib", "1", "--rounds", "1", "--tokens", "8"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert not done.returncode, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["way"] for line in lines] == ["all_gather", "all_to_all"]
    # Nine sendings of half a unit of 1 MiB, from one other process.
    assert {line["gb"] for line in lines} == {round(9 * 2**19 / 1e9, 6)}


@pytest.mark.slow
def test_two_processes_train_lose_one_and_go_on(tmp_path: Path) -> None:
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 12, "--workers", 0, "--root", tmp_path / "root")
    # A rank is killed in one of the `more` steps: on a busy machine these must not be over before it is.
    steps = ("--steps", 3, "--warm", 1, "--more", 30, "--batch", 2, "--out", tmp_path / "out")
    alone, _ = run("scaling.py", "--rows", "3B-lora-ddp-4", "--parts", "one", "--gpus", 2, *tiny, *steps)
    assert json.loads(alone)["part"] == "one GPU"
    said = run("scaling.py", "--rows", "3B-lora-ddp-4", "--parts", "speed,course", *tiny, *steps, limit=400)
    *lines, last = said
    found = {(line["part"], line.get("gpus")): line for line in map(json.loads, lines)}
    assert last.startswith("left: none;"), last
    assert len(lines) == len(
        found
    )  # the one GPU of `speed` is known; of `course`, with as many samples as two, it is not
    assert list(found) == [("one GPU", 1), ("speed", 2), ("train", None), ("kill", None), ("resume", 2), ("resume", 1)]
    speed = found["speed", 2]
    assert speed["kind"] == "MULTI_CPU"
    assert speed["efficiency"] == pytest.approx(speed["samples_per_s"] / 2 / speed["one_gpu"], rel=1e-3)
    assert 0 < found["kill", None]["others_ended_s"] < 60
    for part, gpus, compared in (("train", None, 3), ("resume", 2, 30), ("resume", 1, 30)):
        line = found[part, gpus]
        assert (line["against"], line["steps"], line["same_samples"]) == ("one GPU", compared, True)
        assert line["largest_difference"] < 1e-5
    assert (found["resume", 2]["exit"], found["resume", 2]["result"]) == (0, ["adapter_model.safetensors"])
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- scaling -->\n<!-- /scaling -->\nb\n")
    run("table.py", "--scaling", tmp_path / "out/scaling.jsonl", "--into", page)
    table = page.read_text()
    assert "| 3B-lora-ddp-4, 2 a GPU | 2 |" in table
    assert "| 3B-lora-ddp-4 | 2 | one GPU | 3 steps: " in table
    assert "| one rank | " in table
    assert (table[:2], table[-2:]) == ("a\n", "b\n")


def test_what_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    """By `timeout`, say: a training that went on held 80 GiB of a GPU when the next bench began."""
    words = [BENCH / "scaling.py", "--rows", "3B-lora-ddp-4", "--parts", "one", "--gpus", 1, "--root", tmp_path]
    words += ["--size", "tiny", "--device", "cpu", "--records", 12, "--workers", 0, "--steps", 4000, "--warm", 1]
    bench = subprocess.Popen([sys.executable, *map(str, words), "--out", str(tmp_path / "out")], env=environment())
    notes = tmp_path / "notes/rank-0.jsonl"
    try:
        while not (notes.exists() and notes.read_text().endswith("\n")):
            assert bench.poll() is None
            time.sleep(0.1)
        training = json.loads(notes.read_text().splitlines()[0])["pid"]
        for _ in range(2):  # as `timeout` does
            bench.terminate()
        assert bench.wait(60) == 128 + signal.SIGTERM
        assert not Path(f"/proc/{training}").exists()
    finally:
        bench.kill()


@pytest.mark.slow
def test_one_gpu_goes_on_as_whole_copies_where_its_layout_needs_more(tmp_path: Path) -> None:
    """A 7B's masters and gradients of ZeRO or FSDP2 are larger than one GPU that holds its own form of them."""
    tiny = ("--size", "tiny", "--device", "cpu", "--records", 12, "--workers", 0, "--root", tmp_path / "root")
    steps = ("--steps", 3, "--warm", 1, "--more", 3, "--batch", 2, "--out", tmp_path / "out")
    *lines, last = run("scaling.py", "--rows", "7B-full-zero3-4", *tiny, *steps, limit=400)
    assert last.startswith("left: none;"), last
    found = {(line["part"], line.get("gpus")): line for line in map(json.loads, lines)}
    assert "--deepspeed zero3" in found["resume", 2]["command"]
    assert "--deepspeed" not in found["resume", 1]["command"]
    assert max(found["resume", gpus]["largest_difference"] for gpus in (1, 2)) < 1e-5


def test_a_gpu_that_could_not_is_no_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Curves of layouts are then held against each other; what failed is named under the table."""
    monkeypatch.syspath_prepend(str(BENCH))
    from argparse import Namespace

    from scaling import ROWS, Table, held_against
    from table import read_scaling, scaling_table

    table = Table.__new__(Table)
    table.given, table.known, table._kept = Namespace(gpus=2, steps=2), {}, tmp_path / "alone.json"
    # The third was done before the launch was ended: which steps are compared does not hang on that.
    steps = {n: {"loss": 3.0 - n, "samples": 4, "supervised_tokens": 9, "images": 4} for n in (1, 2, 3)}
    other = {n: line | {"loss": line["loss"] + n / 100} for n, line in steps.items()}
    first = held_against(steps, range(1, 3), {"error": "out of memory"}, ROWS["3B-full-zero2"], table)
    second = held_against(other, range(1, 3), {"error": "out of memory"}, ROWS["3B-full-fsdp2"], table)
    assert (first["against"], first["largest_difference"]) == ("zero2", 0)
    assert (second["against"], second["steps"], second["same_samples"]) == ("zero2", 2, True)
    assert (second["largest_difference"], second["mean_difference"]) == pytest.approx((0.02, 0.015))
    # Whoever goes on first has nothing to be held against, and is what the next one is.
    gone_on = [
        held_against(c, range(3, 5), {"error": "out of memory"}, ROWS["3B-full-zero2"], table) for c in (steps, other)
    ]
    assert [line["steps"] for line in gone_on] == [0, 1]
    assert (gone_on[0]["largest_difference"], gone_on[0]["same_samples"]) == (None, None)
    assert gone_on[1]["largest_difference"] == pytest.approx(0.03)
    lines = [
        {"row": "3B-full-fsdp2", "world": 2, "part": "train", **second},
        {"row": "3B-full-fsdp2", "world": 2, "part": "resume", "gpus": 2, **gone_on[0]},
        {"row": "3B-full-fsdp2", "world": 2, "part": "resume", "gpus": 1, "error": "exit 9"},
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = scaling_table(read_scaling([tmp_path / "lines.jsonl"]))
    assert "| 3B-full-fsdp2 | 2 | zero2 | 2 steps: 2.0e-02, 1.5e-02 |  |  | on 2: went on; on 1: failed |" in found
    assert found.endswith("Failed: 3B-full-fsdp2 (resume).\n")


@pytest.mark.parametrize(("work", "told"), [(None, "90.0%"), (1.001, "90.0%"), (1.0151, "90.0%, 91.4% of the work")])
def test_an_efficiency_tells_where_samples_were_not_alike(
    monkeypatch: pytest.MonkeyPatch, work: float | None, told: str
) -> None:
    """What two GPUs were timed over cost 1.5% more than what one was: it had been told as a loss of theirs."""
    monkeypatch.syspath_prepend(str(BENCH))
    from table import speed_row

    line = {"row": "3B-full-fsdp2", "world": 2, "batch": 8, "samples_per_s": 18.0, "one_gpu": 10.0, "efficiency": 0.9}
    assert speed_row(line | ({"work": work} if work else {}))[4] == told
