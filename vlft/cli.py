"""The process `vlft`: which command, an error printed once, the exit code.

Words become options in `vlft.parse` (training) and `vlft.commands` (the rest); nothing imports torch before they are
valid.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import NoReturn

from vlft import __version__
from vlft.allocator import prepare_allocator
from vlft.commands import COMMANDS, parse_command
from vlft.errors import ConfigError, VlftError
from vlft.manual import command_help, help_text
from vlft.parse import parse
from vlft.rivals import nearest
from vlft.words import without_local_rank

SILENT_SECONDS = 5.0
"""How long a process that repeats nothing stays; a launcher ends it sooner."""


def run() -> NoReturn:
    """`main` as a process of its own.

    After a brief command it ends as soon as all is written: Python would take a second to take PyTorch apart.
    """
    code = main()
    command = COMMANDS.get("".join(sys.argv[1:2]))
    if command is None or not command.brief:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # as in `main`
            stream.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """The words' work: runs a command, prints an error once, returns the exit code (see `vlft.errors`)."""
    prepare_allocator()  # here, before any command or plugin imports torch
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(words)
    except VlftError as error:
        if _first_to_say(str(error)):
            print(_report(error), file=sys.stderr, flush=True)
        else:
            # A launcher ends all processes when the first one does: leave the one that speaks the time to do so.
            time.sleep(SILENT_SECONDS)
        return _leave_group(error.exit_code)
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        text = "another process of this run ended, so the others cannot go on; its own words say why."
        if _first_to_say(text):
            print(f"vlft (rank {os.environ.get('RANK', '0')}): {text}", file=sys.stderr, flush=True)
        return _leave_group(1)
    except BrokenPipeError:
        # `vlft plugins | head`: the reader has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        # All is written and closed. A process of several that unwinds its libraries' threads now and then aborts in
        # them ("terminate called without an active exception"), and the launcher would call the run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _dispatch(words: list[str]) -> None:
    name, rest = ("train", words) if not words or words[0].startswith("-") else (words[0], words[1:])
    names = ("train", *COMMANDS)
    if name not in names:
        raise ConfigError(f"'{name}' is not a command{nearest(name, names)}; commands: {', '.join(names)}.")
    asks_help = bool({"--help", "-h"} & set(rest)) or words == []
    rest = [word for word in rest if word not in ("--help", "-h")]
    if "--version" in rest:
        print(f"vlft {__version__}")
    elif asks_help:
        print(command_help(COMMANDS[name]) if name in COMMANDS else help_text(rest))
    elif name in COMMANDS:
        with _seldom_collected() if COMMANDS[name].brief else nullcontext():
            COMMANDS[name].run(parse_command(COMMANDS[name], rest))
    else:
        _train(rest)


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Imports make some million objects that all stay. By default Python looks through them for garbage again and
    again, a seventh of the time of a plan. Not switched off: who made cycles without end would fill the memory."""
    before = gc.get_threshold()
    gc.set_threshold(200_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _train(words: list[str]) -> None:
    run = parse(words)
    # Only now: torch alone takes seconds, and a wrong flag must not wait for it.
    from vlft import train

    train.main(run)


def _report(error: VlftError) -> str:
    # Indented lines are examples that belong to the problem before them.
    problems = error.problems if isinstance(error, ConfigError) else re.split(r"\n(?! )", str(error))
    rank = os.environ.get("RANK", "0")
    head = "vlft: " if rank == "0" else f"vlft (rank {rank}): "
    if len(problems) == 1:
        return head + problems[0]
    return "\n".join([f"{head}{len(problems)} problems:", *(f"  * {problem}" for problem in problems)])


def _leave_group(code: int) -> int:
    """The exit code; a process of several ends here and now.

    Unwinding a process group whose other members are gone, or wait in a collective, aborts or hangs.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return code
    if distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _lost_another(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone: its reason is worth reading, this one is not."""
    return any(
        word in str(error)
        for word in (
            "closed by peer",
            "reset by peer",
            "Broken pipe",
            "remote process exited",
            "Connection was likely closed",
        )
    )


def _first_to_say(text: str) -> bool:
    """Whether this process is the one to print an error that others may have met too.

    Once the processes are connected they ask their common store. Before that, every process of a machine reads the
    same words and files, so its first one speaks: another machine may lack a file that rank 0 has.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # A restart by torchrun uses the same store.
        said = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {text}"
        try:
            store = distributed.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=5))
            return bool(store.add("vlft said " + hashlib.sha256(said.encode()).hexdigest(), 1) == 1)
        except Exception:
            # The store died with its owner: better twice than never.
            return True
    return "vlft.train" in sys.modules or os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


if __name__ == "__main__":
    run()
