"""What people see: on a real pseudo-terminal, in a pipe, on a dumb and on a narrow one; and what is left of it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import command, environment, launched, metrics, start, write_data

from vlft import terminal
from vlft.terminal import Line, Plain, duration, ending, table, thousands
from vlft.words import counted

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
COLOUR = re.compile(rb"\x1b\[[0-9;]*(3[0-7]|38;[0-9;]+|9[0-7])m")


def words(model: Path, folder: Path, **more: Any) -> list[str]:
    registry = write_data(folder, 20)
    options = {"max_steps": 6, "learning_rate_llm": 2e-3, "train_split_ratio": 0.8, "eval_steps": 3} | more
    return command(model, registry, folder / "out", "lora", **options)


class Watched:
    """A child whose stdout and stderr are one pseudo-terminal."""

    def __init__(self, line: list[str], *, columns: int = 100, fault: dict[str, Any] | None = None, **env: str) -> None:
        program, more = launched(line, fault=fault)
        self.main, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.before = termios.tcgetattr(child)
        self.child = child
        plain = {
            k: v for k, v in environment(**more).items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        }
        self.process = subprocess.Popen(
            program, stdin=child, stdout=child, stderr=child, env=plain | {"TERM": "xterm-256color"} | env
        )
        self.out = b""

    def read(self, until: bytes | None = None, limit: float = 200) -> bytes:
        """Everything up to `until`, or up to the end."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            ready, _, _ = select.select([self.main], [], [], 0.2)
            if ready:
                self.out += os.read(self.main, 65536)
            if until is not None and until in self.out:
                return self.out
            if not ready and self.process.poll() is not None:
                return self.out
        raise AssertionError(f"nothing of {until!r} in {limit} s: {self.out[-2000:]!r}")

    def ends(self) -> int:
        self.read()
        code = self.process.wait(30)
        # The settings of the terminal are as they were, and the cursor is not hidden.
        assert termios.tcgetattr(self.child) == self.before
        assert self.out.rfind(HIDE) <= self.out.rfind(SHOW)
        os.close(self.main)
        os.close(self.child)
        return code


def screen(raw: bytes, columns: int) -> list[str]:
    """The lines that a terminal shows in the end: carriage returns, lines up, cleared lines; wraps at its width."""
    lines, y, x = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]|\x1b", raw.decode("utf-8", "replace")):
        if piece == "\r":
            x = 0
        elif piece == "\n":
            y += 1
        elif piece.startswith("\x1b["):
            count = int(re.sub(r"\D", "", piece) or 1)
            if piece.endswith("A"):
                y = max(0, y - count)
            elif piece.endswith("K"):
                lines[y] = "" if piece in ("\x1b[2K",) else lines[y][:x]
        else:
            if x == columns:
                y, x = y + 1, 0
            while y >= len(lines):
                lines.append("")
            lines[y] = lines[y].ljust(x)[:x] + piece + lines[y][x + 1 :]
            x += 1
        while y >= len(lines):
            lines.append("")
    return [line.rstrip() for line in lines]


