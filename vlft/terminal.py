"""What people see of a run: tables, a start, steps, an end. Only the main process speaks.

`Terminal` has two faces. `Plain` writes lines, at most one a second, for logs and pipes. `Bar` keeps one line at the
foot of a terminal, with everything else above it. It hides no cursor, reads no keys and starts no thread, so that a
process that is killed leaves nothing to repair and forked data workers inherit no lock.
"""

from __future__ import annotations

import io
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vlft.words import counted

WIDTH = 120
"""Of a table, in columns, where no terminal says its own."""
QUIET_SECONDS = 1.0
"""Between two lines of steps."""
REDRAW_SECONDS = 0.1
FIRST_STEPS = 5
"""Steps after which the duration is estimated; the first of them, which compiles and warms up, does not count."""
WORTH_TELLING = 30.0
"""Seconds: a shorter run needs no estimate."""
SHORTEST_BAR = 8
"""Columns."""


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, width: int | None = None
) -> str:
    """Left-aligned first column, right-aligned others; plain text, no colours.

    Where far too little room is for columns, each row is a sentence of its own.

    Args:
        width: columns of text; None: the terminal's, or `WIDTH` in a log.
    """
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    out = io.StringIO()
    if width is None:
        width = Console().width if sys.stdout.isatty() else WIDTH
    console = Console(file=out, width=width, color_system=None)
    if console.measure(drawn, options=console.options.update(max_width=10 * WIDTH)).maximum > 1.5 * width:
        heads = columns[1:]
        return "\n".join(
            f"{first}: " + ", ".join(f"{head} {cell}" for head, cell in zip(heads, cells, strict=True) if cell)
            for first, *cells in rows
        )
    console.print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def figure(value: float | None) -> str:
    """Four digits; a dash for what is not finite and therefore written as null."""
    return "-" if value is None else f"{value:.4g}"


def thousands(value: float) -> str:
    """`950`, `12.3k`, `1.2M`."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def dataset_table(datasets: Mapping[str, Mapping[str, int]]) -> str:
    """Samples of each data set that train and that are held out, as data.json counts them."""
    rows = [(name, f"{counts['train']:,}", f"{counts['held_out']:,}") for name, counts in datasets.items()]
    if len(rows) > 1:
        train, held_out = (sum(counts[side] for counts in datasets.values()) for side in ("train", "held_out"))
        rows.append(("all", f"{train:,}", f"{held_out:,}"))
    return table(("data set", "train", "held out"), rows)


def ending(trained: str, results: Sequence[str], unused: int, run: Path, *, merges: bool) -> str:
    """The last words of a run.

    Args:
        trained: a sentence about what was.
        results: sentences about the metrics.
        unused: samples in the ledger.
        merges: the result is an adapter.
    """
    model, root = shlex.quote(str(run / "model")), shlex.quote(str(run))
    were = f"{counted(unused, 'sample')} {'was' if unused == 1 else 'were'} not used"
    ledger = f"{were}: {run / 'ledger.jsonl'} says why" if unused else "every sample could be used"
    lines = [trained, *results, ledger, f"model: {run / 'model'}", "next:"]
    lines += [f"  vlft report {root}", f'  vlft chat {model} --image PICTURE "QUESTION"']
    lines += [f"  vlft merge {model} --output_dir {shlex.quote(str(run / 'merged'))}"] if merges else []
    lines += [f"  vlft export {root} --output_dir {shlex.quote(str(run / 'export'))}"]
    return "\n".join(lines)


class Terminal:
    """The interface, and the face of a process that says nothing."""

    def say(self, text: str) -> None:
        """Lines for people."""

    def step(self, line: Mapping[str, Any]) -> None:
        """A train line of metrics.jsonl."""

    def evaluated(self, line: Mapping[str, Any]) -> None:
        """An eval line."""

    def doing(self, what: str) -> None:
        """What takes the time until the next step."""

    def close(self) -> None:
        """Nothing follows but plain words. May be called twice."""


class Plain(Terminal):
    def __init__(self, total: int) -> None:
        """`total`: steps of the run."""
        self.total = total
        self._spoke = 0.0
        self._seen = 0
        self._seconds = 0.0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def step(self, line: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._spoke >= QUIET_SECONDS or line["step"] == self.total:
            self._spoke = now
            self.say(sentence(line, self.total))
        self._estimate(line)

    def evaluated(self, line: Mapping[str, Any]) -> None:
        found = "  ".join(f"{k} {figure(v)}" for k, v in line.items() if k.startswith("eval/"))
        self.say(f"step {line['step']}/{self.total}  {found}")

    def _estimate(self, line: Mapping[str, Any]) -> None:
        self._seen += 1
        if 1 < self._seen <= FIRST_STEPS:
            self._seconds += line["perf"]["step_seconds"] + line["perf"]["data_wait_seconds"]
        left = self.total - line["step"]
        expected = left * self._seconds / (FIRST_STEPS - 1)
        if self._seen == FIRST_STEPS and expected >= WORTH_TELLING:
            at = time.strftime("%a %H:%M", time.localtime(time.time() + expected))
            self.say(f"about {duration(expected)} for the other {left} steps (until {at}), evaluations not counted.")


class _SteadyConsole(Console):
    """Never hides the cursor: a process that is killed could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002
        return False


