"""Several GPUs of one host: how the speed grows, whether the curve stays, what a kill leaves. JSON lines at once.

    python bench/scaling.py --rows 3B-lora-ddp,7B-full-zero3            # on all GPUs of the machine
    python bench/scaling.py --rows 3B-full-zero2 --steps 50 --parts course
    python bench/scaling.py --size tiny --device cpu --records 24 --steps 4 --warm 1 --batch 2     # does it work?

A row is a size, a strategy and a layout. It has up to two parts:

* `speed`: samples/s on n GPUs over n times those of one GPU with as many samples a GPU. One GPU alone is measured in
  the same call (or in an earlier one that left its result on this machine), with the row's optimizer; where it cannot
  hold that one, the line's `reference` says what it ran instead. It is timed for n times as many steps, which are the
  same samples where both are whole passes over the data: with its 256 samples, `--steps 48 --warm 32` or `80` and
  `64` on two GPUs or four. `work` says how much a sample of the n GPUs took over one of the one GPU's, in FLOPs.
* `course`: trains for --steps, is saved and killed, and goes on for --more steps from that checkpoint on as many GPUs
  and on half of them. Every curve is held against that of one GPU with the same global batch, step by step. Where one
  GPU cannot hold the row, against the first layout's that was run; `against` says whose. What is killed, by kill -9:
  all processes as soon as the checkpoint is there, or the last rank in the middle of a later step; then the seconds
  count until the others have ended.

`--parts one` measures the one GPU of `speed` alone, for the number of GPUs that --gpus says: on two cards at once, say,
with a --root each, whose alone.json are then put together.

Both parts take one launch where a row has both; what one GPU does is done once for all rows that need it. Every launch
is the program as a user starts it (bench/ranks.py notes steps beside it), without dropout, whose bits depend on how
samples lie on ranks; it is ended by a kill when it has gone as far as its part needs. Only adapters that resume on all
GPUs come to their own end, with the result written. `balance` is the mean over the timed steps of the slowest rank's
forward and backward over the ranks' mean, told where no rank waits for another within them (`ddp`).

Lines go to stdout and OUT/scaling.jsonl (--out), what the programs said to OUT/scaling-log.txt; the last line of stdout
names the rows that are left. bench/table.py --scaling makes docs/distributed.md's table of the lines.

The plan for a machine with two GPUs, in order of worth. Measured on H200s (2026-12-01), with 80 steps of which 64 warm:
models and data 40 s; one GPU 70 to 95; a launch 80 to 105; --profile 20 more each. A call begins with
`. bench/device.sh; s="python3 bench/scaling.py --out $OUT"`, wants `.whl` carried, and ends by itself, since no launch
outlasts --within:

    s="$s --parts speed --steps 80 --warm 64"
    $s --rows 7B-full-zero3 --profile                                                            # 115+120 = 235
    $s --rows 3B-full-zero2                                                                      # 85+90 = 175
    $s --rows 3B-full-fsdp2 --launcher fsdp_reshard_after_forward=false                          # 95+105 = 200

The first has **not been run** since ZeRO-3 gathers whole layers (bench/one_rank.py says what to expect); after it the
courses 7B-full-zero3-4 and 3B-full-zero3 again, whose curves are of DeepSpeed's own gathering.

Attention builds a graph for a row of a new size, for which all ranks wait: by a count over the plan, two GPUs need the
last for a while in the 44th step, four in the 57th.

Courses share GPUs, by `--memory low` as many as their sizes allow, in GiB of a GPU, on two GPUs and of the one: 7B
`full` 85 and 132, 3B `full` 42 and 67 (DDP 62), 7B `lora` 32 and 35, 3B `lora` 18 and 24, 3B `qlora` 8 and 9. **The
one GPU's come at the beginning and at the end of a row**, on the first of the list's cards. With its 50 steps, its one
GPU and both resumes a course of 7B `full` took 420 s by itself, and 270 where its one GPU was known; 3B `full` 260, two
side by side; 3B and 7B `lora` 330, side by side. On one card beside three others one GPU took twice as long.

    END=582; . bench/cards.sh; prep 3B 7B
    c="--parts course --batch 4 --steps 50 --warm 4 --workers 3 --launch_limit 400 --option memory=low"
    list a 0,1 "bench/scaling.py --rows 7B-full-zero3-4 $c --limit 570 --runs /dev/shm/a --within $(left)"; finish

and then, on the machine that is still warm,

    list c 0,1 "bench/scaling.py --rows 3B-full-zero3 $c --limit 570 --runs /dev/shm/c --within $(left)"
    list d 1,0 "bench/scaling.py --rows 3B-full-zero2 $c --limit 570 --runs /dev/shm/d --within $(left)"; finish

There the models are made, and what one GPU did is known to a list of the same name. The first steps of a run are
slow (docs/performance.md), so that --warm matters.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import train as bench
import workload
from ranks import ASKED

LAUNCH = "VLFT_BENCH_LAUNCH"
"""Environment: which launch a process belongs to. Launchers give their processes sessions, out of reach of killpg."""
STRATEGIES = {"full": "full", "lora": "lora_llm_full_vit", "qlora": "qlora"}
BOTH = ("speed", "course")
SPEEDS = ("samples_per_s", "s_per_step", "mfu", "peak_gib", "reserved_gib", "first_step_s", "memory", "budget",
          "weights", "gradients", "states", "gpu", "torch")  # fmt: skip
"""What a line has of a process."""
FULL_ROW = 8
"""Samples of a forward on one GPU."""
TRIES = 3
"""Of a launch whose rows do not fit at first."""
LATE = "not done after"
FEW_SECONDS = 60.0
"""In less no row is begun."""
GONE_SECONDS = 120.0
"""How long the others may take to end."""


@dataclass(frozen=True)
class Spread:
    """One row."""

    size: str
    strategy: str
    layout: str
    parts: tuple[str, ...] = BOTH
    batch: int = FULL_ROW
    """Samples of a GPU in a step, in one forward."""
    killed: str = "all"
    """`all` processes, or one `rank`."""
    goal: float | None = None
    """Of the efficiency."""
    alone: bool = True
    """One GPU holds it, with the same optimizer."""
    single: str | None = None
    """Layout in which one GPU goes on, where it holds the row in no other than its own."""


ROWS = {
    "3B-lora-ddp": Spread("3B", "lora", "ddp", ("speed",), goal=0.95),
    "3B-lora-ddp-4": Spread("3B", "lora", "ddp", ("course",), batch=4, killed="rank"),
    "7B-full-zero3": Spread("7B", "full", "zero3", ("speed",), goal=0.85, alone=False),
    "7B-full-fsdp2": Spread("7B", "full", "fsdp2", ("speed",), goal=0.85, alone=False),
    "3B-full-zero2": Spread("3B", "full", "zero2", goal=0.9),
    "3B-full-fsdp2": Spread("3B", "full", "fsdp2", goal=0.9, killed="rank"),
    "7B-qlora-ddp": Spread("7B", "qlora", "ddp"),
    "3B-full-zero3": Spread("3B", "full", "zero3", killed="rank"),
    "3B-full-ddp": Spread("3B", "full", "ddp"),
    "7B-lora-ddp": Spread("7B", "lora", "ddp", goal=0.95),
    **{f"3B-lora-{to}": Spread("3B", "lora", to, ("course",)) for to in ("zero2", "zero3", "fsdp2")},
    **{f"7B-qlora-{to}": Spread("7B", "qlora", to, ("course",)) for to in ("zero2", "zero3", "fsdp2")},
    **{f"7B-lora-{to}": Spread("7B", "lora", to, ("course",)) for to in ("zero2", "zero3", "fsdp2")},
    # Whole copies of one process have their masters in two halves: 116 GiB with --memory low in one row a step, whose
    # gradients are in bf16, 129 in two.
    **{
        f"7B-full-{to}-4": Spread("7B", "full", to, ("course",), batch=4, single="ddp")
        for to in ("fsdp2", "zero3", "zero2")
    },
    **{f"3B-qlora-{to}": Spread("3B", "qlora", to, ("course",)) for to in ("ddp", "zero2", "zero3", "fsdp2")},
}
"""In order of worth."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", default=",".join(ROWS), help="which, in this order: " + ", ".join(ROWS))
    made.add_argument("--parts", help="speed, course, one, some with a comma, instead of those of the rows")
    made.add_argument("--gpus", type=int, default=0, help="processes; 0: all GPUs, or 2 on a CPU")
    made.add_argument("--steps", type=int, default=16, help="steps to the checkpoint; those behind --warm are timed")
    made.add_argument("--warm", type=int, default=5, help="steps that are not timed")
    made.add_argument("--more", type=int, default=4, help="steps after a resume, at least 3")
    made.add_argument("--batch", type=int, help="samples of a GPU in a step, instead of those of the rows")
    made.add_argument("--size", help="another size for every row: " + ", ".join(workload.SIZES))
    made.add_argument("--option", nargs="*", action="extend", default=[], help="options of vlft, key=value")
    made.add_argument(
        "--launcher", nargs="*", action="extend", default=[], help="of accelerate launch on GPUs, key=value"
    )
    made.add_argument("--deepspeed", type=Path, help="another DeepSpeed file for the rows of zero2 or zero3")
    made.add_argument("--profile", action="store_true", help="the first rank, a few steps after the timed ones")
    made.add_argument("--workers", type=int, default=8)
    made.add_argument("--records", type=int, default=0, help="of the data set; 0: 256")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--limit", type=float, default=450, help="seconds of one row with all its launches")
    made.add_argument("--launch_limit", type=float, default=180, help="seconds of one launch")
    made.add_argument("--within", type=float, default=560, help="seconds of everything")
    made.add_argument("--root", type=Path, default=workload.default_root(), help="models and data, made once")
    made.add_argument("--runs", type=Path, help="where runs write checkpoints (3B full: 45 GB); else below --root")
    made.add_argument("--out", type=Path, default=Path("runs/bench"))
    return made