def test_a_run_on_a_terminal(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """One bar that moves, everything else above it whole, and an end that says what to do next."""
    seen = Watched(words(tiny(), tmp_path), fault={"kind": "slow", "seconds": 0.15})
    assert seen.ends() == 0
    assert seen.out.count(b"step 2/6") >= 1
    assert seen.out.count(b"left") >= 2
    lines = screen(seen.out, 100)
    text = "\n".join(lines)
    out = tmp_path / "out"
    # The bar is gone; what was said while it stood is there once and whole.
    assert "left" not in text.split("step 6/6  loss")[0].rpartition("part ")[2]
    assert sum(line.startswith("step 3/6  eval/toy/loss") for line in lines) == 1
    assert sum(line.startswith("step 6/6  loss") for line in lines) == 1
    assert "━" not in text
    assert sum("proved" in line for line in lines) == 1
    flat = "".join(lines)
    for command_line in ("vlft report", "vlft chat", "vlft merge", "vlft export"):
        assert command_line in flat
    assert str(out / "model") in flat
    assert f"eval/toy/loss {metrics(out, 'eval')[-1]['eval/toy/loss']:.4g} at step 6" in flat
    assert "data set" in text
    assert "every sample could be used" in text


@pytest.mark.slow
def test_the_bar_stands_below_a_warning(tiny: Callable[..., Path], tmp_path: Path) -> None:
    seen = Watched(words(tiny(), tmp_path), fault={"kind": "not_finite", "rows": [2]})
    assert seen.ends() == 0
    (warning,) = [line for line in screen(seen.out, 100) if line.startswith("skipped step 3")]
    assert warning.startswith("skipped step 3: its loss is not finite")


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_ctrl_c_leaves_the_terminal_as_it_was(tiny: Callable[..., Path], tmp_path: Path, twice: bool) -> None:
    seen = Watched(words(tiny(), tmp_path, max_steps=200), fault={"kind": "slow", "seconds": 0.3})
    seen.read(b"step 3/200")
    seen.process.send_signal(signal.SIGINT)
    if twice:
        seen.read(b"finishing the step")
        time.sleep(1.1)  # sooner it would count as the same one
        if seen.process.poll() is None:
            seen.process.send_signal(signal.SIGINT)
    code = seen.ends()
    assert code != 0
    lines = screen(seen.out, 100)
    assert any("SIGINT: finishing the step" in line for line in lines)
    assert lines[-1] == ""  # a shell's prompt would stand alone


@pytest.mark.slow
def test_an_error_leaves_the_terminal_as_it_was(tiny: Callable[..., Path], tmp_path: Path) -> None:
    fault = {"kind": "not_finite", "rows": list(range(2, 100))}
    seen = Watched(words(tiny(), tmp_path, max_steps=50, max_skipped_steps=2), fault=fault)
    assert seen.ends() not in (0, 1)
    lines = screen(seen.out, 100)
    assert any(line.startswith("vlft: 2 steps in a row had no finite loss") for line in lines)
    assert not any("━" in line for line in lines if "step" in line)


@pytest.mark.slow
def test_without_colours(tiny: Callable[..., Path], tmp_path: Path) -> None:
    seen = Watched(words(tiny(), tmp_path, max_steps=4), fault={"kind": "slow", "seconds": 0.15}, NO_COLOR="1")
    assert seen.ends() == 0
    assert b"left" in seen.out
    assert not COLOUR.search(seen.out)


@pytest.mark.slow
def test_a_dumb_terminal_gets_plain_lines(tiny: Callable[..., Path], tmp_path: Path) -> None:
    seen = Watched(words(tiny(), tmp_path, max_steps=4), TERM="dumb")
    assert seen.ends() == 0
    assert b"step 4/4  loss" in seen.out
    assert b"\x1b[" not in seen.out.replace(b"\x1b[A", b"")  # tqdm of other libraries goes up


@pytest.mark.slow
def test_forty_columns(tiny: Callable[..., Path], tmp_path: Path) -> None:
    seen = Watched(words(tiny(), tmp_path), columns=40, fault={"kind": "slow", "seconds": 0.15})
    assert seen.ends() == 0
    # No bar was ever wider than the terminal: then it would have wrapped, and old halves of it would be left.
    lines = screen(seen.out, 40)
    assert sum("left" in line for line in lines) == 0
    assert "proved" in "".join(lines)


def test_in_a_pipe(tiny: Callable[..., Path], tmp_path: Path) -> None:
    said = start(words(tiny(), tmp_path)).stdout
    assert "\x1b" not in said
    assert "\r" not in said
    lines = said.splitlines()
    assert sum(line.startswith("step 6/6  loss") for line in lines) == 1
    assert f"model: {tmp_path / 'out' / 'model'}" in lines
    assert lines[-1].startswith("  vlft export")


# Parts ---------------------------------------------------------------------------------------------------------------


def line(step: int, seconds: float = 2.0) -> dict[str, Any]:
    perf = {"step_seconds": seconds, "data_wait_seconds": 0.0, "tokens_per_second": 12345.6, "peak_memory_gib": 40.12}
    return {"step": step, "kind": "train", "loss": 1.23456, "grad_norm": 1.0, "skipped": None,
            "learning_rate": {"llm": 1e-5, "vit": 2e-6}, "perf": perf}  # fmt: skip


@pytest.mark.parametrize(
    ("width", "words", "bar"),
    [
        (120, ["step 10/400", "loss 1.2346", "lr 1.0e-05", "12.3k tok/s", "40.1 GiB", "13 min left"], 40),
        (70, ["step 10/400", "loss 1.2346", "lr 1.0e-05", "12.3k tok/s", "13 min left"], 5),
        (40, ["step 10/400", "loss 1.2346", "13 min left"], 0),
        (25, ["step 10/400", "loss 1.2346"], 0),
        (12, ["step 10/400"], 0),
    ],
)
def test_what_fits_into_a_width(width: int, words: list[str], bar: int) -> None:
    shown = Line(400)
    shown.take(line(10))
    found, left = shown.words(width)
    assert found == words
    assert min(max(left, 0), 40) >= bar
    assert len("  ".join(found)) + (2 + left if left >= terminal.SHORTEST_BAR else 0) <= max(width, 12)
    shown.what = "evaluating"
    assert shown.words(120)[0][-1] == "evaluating"
    shown.take(line(11))
    assert shown.words(120)[0][-1] != "evaluating"


def test_the_duration_is_estimated_once_and_only_for_long_runs(capsys: pytest.CaptureFixture[str]) -> None:
    long, short = Plain(1000), Plain(12)
    for step in range(1, 9):
        long.step(line(step, seconds=60.0 if step == 1 else 2.0))
        short.step(line(step))
    said = capsys.readouterr().out
    assert said.count("about") == 1
    assert "about 33 min for the other 995 steps (until" in said


def test_durations_and_thousands() -> None:
    assert [duration(s) for s in (4.2, 99, 100, 3599, 12000, 200000)] == [
        "4 s", "99 s", "2 min", "1 h 0 min", "3 h 20 min", "2 d 7 h",
    ]  # fmt: skip
    assert [thousands(v) for v in (7, 950, 12345, 1.2e6)] == ["7", "950", "12.3k", "1.2M"]


def test_one_is_no_plural() -> None:
    assert [counted(n, "step") for n in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]
    assert [counted(n, "patch") for n in (1, 2)] == ["1 patch", "2 patches"]
    assert [counted(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]


def test_the_last_words() -> None:
    said = ending("trained llm", ["eval/a/loss 1 at step 3"], 2, Path("run"), merges=False)
    assert said.splitlines() == [
        "trained llm",
        "eval/a/loss 1 at step 3",
        "2 samples were not used: run/ledger.jsonl says why",
        "model: run/model",
        "next:",
        "  vlft report run",
        '  vlft chat run/model --image PICTURE "QUESTION"',
        "  vlft export run --output_dir run/export",
    ]


def test_the_next_command_can_be_pasted() -> None:
    said = ending("trained llm", [], 1, Path("my run"), merges=True)
    assert "  vlft merge 'my run/model' --output_dir 'my run/merged'" in said.splitlines()
    assert "model: my run/model" in said.splitlines()
    assert "1 sample was not used: my run/ledger.jsonl says why" in said.splitlines()


def test_tables_fit() -> None:
    columns, rows = ("part", "parameters", "dtype"), [("projector", "1,234,567", "float32, float32 trained")]
    assert max(map(len, table(columns, rows, width=40).splitlines())) <= 40
    assert table(columns, rows, width=24) == "projector: parameters 1,234,567, dtype float32, float32 trained"
    assert "float32, float32 trained" in table(columns, rows)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "layout"), [("qlora", None), ("full", "zero3")])
def test_libraries_are_silent(tiny: Callable[..., Path], tmp_path: Path, strategy: str, layout: str | None) -> None:
    """What they tell beside progress is nothing that a user can change: an optional kernel, the device that DeepSpeed
    took, functions that it calls and PyTorch deprecates, at each call."""
    registry = write_data(tmp_path, 8)
    line = command(tiny(), registry, tmp_path / "out", strategy, max_steps=1, deepspeed=layout)
    done = start(line, processes=2 if layout else 1)
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and not line.startswith("indexing")]
    assert said == []
