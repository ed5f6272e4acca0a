"""One rank's call that every rank ends now, for engines whose ranks sit inside a collective that will never finish."""

from __future__ import annotations

import os
import threading
import time

from vlft.engine.store import common_store, this_attempts

LISTEN_SECONDS = 1.0
SPEAK_SECONDS = 2.0
"""Left to the rank that rang, to say why, before a launcher sees the others end and ends it too."""


class Alarm:
    """Call on every rank once the processes are connected. A thread asks the ranks' common store."""

    def __init__(self) -> None:
        self._store, self._key = common_store(), this_attempts("alarm")
        self._rang = False
        threading.Thread(target=self._listen, daemon=True).start()

    def ring(self, exit_code: int) -> None:
        """End all other ranks with `exit_code`, within a few seconds."""
        self._rang = True
        self._store.set(self._key, str(exit_code))

    def _listen(self) -> None:
        while not self._rang:
            time.sleep(LISTEN_SECONDS)
            try:
                if not self._store.check([self._key]) or self._rang:
                    continue
                code = int(self._store.get(self._key))
            except (RuntimeError, ValueError):
                return  # the store ended with its owner: the launcher ends this process
            time.sleep(SPEAK_SECONDS)
            os._exit(code)
