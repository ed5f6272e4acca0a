"""report.html: one page without a network, made from the files of a run folder alone.

`write` makes a run's own page, `compare` lays runs side by side. A page is a function of its files: written twice it is
the same to the byte. It has no script; its content security policy refuses everything but its own pictures and style.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlft.errors import CheckpointError, ConfigError

NAME = "report.html"


def write(root: Path) -> Path:
    """Write ROOT/report.html and return its path.

    Raises:
        ConfigError: `root` is not the folder of a run.
        CheckpointError: the page cannot be written.
    """
    return compare([root], root / NAME)


def compare(roots: Sequence[Path], output: Path) -> Path:
    """Write one page over the runs in `roots` to the file `output` and return it; of one run it is that run's page.

    Raises:
        ConfigError: there is none, or one is not the folder of a run.
        CheckpointError: the page cannot be written.
    """
    from vlft.report.page import render
    from vlft.report.read import read

    if not roots:
        raise ConfigError("report: name the folder of at least one run.")
    return write_page(render([read(root) for root in roots]), output)


def write_page(page: str, output: Path) -> Path:
    """Write a page to the file `output` and return it.

    Raises:
        CheckpointError: it cannot be written.
    """
    # Beside and renamed, so that a browser never loads half a page.
    beside = output.with_name(f".writing-{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
        beside.write_bytes(page.encode("utf-8", "replace"))
        beside.replace(output)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}; free some space or name another file.") from error
    return output
