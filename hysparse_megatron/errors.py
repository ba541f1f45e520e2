"""The errors a run may end with, each with its process exit code.

| code | error             | meaning                                                   |
|------|-------------------|-----------------------------------------------------------|
| 0    |                   | finished                                                  |
| 2    | `ConfigError`     | bad configuration, found before any process group exists  |
| 3    | `Preempted`       | asked to stop; a checkpoint was saved, restart to go on   |
| 4    | `NumericalStop`   | too many bad (NaN, Inf or spiking) steps in a row         |
| 5    | `DataError`       | bad, missing or changed data                              |
| 6    | `CheckpointError` | no valid checkpoint to load, or one that cannot be saved  |
| 6    | `OutputError`     | metrics or status cannot be written: a full disk          |
| 130  |                   | Ctrl-C in a tool, or before a run has begun               |
| else |                   | a crash: a bug of ours or a fault of the machine          |

A rank that another one took along ends with that one's code, or as `RankFailure` with 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class HySparseError(Exception):
    """Base of all errors whose message is meant for the user, not for a traceback."""

    exit_code: int = 1


@dataclass(frozen=True)
class Problem:
    """A setting that cannot stand: its full key, what it was given, what it may be."""

    key: str
    got: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.key}: got {self.got}; allowed {self.allowed}"


def did_you_mean(meant: Sequence[str]) -> str:
    """The end of a message about a word nobody knows, with what may be meant; empty without."""
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


class ConfigError(HySparseError):
    """The configuration cannot be run. `problems` holds each mistake by its key, where known."""

    exit_code = 2

    def __init__(self, message: str, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class Preempted(HySparseError):
    """The run was told to stop (signal, time limit, stop file) and has saved a checkpoint."""

    exit_code = 3


class NumericalStop(HySparseError):
    """Training stopped because its numbers stopped making sense."""

    exit_code = 4


class DataError(HySparseError):
    """The training data is missing, damaged, or not the data this run started with."""

    exit_code = 5


class CheckpointError(HySparseError):
    """A checkpoint was asked for and no valid one could be used."""

    exit_code = 6


class OutputError(HySparseError):
    """The run directory cannot be written any more. What could be saved was saved."""

    exit_code = 6


class RankFailure(HySparseError):
    """Another rank is missing, failed, or does not answer. `rank` is the one that began it."""

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank
