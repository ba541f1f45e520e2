"""Faults on demand, for tests of reliability: `HYSPARSE_FAULT="kind@rank:step[:arg]"`.

Several are separated by commas. A step is counted as in `metrics.jsonl`, from 1; 0 is the
evaluation before the first. Without the variable nothing here does anything.

| kind                     | what happens on that rank at that step  |
|--------------------------|-----------------------------------------|
| nan                      | its loss, if it has one, becomes NaN    |
| spike                    | loss and gradient grow by `arg`, or 100 |
| nan_weight               | the update makes one of its weights NaN |
| sigterm, sigusr1,        | the rank gets that signal               |
| sigint, sighup, sigquit  |                                         |
| sigkill, sigstop         | it is killed, or stopped                |
| slow                     | it sleeps for `arg` seconds, or 1       |
| raise                    | it fails with a RuntimeError            |
| io_error                 | it fails with an OSError                |
| full_disk                | from then on it can write no more than  |
|                          | `arg` bytes into a file, or 100         |
| out_of_memory            | from then on it gets no more than `arg` |
|                          | bytes of memory, or none                |
| kill_before_manifest     | it is killed before the manifest    |

Kinds that do not touch numbers happen at a place, by default in the middle of the forward pass;
`arg` may name another: `sigusr1@1:4:evaluation`, `sigterm@0:4:save`, `slow@0:0:prepare/30`. At
`write` and `prune`, where files of a checkpoint are written or deleted, the step is that one's; at
`read` the one whose batches are read. `close`, at step 0, comes when `status.json` says how the run
ended, before rank 0 closes its trackers.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hysparse_megatron.errors import ConfigError

VARIABLE = "HYSPARSE_FAULT"

PLACES = ("read", "forward", "evaluation", "save", "write", "manifest", "prune", "prepare", "close")
"""Where the program passes by: see the calls of `reach`."""

_SIGNALS = {
    name.lower(): signal.Signals[name]
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGQUIT", "SIGKILL", "SIGSTOP")
}
_LOSS_KINDS = ("nan", "spike")
_WEIGHT_KIND = "nan_weight"
KINDS = (
    *_LOSS_KINDS,
    _WEIGHT_KIND,
    *_SIGNALS,
    "slow",
    "raise",
    "io_error",
    "full_disk",
    "out_of_memory",
    "kill_before_manifest",
)


@dataclass(frozen=True)
class Fault:
    """One entry of the variable."""

    kind: str
    rank: int
    step: int
    arg: str = ""

    @property
    def place(self) -> str:
        """Where it happens."""
        if self.kind == "kill_before_manifest":
            return "manifest"
        place = self.arg.partition("/")[0]
        return place if place in PLACES else "forward"

    def number(self, default: float) -> float:
        """The number in `arg`: seconds, or a factor."""
        text = self.arg.rpartition("/")[2]
        return default if text in ("", *PLACES) else float(text)


_armed: list[Fault] = []
_armed_memory: list[bytes] = []
"""What `out_of_memory` has taken."""


def parse(text: str) -> list[Fault]:
    """The faults that `text` names. Raises ConfigError for what is none."""
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        kind, _, where = entry.partition("@")
        rank, _, rest = where.partition(":")
        step, _, arg = rest.partition(":")
        if kind not in KINDS or not rank.isdecimal() or not step.isdecimal():
            raise ConfigError(
                f"{VARIABLE}: got {entry}; allowed kind@rank:step[:arg] with a kind of "
                f"{', '.join(KINDS)}"
            )
        faults.append(Fault(kind, int(rank), int(step), arg))
    return faults


def arm(rank: int) -> list[Fault]:
    """Read the variable and keep this rank's faults; returns those of all ranks."""
    faults = parse(os.environ.get(VARIABLE, ""))
    _armed[:] = [fault for fault in faults if fault.rank == rank]
    return faults


def reach(place: str, step: int) -> None:
    """Say that this rank is at `place` of `step`; what was asked for there happens, once."""
    numbers = (*_LOSS_KINDS, _WEIGHT_KIND)
    for fault in _due(lambda fault: fault.kind not in numbers and fault.place == place, step):
        if fault.kind == "raise":
            raise RuntimeError(f"a fault was asked for at step {step}")
        if fault.kind == "io_error":
            raise OSError(errno.EIO, f"a fault was asked for at step {step}")
        if fault.kind == "slow":
            time.sleep(fault.number(1))
        elif fault.kind == "full_disk":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.number(100)), hard))
        elif fault.kind == "out_of_memory":
            _use_up_memory(int(fault.number(0)))
        else:
            os.kill(os.getpid(), _SIGNALS.get(fault.kind, signal.SIGKILL))


def _use_up_memory(left: int) -> None:
    """Take all memory but `left` bytes, and get no more: raises MemoryError."""
    room = bytearray(left)
    with open("/proc/self/status") as file:
        (used,) = (int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used, hard))
    taken: list[bytes] = _armed_memory
    for size in (1 << 16, 1 << 9):
        try:
            while True:
                taken.append(bytes(size))
        except MemoryError:
            pass
    del room
    raise MemoryError("a fault was asked for")


def spoil[Loss](loss: Loss, step: int) -> Loss:
    """The loss of a micro-batch of `step`, or what a fault makes of it."""
    spoiled: Any = loss
    for fault in _due(lambda fault: fault.kind in _LOSS_KINDS, step):
        spoiled = spoiled * (float("nan") if fault.kind == "nan" else fault.number(100))
    return spoiled


def spoil_weight(weight: Any, step: int) -> None:
    """Make the first value of a parameter NaN if the update of `step` is to do that."""
    if _due(lambda fault: fault.kind == _WEIGHT_KIND, step):
        weight.detach().view(-1)[0] = float("nan")


def _due(wanted: Callable[[Fault], bool], step: int) -> list[Fault]:
    """Take the faults of `step` that are `wanted` out of the armed ones."""
    # A copy: checkpoints are written and deleted by threads.
    due = [fault for fault in tuple(_armed) if fault.step == step and wanted(fault)]
    for fault in due:
        _armed.remove(fault)
    return due