class NotDoneError(Exception):
    """A launch did not come as far as it should; with what it said last."""


# ---------------------------------------------------------------------------------------------------------------------
# One launch
# ---------------------------------------------------------------------------------------------------------------------


def start_words(
    layout: str, processes: int, *, device: str, options: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """What comes before vlft's own words, and in the environment: as docs/distributed.md has it.

    Args:
        options: of accelerate's launcher, key=value, over those of its file.
    """
    program = str(bench.HERE / "ranks.py")
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if layout == "fsdp2" else {}
    if processes == 1:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return [sys.executable, program], fsdp | ({"CUDA_VISIBLE_DEVICES": first} if device == "cuda" else {})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    if device == "cpu":  # accelerate starts one process there, in silence
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
        return [sys.executable, *launcher, program], fsdp
    file = workload.ROOT / "accelerate_configs" / f"{layout}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(processes)]
    launcher += [word for pair in options for word in f"--{pair}".split("=", 1)]
    return [sys.executable, *launcher, "--main_process_port", port, program], {}


class Launch:
    """A run in some processes, watched through the files that it writes."""

    def __init__(
        self, spread: Spread, processes: int, words: list[str], given: argparse.Namespace, until: float
    ) -> None:
        """`until`: the end of its time, by time.monotonic()."""
        first, env = start_words(spread.layout, processes, device=given.device, options=given.launcher)
        self.processes, self.until = processes, min(until, time.monotonic() + given.launch_limit)
        self.mark, self.notes = uuid.uuid4().hex, given.root / "notes"
        shutil.rmtree(self.notes, ignore_errors=True)
        self.notes.mkdir()
        asked = {"folder": str(self.notes), "strategy": STRATEGIES[spread.strategy], "device": given.device}
        asked |= {"steps": given.steps - given.warm, "warm": given.warm}
        if given.profile:
            asked["profile"] = str(
                given.out / f"profile-{spread.size}-{spread.strategy}-{spread.layout}-{processes}.txt"
            )
        env = bench.environment(given, "vlft") | env | {ASKED: json.dumps(asked), LAUNCH: self.mark}
        env |= {bench.BEGAN: str(time.time()), "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0")}
        self.metrics = Path(words[words.index("--output_dir") + 1]) / "metrics.jsonl"
        self.log = given.root / "log.txt"
        self.command = shlex.join([*first, *words])
        self.began = time.monotonic()
        with self.log.open("w") as out:
            self.child = subprocess.Popen(
                [*first, *words], stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait_for(self, what: Callable[[], bool]) -> None:
        """
        Raises:
            NotDoneError: it ended before that, or its time did.
        """
        while not what():
            code = self.child.poll()
            if code is not None and not what():
                raise NotDoneError(f"exit {code}\n{self._said()}")
            if time.monotonic() > self.until:
                raise NotDoneError(f"{LATE} {time.monotonic() - self.began:.0f} s\n{self._said()}")
            time.sleep(0.1)

    def _said(self) -> str:
        """Its last words, without those of a launcher about them."""
        return self.log.read_text(errors="replace").partition("torch/distributed/elastic")[0][-1500:]

    def noted(self, rank: int) -> list[dict[str, Any]]:
        return _lines(self.notes / f"rank-{rank}.jsonl")

    def done(self, step: int) -> bool:
        """Whether this launch did it. metrics.jsonl alone would not tell: lines of an earlier launch may lie there."""
        return any(line.get("step", 0) >= step for line in self.noted(0)) and step in self.curve()

    def curve(self) -> dict[int, dict[str, Any]]:
        """The line of each step."""
        return {line["step"]: line for line in _lines(self.metrics) if line["kind"] == "train"}

    def timed(self) -> bool:
        return all(any("line" in line for line in self.noted(rank)) for rank in range(self.processes))

    def alive(self) -> list[int]:
        """Processes of this launch, whatever session they are in. (Those that have ended have no environment.)"""
        self.child.poll()  # else it would stay behind as a zombie
        return [pid for pid in _pids() if self.mark.encode() in _environ(pid)]

    def kill(self) -> None:
        """All of them, the launcher first: it shall not answer to the end of the others."""
        while found := self.alive():
            for pid in sorted(found, key=lambda pid: pid != self.child.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.child.wait()  # one that is about to end has no environment any more, but its memory still

    def kill_rank(self, rank: int) -> dict[str, float]:
        """One alone; seconds until the other ranks and the launcher have ended, and until their workers have."""
        ranks = {self.noted(r)[0]["pid"] for r in range(self.processes)} | {self.child.pid}
        os.kill(self.noted(rank)[0]["pid"], signal.SIGKILL)
        began, found = time.monotonic(), {}
        while time.monotonic() - began < GONE_SECONDS:
            alive = self.alive()
            if not ranks & set(alive):
                found.setdefault("others_ended_s", round(time.monotonic() - began, 2))
            if not alive:
                return found | {"workers_ended_s": round(time.monotonic() - began, 2)}
            time.sleep(0.05)
        raise NotDoneError(f"{len(self.alive())} processes were still there after {GONE_SECONDS:.0f} s\n{self._said()}")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return b""


# ---------------------------------------------------------------------------------------------------------------------
# A row
# ---------------------------------------------------------------------------------------------------------------------


class Table:
    """What the rows of this call share: where lines go, and what one GPU did."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.until = 0.0
        """By time.monotonic(): the end of the row's time."""
        self.failed = False
        """Something of this row."""
        self.registry = bench.data_of(bench.Row("", ""), given)
        self.output = (given.runs or given.root) / "scaling-out"
        self._kept = given.root / "alone.json"
        self.known: dict[str, Any] = json.loads(self._kept.read_text()) if self._kept.exists() else {}

    def say(self, **facts: Any) -> None:
        line = json.dumps({name: _short(value) for name, value in facts.items()})
        print(line, flush=True)
        with (self.given.out / "scaling.jsonl").open("a") as file:
            file.write(line + "\n")

    @contextlib.contextmanager
    def part(self, **facts: Any) -> Iterator[None]:
        """What fails inside becomes a line, and the row goes on."""
        try:
            yield
        except NotDoneError as error:
            self.failed = True
            self.say(**facts, error=str(error))

    def keep(self, key: str, value: Any) -> None:
        """For later rows, and for later calls on this machine: a fresh one has another --root."""
        self.known[key] = value
        self._kept.write_text(json.dumps(self.known))

    def asking(self, **other: Any) -> Table:
        """The same, with other options."""
        made = copy.copy(self)
        made.given = argparse.Namespace(**vars(self.given) | other)
        return made

    def words(self, spread: Spread, batch: tuple[int, int], **more: str) -> list[str]:
        given = self.given
        ours = {"per_device_train_batch_size": str(batch[0]), "gradient_accumulation_steps": str(batch[1])}
        ours |= {"output_dir": str(self.output), **({} if spread.strategy == "full" else {"lora_dropout": "0"})}
        ours |= {"deepspeed": str(given.deepspeed or spread.layout)} if spread.layout.startswith("zero") else {}
        row = bench.Row(spread.size, STRATEGIES[spread.strategy], ours=ours | more)
        # One step more than any launch does: it would be followed by another save.
        return bench.words_of(row, given, self.registry, given.steps + given.more + 1)

    @contextlib.contextmanager
    def launch(self, spread: Spread, processes: int, words: list[str]) -> Iterator[Launch]:
        """A launch that is over, with all its processes, when the block is left."""
        running = Launch(spread, processes, words, self.given, self.until)
        try:
            yield running
        finally:
            running.kill()
            with (self.given.out / "scaling-log.txt").open("a") as whole:
                whole.write(f"==== {running.command}\n{running.log.read_text(errors='replace')[-100_000:]}\n")

    @contextlib.contextmanager
    def timed(self, spread: Spread, processes: int, words: list[str]) -> Iterator[Launch]:
        """A launch behind its timed steps. One whose rows did not fit is begun again, as a queue would."""
        resume = ["--resume_from_checkpoint", "latest"]  # there is none: from the start, with what budget.json says
        for tried in range(TRIES):
            with self.launch(spread, processes, [*words, *(resume if tried else [])]) as running:
                try:
                    running.wait_for(running.timed)
                except NotDoneError:
                    if tried + 1 == TRIES or not (self.output / "budget.json").exists():
                        raise
                    continue
                yield running
                return


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def run_row(name: str, spread: Spread, table: Table) -> None:
    given, n = table.given, table.given.gpus
    facts = {"row": name, "world": n, "size": spread.size, "strategy": STRATEGIES[spread.strategy]}
    facts["layout"] = spread.layout
    total = spread.batch * n
    one = min(FULL_ROW, total)
    speed = alone(spread, (spread.batch, 1), table, timed=n) if {"speed", "one"} & {*spread.parts} else None
    if spread.parts == ("one",):
        return
    whole = alone(spread, (one, total // one), table) if "course" in spread.parts and spread.alone else None
    shutil.rmtree(table.output, ignore_errors=True)
    checkpoint = table.output / "checkpoints" / f"step-{given.steps:06d}"
    more = {"save_steps": str(given.steps)} if "course" in spread.parts else {}
    with (
        table.part(**facts, part="train"),
        table.timed(spread, n, table.words(spread, (spread.batch, 1), **more)) as run,
    ):
        table.say(**facts, part="speed", **speed_of(run, speed, spread, given))
        if "course" in spread.parts:
            run.wait_for((checkpoint / "state.json").exists)
            asked = range(1, given.steps + 1)
            table.say(**facts, part="train", **held_against(run.curve(), asked, whole, spread, table))
            with table.part(**facts, part="kill"):
                table.say(**facts, part="kill", **killed(run, spread, given))
    for gpus in (n, n // 2):
        if checkpoint.exists():
            with table.part(**facts, part="resume", gpus=gpus):
                table.say(**facts, part="resume", **resumed(spread, gpus, checkpoint, whole, table))
    shutil.rmtree(table.output, ignore_errors=True)


def alone(spread: Spread, batch: tuple[int, int], table: Table, timed: int = 1) -> dict[str, Any]:
    """What one GPU does with these samples of a forward, forwards of a step: its line, with the curve.

    `error` is in it where it could not, which is not tried again.

    Args:
        timed: times as many timed steps as were asked for.
    """
    table = table.asking(steps=table.given.warm + timed * (table.given.steps - table.given.warm))
    given = table.given
    key = (
        f"{spread.size} {spread.strategy} {batch} {given.steps} {given.warm} {given.more} {spread.alone} {given.option}"
    )
    if key in table.known:
        return dict(table.known[key])
    single = replace(spread, layout="ddp")
    more = {} if spread.alone else bench.LIGHT
    facts = {"row": f"{spread.size}-{spread.strategy}", "world": 1, "part": "one GPU", "batch": list(batch)}
    shutil.rmtree(table.output, ignore_errors=True)
    found: dict[str, Any] = {}
    try:
        with table.timed(single, 1, table.words(single, batch, **more)) as running:
            running.wait_for(lambda: running.done(given.steps + given.more))
            line = next(line["line"] for line in running.noted(0) if "line" in line)
            found = {"curve": running.curve(), "reference": more.get("optim", "the same optimizer")} | _common(running)
            found |= {name: line[name] for name in SPEEDS if name in line}
    except NotDoneError as error:
        found = {"error": str(error)}
    table.say(**facts, **{name: value for name, value in found.items() if name != "curve"})
    found = json.loads(json.dumps(found))  # text of the numbers of steps: the same now and from the file
    if not found.get("error", "").startswith(LATE):
        table.keep(key, found)
    return found


def speed_of(running: Launch, one: dict[str, Any] | None, spread: Spread, given: argparse.Namespace) -> dict[str, Any]:
    """Of all ranks together."""
    lines = [next(line["line"] for line in running.noted(r) if "line" in line) for r in range(running.processes)]
    found = {name: lines[0][name] for name in SPEEDS if name in lines[0]}
    rate = sum(line["samples_per_s"] for line in lines)
    found |= {"samples_per_s": rate, "kind": lines[0]["kind"], "batch": spread.batch, "goal": spread.goal}
    found |= {name: max(line[name] for line in lines) for name in ("peak_gib", "reserved_gib") if name in lines[0]}
    if lines[0]["mfu"]:
        found["mfu"] = statistics.mean(line["mfu"] for line in lines)
    if lines[0]["own_pace"]:
        found |= balance_of(running, given)
    if one is not None and "error" not in one:
        found |= {"one_gpu": one["samples_per_s"], "reference": one["reference"], "one_gpu_memory": one["memory"]}
        found["efficiency"] = rate / running.processes / one["samples_per_s"]
        if lines[0]["mfu"] and one["mfu"]:
            found["work"] = found["mfu"] / one["mfu"] / found["efficiency"]
    return found | _common(running)


def balance_of(running: Launch, given: argparse.Namespace) -> dict[str, Any]:
    """Slowest rank's forward and backward over the ranks' mean, in the timed steps."""
    noted = [running.noted(rank) for rank in range(running.processes)]
    ranks = [{line["step"]: line["busy_s"] for line in lines if "step" in line} for lines in noted]
    each = [[busy[step] for busy in ranks] for step in range(given.warm + 1, given.steps + 1)]
    ratios = [max(times) / statistics.mean(times) for times in each]
    # Where one rank is always the slowest it is the machine, else what the rows are.
    by_rank = [statistics.mean(times) for times in zip(*each, strict=True)]
    return {
        "balance": statistics.mean(ratios), "balance_worst": max(ratios), "busy_s": statistics.mean(map(max, each)),
        "busy_s_of_ranks": by_rank,
    }  # fmt: skip


def held_against(
    curve: dict[int, dict[str, Any]], asked: range, one: dict[str, Any] | None, spread: Spread, table: Table
) -> dict[str, Any]:
    """Differences of the losses of the `asked` steps from one GPU's, or from those of the first of the kind.

    A launch may have gone on while it was waited for: what it did beyond them is left out, lest a line's number of
    steps hang on how fast the machine was.
    """
    mine = {step: curve[step] for step in asked if step in curve}
    whole, by = (one or {}).get("curve"), "one GPU"
    if whole is None:
        key = f"first {spread.size} {spread.strategy} {spread.batch} {table.given.gpus} {table.given.steps}"
        first = json.loads(json.dumps({"curve": mine, "by": spread.layout}))
        known = table.known.get(key, first)
        whole, by = known["curve"], known["by"]
        table.keep(key, {"curve": first["curve"] | whole, "by": by})
    steps = [step for step in mine if str(step) in whole]
    gaps = [abs(mine[step]["loss"] - whole[str(step)]["loss"]) for step in steps]
    of = ("samples", "supervised_tokens", "images")
    same = [mine[step][name] == whole[str(step)][name] for step in steps for name in of]
    return {
        "against": by, "steps": len(steps), "largest_difference": max(gaps, default=None),
        "mean_difference": statistics.mean(gaps) if gaps else None, "same_samples": all(same) if same else None,
        "losses": [line["loss"] for line in mine.values()],
    }  # fmt: skip


def killed(running: Launch, spread: Spread, given: argparse.Namespace) -> dict[str, Any]:
    """By kill -9: everything, now that the checkpoint is there; or the last rank, in the middle of a later step."""
    if spread.killed == "all":
        running.kill()
        return {"killed": "all"}
    step = given.steps + 1
    running.wait_for(lambda: running.done(step))
    time.sleep(running.curve()[step]["perf"]["step_seconds"] / 2)
    return {"killed": "rank", **running.kill_rank(running.processes - 1), "launcher_exit": running.child.wait(10)}


def resumed(spread: Spread, gpus: int, checkpoint: Path, one: dict[str, Any] | None, table: Table) -> dict[str, Any]:
    """Go on from the checkpoint; adapters on all GPUs to their own end."""
    given, found = table.given, dict[str, Any]()
    if gpus == 1 and spread.single:
        spread = replace(spread, layout=spread.single)
    words = [*table.words(spread, (spread.batch, 1)), "--resume_from_checkpoint", str(checkpoint)]
    with table.launch(spread, gpus, words) as running:
        running.wait_for(lambda: running.done(given.steps + 1))
        found["first_step_s"] = time.monotonic() - running.began
        running.wait_for(lambda: running.done(given.steps + given.more))
        if spread.strategy != "full" and gpus == given.gpus:
            running.wait_for(lambda: running.child.poll() is not None)
            found["exit"] = running.child.poll()
            found["result"] = sorted(path.name for path in (table.output / "model").glob("*.safetensors"))
        asked = range(given.steps + 1, given.steps + given.more + 1)
        return found | held_against(running.curve(), asked, one, spread, table) | _common(running)


def _common(running: Launch) -> dict[str, Any]:
    return {
        "gpus": running.processes, "wall_s": time.monotonic() - running.began, "date": time.strftime("%Y-%m-%d"),
        "command": running.command,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# All rows
# ---------------------------------------------------------------------------------------------------------------------


def chosen_rows(given: argparse.Namespace) -> list[tuple[str, Spread]]:
    names = given.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise SystemExit(f"unknown rows: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    more: dict[str, Any] = {"size": given.size} if given.size else {}
    more |= {"parts": tuple(given.parts.split(","))} if given.parts else {}
    more |= {"batch": given.batch} if given.batch else {}
    return [(name, replace(ROWS[name], **more)) for name in names]


def gpus_here(device: str) -> int:
    if device == "cpu":
        return 2
    import torch

    return torch.cuda.device_count()


def main() -> None:
    began = time.monotonic()
    bench.end_with_children()
    given = parser().parse_args()
    rows = chosen_rows(given)
    if given.more < 3 or not 0 < given.warm < given.steps:
        raise SystemExit("--more must be at least 3, and --warm between 0 and --steps.")
    given.gpus = given.gpus or gpus_here(given.device)
    if given.gpus < (1 if given.parts == "one" else 2):
        raise SystemExit(f"{given.gpus} GPU here; several are needed.")
    bench.prepare([(name, bench.Row(spread.size, spread.strategy)) for name, spread in rows], given)
    table, left = Table(given), []
    for name, spread in rows:
        table.until = min(time.monotonic() + given.limit, began + given.within - 10)
        table.failed = table.until - time.monotonic() < FEW_SECONDS  # not begun, then
        if not table.failed:
            run_row(name, spread, table)
        left += [name] if table.failed else []
    print(f"left: {','.join(left) or 'none'}; {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
