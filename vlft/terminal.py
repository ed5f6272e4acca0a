"""Plain tables for the terminal and for logs, through rich."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> str:
    """Left-aligned first column, right-aligned others; plain text, no colours."""
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
