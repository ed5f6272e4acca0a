"""Speed and memory of whole optimizer steps, ours and the peer's side by side: one JSON line a row.

    python bench/train.py --rows 3B-full-bf16,3B-lora --who vlft,trl --steps 12 --warm 4
    python bench/train.py --rows 3B-lora --who vlft --option per_device_train_batch_size=8 --profile
    python bench/train.py --size tiny --device cpu --records 16 --steps 2 --warm 1         # does it work?

Every row is a process of its own with a time limit; one that fails gives a line with its error. Ours is the real
program, `vlft.train.main` on the words that a user would type, with pictures read from disk by its own workers; only
checkpoints and the hand-over at the end are left out. The peer is bench/peer_trl.py. Lines go to stdout and to
OUT/lines.jsonl, what the processes said to OUT/log.txt, profiles to OUT/profile-*.txt (--out).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import workload
from measure import BEGAN, MODES, Recorder

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    size: str
    strategy: str
    dtype: str = "bf16"
    """Of trained weights: bf16 throughout, or fp32 masters."""
    data: str = "documents"
    batch: tuple[int, int] = (4, 2)
    """Samples of a forward, forwards of a step: the peer's, and ours where `ours` says nothing else."""
    ours: dict[str, str] = field(default_factory=dict)
    """Options of vlft that the row needs."""


ONE_ROW = {"per_device_train_batch_size": "8", "gradient_accumulation_steps": "1"}
"""A padding-free row of all samples of a step: fewer and larger products, fewer launches."""


BF16 = {"optim": "adamw_bf16", "mixed_precision": "bf16"}
"""Trained weights without fp32 masters, as the peer has the vision tower's."""
LIGHT = {"optim": "adamw_8bit", "mixed_precision": "bf16"}
"""Where one GPU cannot hold fp32 masters."""


