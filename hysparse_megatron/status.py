"""`status.json`: how a run stands, for people, launchers and schedulers.

| field                            | what it says                                    |
|----------------------------------|-------------------------------------------------|
| state                            | running, finished, or one of `STATES`           |
| step                             | steps done                                      |
| checkpoint_step, checkpoint_time | the newest checkpoint                           |
| checkpoint_age_seconds           | its age at `time`                               |
| restarts                         | starts in this directory before this one        |
| exit_code, cause, rank           | how and why it ended, and which rank began it   |
| host, pid                        | of rank 0, which writes the file                |
| started, time                    | of this start, and of this file, in UTC         |

What is not known is null. Rank 0 replaces the file whole; where it could not, the launcher does.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from hysparse_megatron.files import write_whole

STATUS_FILE = "status.json"

STATES = {3: "preempted", 4: "numerical_stop"}
"""By exit code; else `failed`. Before the end it is `running`, after it `finished`."""

_FIELDS = (
    "state",
    "step",
    "checkpoint_step",
    "checkpoint_time",
    "checkpoint_age_seconds",
    "restarts",
    "exit_code",
    "cause",
    "rank",
    "host",
    "pid",
    "started",
    "time",
)
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


class Status:
    """The status of one start; keeps what it was told and writes all of it every time."""

    def __init__(self, run_path: Path, restarts: int) -> None:
        self.path = run_path / STATUS_FILE
        self._checkpoint_seconds: float | None = None
        self._facts: dict[str, Any] = {
            "restarts": restarts,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": stamp(time.time()),
        }

    def saw_checkpoint(self, step: int, seconds: float) -> None:
        """Remember the newest checkpoint, written at `seconds` since the epoch."""
        self._checkpoint_seconds = seconds
        self._facts |= {"checkpoint_step": step, "checkpoint_time": stamp(seconds)}

    def write(self, state: str, **facts: Any) -> None:
        """Replace the file. `facts` are fields; those not given stay as they were."""
        now = time.time()
        self._facts |= facts
        if self._checkpoint_seconds is not None:
            age = round(now - self._checkpoint_seconds, 1)
            self._facts["checkpoint_age_seconds"] = age
        _write(self.path, {**self._facts, "state": state, "time": stamp(now)})


def stamp(seconds: float) -> str:
    """A time since the epoch, readable and in UTC."""
    return time.strftime(TIME_FORMAT, time.gmtime(seconds))


def read_status(run_path: Path) -> dict[str, Any]:
    """What the file says; empty if there is none or it is garbled."""
    try:
        return read_object(run_path / STATUS_FILE) or {}
    except OSError:
        return {}


def change_status(run_path: Path, **facts: Any) -> None:
    """Change fields of the file, or make one, where its writer cannot."""
    facts = {"host": socket.gethostname(), **facts, "time": stamp(time.time())}
    _write(run_path / STATUS_FILE, {**read_status(run_path), **facts})


def _write(path: Path, facts: dict[str, Any]) -> None:
    write_json(path, {field: facts.get(field) for field in _FIELDS})


def write_json(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    """Write a JSON file; see `write_whole`."""
    write_whole(path, json.dumps(content, indent=1) + "\n", durable=durable)


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON file's keys and values; None if it holds something else. Raises OSError."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
