"""Everything that vlft raises on purpose. One look says what to catch and which exit code a failure has.

    VlftError (1)
    ├── ConfigError (2)       options, registry: all problems at once
    ├── DataError (3)         a whole file or too large a part of the data cannot be used
    │   └── RecordError       one record or one picture cannot be used: goes to the ledger, never ends a run by itself
    ├── ModelError (4)        a checkpoint is missing, unreadable or of an unsupported type
    ├── StrategyError (5)     a plugin is missing, broken, in conflict, or broke its promise
    ├── CheckpointError (6)   the run folder cannot be written; a checkpoint cannot be read or continued
    ├── TrainingError (7)     the run itself cannot go on
    │   ├── StoppedError (8)        a signal asked for the end: the step was finished and saved
    │   └── DeviceMemoryError (9)   the device's memory does not do, where that cannot be mended within the run
    └── MismatchError (10)    a result does not say what its run trained, or whether it does cannot be told

The number is the process's exit code. A message is one sentence: what was found, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class VlftError(Exception):
    exit_code: ClassVar[int] = 1


class ConfigError(VlftError):
    """Every problem of a configuration, in the order of the options."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(VlftError):
    exit_code = 3


class RecordError(DataError):
    """`reason` is a short stable word for counting (`image_missing`), the message says the rest."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str]]:
        # Exceptions pickle by their args; without this a worker's RecordError dies on the way back.
        return (RecordError, (self.reason, str(self)))


class ModelError(VlftError):
    exit_code = 4


class StrategyError(VlftError):
    exit_code = 5


class CheckpointError(VlftError):
    exit_code = 6


class TrainingError(VlftError):
    exit_code = 7


class StoppedError(TrainingError):
    exit_code = 8


class DeviceMemoryError(TrainingError):
    exit_code = 9


class MismatchError(VlftError):
    exit_code = 10