RECORDS = {"documents": 256, "short": 512}
ROWS = {
    "3B-full-bf16": Row("3B", "full", ours=ONE_ROW | BF16),
    "3B-full-fp32": Row("3B", "full", dtype="fp32", ours=ONE_ROW),
    "3B-lora": Row("3B", "lora_llm_full_vit", ours=ONE_ROW),
    "3B-lora-bf16": Row("3B", "lora_llm_full_vit", ours=ONE_ROW | BF16),
    "3B-lora-40": Row("3B", "lora_llm_full_vit", ours=ONE_ROW | BF16 | {"memory": "42.7GiB"}),
    "7B-lora": Row("7B", "lora_llm_full_vit", ours=ONE_ROW),
    "7B-lora-low": Row(
        "7B",
        "lora_llm_full_vit",
        batch=(1, 8),
        ours={"memory": "low"} | LIGHT,
    ),
    "7B-qlora": Row("7B", "qlora", ours=ONE_ROW),
    "7B-qlora-24": Row("7B", "qlora", ours={"memory": "25GiB"}),  # two rows: a smaller one keeps nearly all
    "7B-qlora-low": Row("7B", "qlora", batch=(1, 8), ours={"memory": "low"}),
    "7B-full": Row("7B", "full", ours=ONE_ROW | LIGHT),
    "3B-short": Row(
        "3B",
        "lora",
        data="short",
        batch=(16, 4),
        ours={
            "per_device_train_batch_size": "64",
            "gradient_accumulation_steps": "1",
        },
    ),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", default=",".join(ROWS), help="which, in this order; one may be named twice")
    made.add_argument("--who", default="vlft", help="vlft, trl, or both, with a comma")
    made.add_argument("--size", help="another size for every row: " + ", ".join(workload.SIZES))
    made.add_argument("--steps", type=int, default=12, help="steps that are timed")
    made.add_argument("--warm", type=int, default=4, help="steps before them")
    made.add_argument("--option", nargs="*", action="extend", default=[], help="options of vlft, key=value")
    made.add_argument("--peer", nargs="*", action="extend", default=[], help="options of the peer's script, key=value")
    made.add_argument("--workers", type=int, default=8)
    made.add_argument("--records", type=int, default=0, help="of a data set; 0: 256 documents, 512 short ones")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--limit", type=float, default=240, help="seconds of one row")
    made.add_argument("--profile", action="store_true", help="profile a few more steps")
    made.add_argument("--root", type=Path, default=workload.default_root(), help="models and data, made once")
    made.add_argument("--out", type=Path, default=Path("runs/bench"))
    made.add_argument("--one", help=argparse.SUPPRESS)
    made.add_argument("--line", type=Path, help=argparse.SUPPRESS)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# In the process of a row: ours
# ---------------------------------------------------------------------------------------------------------------------


def words_of(row: Row, given: argparse.Namespace, registry: Path, steps: int) -> list[str]:
    """What a user would type."""
    options: dict[str, str] = {
        "model_name_or_path": str(given.root / f"model-{row.size}"), "output_dir": str(given.root / "vlft-out"),
        "dataset_config_path": str(registry), "tuning_strategy": row.strategy, "cache_dir": str(given.root / "cache"),
        "per_device_train_batch_size": str(row.batch[0]), "gradient_accumulation_steps": str(row.batch[1]),
        "max_steps": str(steps), "train_split_ratio": "1", "save_steps": "1000000", "report": "false",
        "num_workers": str(given.workers), **row.ours,
    }  # fmt: skip
    if row.size == "tiny":
        options["max_pixels"] = "50176"
    options |= dict(pair.split("=", 1) for pair in given.option)
    return [word for name, value in options.items() for word in (f"--{name}", *value.split())]


def run_vlft(row: Row, given: argparse.Namespace, more: int = 0) -> dict[str, Any]:
    """Args: more: steps after those that are noted."""
    from vlft import train
    from vlft.parse import parse

    registry = data_of(row, given)
    recorder = Recorder(given.steps, given.warm, device=given.device, profile=given.profile_path)
    kept: dict[str, Any] = {}
    watch(recorder, lambda job, _: kept.update(job=job))
    train.save_checkpoint = lambda _: None
    train.hand_over = lambda _: None
    shutil.rmtree(given.root / "vlft-out", ignore_errors=True)
    words = words_of(row, given, registry, recorder.total + more)
    train.main(parse(words))
    return vlft_line(kept["job"], recorder, row, words)


def watch(recorder: Recorder, after: Callable[[Any, Any], None]) -> None:
    """Note every step that vlft makes in this process from now on; `after` hears of (job, step) at its end."""
    from vlft import train

    real = train.train_step
    watched: list[Any] = []

    def measured(job: Any, step: Any) -> dict[str, Any]:
        if not watched:
            watched.append(job)
            watch_update(job, recorder)
        recorder.begin()
        for one in step.rows:
            if one.sample_ids:
                lengths = (one.cu_seqlens[1:] - one.cu_seqlens[:-1]).tolist()
                recorder.work(lengths, one.image_grid_thw.tolist(), one.supervised if recorder.timing else 0)
        line = real(job, step)
        recorder.end()
        after(job, step)
        return line

    train.train_step = measured


def watch_update(job: Any, recorder: Recorder) -> None:
    """Note dtypes between the first backward and its update."""
    real = job.engine.update

    def update(**how: Any) -> Any:
        recorder.dtypes(job.model, job.optimizer)
        return real(**how)

    job.engine.update = update


def vlft_line(job: Any, recorder: Recorder, row: Row, words: list[str]) -> dict[str, Any]:
    lines = [json.loads(line) for line in job.folder.metrics.read_text().splitlines()]
    perf = [line["perf"] for line in lines if line["kind"] == "train"][recorder.warm : recorder.warm + recorder.steps]
    found = process_line(job, recorder, row.strategy)
    found["data_wait_s"] = float(f"{sum(p['data_wait_seconds'] for p in perf) / max(1, len(perf)):.4g}")
    found["own_mfu"] = float(f"{sum(p.get('mfu', 0.0) for p in perf) / max(1, len(perf)):.4g}")
    config = job.run.config
    found["batch"] = [config.per_device_train_batch_size, config.gradient_accumulation_steps]
    found["loss"] = [line["loss"] for line in lines if line["kind"] == "train"][-1]
    found["command"] = " ".join(words)
    return found


def process_line(job: Any, recorder: Recorder, strategy: str) -> dict[str, Any]:
    """What this process did and needed."""
    rank = int(getattr(job.run.options, "lora_rank", 0) or 0) if strategy != "full" else 0
    found = recorder.line(job.source.config, job.meter.counts, MODES[strategy], rank)
    return found | {"budget": str(job.budget), "memory": str(job.memory)}


def data_of(row: Row, given: argparse.Namespace) -> Path:
    make = {"documents": workload.documents, "short": workload.short}[row.data]
    return make(given.root, given.records or RECORDS[row.data])


# ---------------------------------------------------------------------------------------------------------------------
# In the process that asks for rows
# ---------------------------------------------------------------------------------------------------------------------


def environment(given: argparse.Namespace, who: str) -> dict[str, str]:
    paths = [HERE, workload.ROOT, workload.ROOT / "plugins"]
    if who == "trl" and given.device == "cuda":
        paths.insert(0, HERE / "shim")
    known = os.environ.get("PYTHONPATH", "")
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    fixed["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *([known] if known else [])])
    # What vlft sets for itself, for the peer too: it would otherwise reserve more memory than it uses.
    fixed["PYTORCH_CUDA_ALLOC_CONF"] = fixed["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if given.device == "cpu":
        fixed |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | fixed


def command(name: str, row: Row, who: str, given: argparse.Namespace, line: Path) -> list[str]:
    shared: dict[str, Any] = {"steps": given.steps, "warm": given.warm, "root": given.root, "device": given.device}
    shared |= {"workers": given.workers, "line": line}
    if who == "vlft":
        more = ["--size", row.size, "--records", str(given.records), "--out", str(given.out)]
        more += ["--profile"] if given.profile else []
        more += ["--option", *given.option] if given.option else []
        return [sys.executable, str(HERE / "train.py"), "--one", name, *_words(shared), *more]
    shared |= {"size": row.size, "strategy": row.strategy, "dtype": row.dtype, "data": row.data}
    shared |= {"records": given.records or RECORDS[row.data], "bs": row.batch[0], "ga": row.batch[1]}
    if given.device == "cpu":
        shared |= {"liger": 0, "attn": "sdpa"}
    if given.profile:
        shared["profile"] = given.out / f"profile-trl-{name}.txt"
    return [sys.executable, str(HERE / "peer_trl.py"), *_words(shared | dict(p.split("=", 1) for p in given.peer))]


def _words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def end_with_children() -> None:
    """A bench that is told to end raises, so that what it started ends too. Its processes have sessions of their own,
    which no `timeout` reaches: a run that was left behind held the GPU's memory when the next one began.
    """

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice, the second time into what cleans up
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def run(words: list[str], limit: float, env: dict[str, str], log: Path) -> str:
    """Run it to its end, or to the end of the time; what it said goes to `log`. Returns what went wrong, or ""."""
    with log.open("w") as out:
        env = env | {BEGAN: str(time.time())}
        child = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = child.wait(limit)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"not done after {limit:.0f} s\n{_tail(log)}"
    return f"exit {code}\n{_tail(log)}" if code else ""


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


def measure(name: str, row: Row, who: str, given: argparse.Namespace) -> dict[str, Any]:
    """One row: its line, or a line with its error."""
    facts = {"row": name, "who": who, **asdict(row)}
    facts.pop("ours")
    result, began = given.root / "line.json", time.monotonic()
    found = line_of(f"{name} {who}", command(name, row, who, given, result), environment(given, who), result, given)
    return facts | {"wall_s": round(time.monotonic() - began, 1)} | found


def line_of(
    title: str, words: list[str], env: dict[str, str], result: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """What a process writes to `result`, or its error; what it says goes to OUT/log.txt under its title."""
    log = given.root / "log.txt"
    result.unlink(missing_ok=True)
    wrong = run(words, given.limit, env, log)
    with (given.out / "log.txt").open("a") as whole:
        whole.write(f"==== {title}\n{log.read_text(errors='replace')[-200_000:]}\n")
    if wrong or not result.exists():
        return {"error": wrong or "no line"}
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def say(line: dict[str, Any], given: argparse.Namespace) -> None:
    print(json.dumps(line), flush=True)
    with (given.out / "lines.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def chosen_rows(given: argparse.Namespace) -> list[tuple[str, Row]]:
    names = given.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise SystemExit(f"unknown rows: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    return [(name, resized(ROWS[name], given.size)) for name in names]


def resized(row: Row, size: str | None) -> Row:
    return Row(**{**asdict(row), "size": size or row.size})


def prepare(rows: list[tuple[str, Row]], given: argparse.Namespace) -> None:
    """Models and data, each made once, in processes of their own: this one takes no GPU memory."""
    given.root.mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    kinds = {row.data for _, row in rows}
    words = [sys.executable, str(HERE / "workload.py"), *sorted({row.size for _, row in rows})]
    words += ["--root", str(given.root)]
    words += [word for kind in sorted(kinds) for word in (f"--{kind}", str(given.records or RECORDS[kind]))]
    words += ["--max_pixels", "50176"] if given.size == "tiny" else []
    if wrong := run(words, 600, environment(given, "vlft"), given.root / "log.txt"):
        raise SystemExit(f"the workload could not be made: {wrong}")


def main() -> None:
    end_with_children()
    given = parser().parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    if given.one:
        row = resized(ROWS[given.one], given.size)
        given.profile_path = given.out / f"profile-vlft-{given.one}.txt" if given.profile else None
        given.line.write_text(json.dumps(run_vlft(row, given)))
        return
    rows = chosen_rows(given)
    prepare(rows, given)
    for name, row in rows:
        for who in given.who.split(","):
            say(measure(name, row, who, given), given)


if __name__ == "__main__":
    main()
