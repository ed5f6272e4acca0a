"""SIGTERM and SIGINT as a question that the loop asks between steps: finish, save, then end.

A thread reads the signals from the interpreter's wakeup descriptor, because a handler in Python waits until the main
thread leaves a collective or a kernel, and a second Ctrl-C must end a process that hangs there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 1.0
"""The same signal again within this time is the same wish: a terminal and a launcher both pass on one Ctrl-C."""


class Interrupt:
    """While entered: the first signal sets `name`, a second one ends the process at once (128 + its number)."""

    def __init__(self, *, speaks: bool = True) -> None:
        """`speaks`: print what a signal started; one process of a run does."""
        self.name: str | None = None
        """Of the signal that asks for the end, or None."""
        self._speaks = speaks

    @property
    def asked(self) -> bool:
        return self.name is not None

    def __enter__(self) -> Interrupt:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, _leave_to_thread) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # The reader's end sees this and its thread ends.
        self._writer.close()

    def _listen(self) -> None:
        last, when = 0, 0.0
        while received := self._reader.recv(1):
            number, now = received[0], time.monotonic()
            if number not in SIGNALS or (number == last and now - when < ECHO_SECONDS):
                continue
            if self.name is not None:
                self._say("a second signal: ending at once; the last checkpoint is whole.")
                os._exit(128 + number)
            last, when = number, now
            self.name = signal.Signals(number).name
            self._say(f"{self.name}: finishing the step and saving; a second signal ends at once.")
        self._reader.close()

    def _say(self, text: str) -> None:
        if self._speaks:
            print(f"vlft: {text}", file=sys.stderr, flush=True)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """A handler must exist, or the signal keeps its default and the wakeup descriptor gets nothing."""