class Bar(Plain):
    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.console = _SteadyConsole(file=sys.stdout, highlight=False)
        self._live: Live | None = None
        self._drawn = 0.0
        self._line = Line(total)

    def say(self, text: str) -> None:
        if self._live is None:
            super().say(text)
        else:
            self.console.print(Text(text), soft_wrap=True)

    def step(self, line: Mapping[str, Any]) -> None:
        self._line.take(line)
        if self._live is None:
            self._open()
        self._estimate(line)
        if line["step"] >= self.total:
            self.close()
            self.say(sentence(line, self.total))
        elif time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._redraw()

    def doing(self, what: str) -> None:
        self._line.what = what
        if self._live is not None:
            self._redraw()

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _open(self) -> None:
        # An empty line below: if the process is killed, the shell's prompt stands there, not behind the bar.
        self._live = Live(
            Group(self._line, Text("")), console=self.console, auto_refresh=False, transient=True,
            redirect_stderr=sys.stderr.isatty(),
        )  # fmt: skip
        self._live.start(refresh=True)

    def _redraw(self) -> None:
        self._drawn = time.monotonic()
        if self._live is not None:
            self._live.refresh()


class Line:
    """The bar: what fits into the terminal's width, the most important first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.what = ""
        """That takes long now."""
        self._at = 0
        self._seconds: float | None = None
        """Of a step and its wait, lately."""
        self._facts: dict[str, str] = {}

    def take(self, line: Mapping[str, Any]) -> None:
        perf = line["perf"]
        last = perf["step_seconds"] + perf["data_wait_seconds"]
        self._at, self.what = int(line["step"]), ""
        self._seconds = last if self._seconds is None else 0.9 * self._seconds + 0.1 * last
        self._facts = {
            "loss": "loss -" if line["loss"] is None else f"loss {line['loss']:.4f}",
            "left": f"{duration((self.total - self._at) * self._seconds)} left",
            "tokens": f"{thousands(perf['tokens_per_second'])} tok/s",
            "rate": f"lr {max(line['learning_rate'].values(), default=0.0):.1e}",
            "memory": f"{perf['peak_memory_gib']:.1f} GiB",
        }

    def words(self, width: int) -> tuple[list[str], int]:
        """What stands in a line of `width` columns, in its order, and the columns that are left for the bar itself."""
        order = ("loss", "rate", "tokens", "memory", "left")
        head = f"step {self._at}/{self.total}"
        room = width - len(head) - (len(self.what) + 2 if self.what else 0)
        kept = set()
        for name in ("loss", "left", "tokens", "rate", "memory"):
            needed = len(self._facts.get(name, "")) + 2
            if name in self._facts and needed <= room:
                kept.add(name)
                room -= needed
        words = [head, *(self._facts[name] for name in order if name in kept), *([self.what] if self.what else [])]
        return words, room - 2

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        words, left = self.words(options.max_width)
        row = Table.grid(padding=(0, 2, 0, 0))
        cells: list[Any] = [Text(word, no_wrap=True) for word in words]
        if left >= SHORTEST_BAR:
            cells.insert(1, ProgressBar(total=self.total, completed=self._at, width=min(left, 40)))
        row.add_row(*cells)
        yield row


def open_terminal(total: int, *, speaks: bool) -> Terminal:
    """The face that fits to stdout.

    Args:
        total: steps of the run.
        speaks: False on every process but the main one.
    """
    if not speaks:
        return Terminal()
    console = Console()
    return Bar(total) if sys.stdout.isatty() and not console.is_dumb_terminal else Plain(total)


def sentence(line: Mapping[str, Any], total: int) -> str:
    """A train line in words."""
    perf = line["perf"]
    rates = " ".join(f"{part} {rate:.2e}" for part, rate in line["learning_rate"].items())
    loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
    norm = "-" if line["grad_norm"] is None else f"{line['grad_norm']:.3g}"
    skipped = f"  skipped ({line['skipped']})" if line["skipped"] else ""
    return (
        f"step {line['step']}/{total}  loss {loss}  grad {norm}{skipped}  lr {rates}  "
        f"{perf['tokens_per_second']:.0f} tok/s  {perf['peak_memory_gib']:.1f} GiB"
    )
