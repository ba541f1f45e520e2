"""Whether a Slurm job goes on: `hysparse_megatron.launch.requeue --max-restarts N RUN_DIR`.

The job script asks at the end of every start. Prints `requeue: REASON` or `leave: REASON`, which
is also kept in RUN_DIR/requeue.json.

| how the start ended                               | goes on                                     |
|---------------------------------------------------|---------------------------------------------|
| pre-empted, or told to stop before it had begun   | yes                                         |
| failed, with a checkpoint newer than the last one | yes, `max-restarts` times in a row          |
| failed without one                                | no: it would fail again (a crash loop)      |
| finished, numerical stop, bad configuration, bad  | no                                          |
| data, no valid checkpoint                         |                                             |
"""

from __future__ import annotations

import calendar
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hysparse_megatron.command import command, make_parser
from hysparse_megatron.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericalStop,
    OutputError,
)
from hysparse_megatron.rundir import amend_status, holder
from hysparse_megatron.status import TIME_FORMAT, read_object, read_status, write_json

RECORD = "requeue.json"

_FINAL = {
    error.exit_code
    for error in (ConfigError, NumericalStop, DataError, CheckpointError, OutputError)
}


@dataclass(frozen=True)
class Decision:
    """Whether the job goes on, why, and what to remember for the next time."""

    goes_on: bool
    reason: str
    failures: int
    """Failures in a row, this one included."""
    checkpoint_step: int
    """Steps in the newest checkpoint of the run; 0 without one."""


def decide(
    status: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    is_of_this_start: bool,
    told: bool,
    max_restarts: int,
) -> Decision:
    """What to do after a start that left `status`, with what the last decision left in `record`.

    `told` says that the job was asked to stop; `is_of_this_start` that the start got far enough to
    write `status`.
    """
    before = _number(record, "checkpoint_step")
    saved = max(_number(status, "checkpoint_step"), before)
    failures = _number(record, "failures")
    state, code = status.get("state"), status.get("exit_code")
    # A finished run that is started again leaves its status as it was.
    if state == "finished" and (is_of_this_start or not told):
        return Decision(False, "finished", 0, saved)
    if not is_of_this_start:
        if told:
            return Decision(True, "told to stop before it had begun", failures, saved)
        return Decision(False, "it ended before it had begun: see its log", failures + 1, saved)
    if state == "preempted":
        return Decision(True, f"pre-empted: {status.get('cause')}", 0, saved)
    if code in _FINAL:
        return Decision(False, f"exit code {code} would come again", failures + 1, saved)
    failed = f"failed: {status.get('cause')}"
    if saved <= before:
        newest = f"no checkpoint after step {before}" if before else "no checkpoint"
        return Decision(False, f"{failed}; {newest}, so it would again", failures + 1, saved)
    failures += 1
    if failures > max_restarts:
        return Decision(False, f"{failed}; {failures} times in a row", failures, saved)
    return Decision(True, f"{failed}; it had got to step {saved}", failures, saved)


@command
def main(argv: Sequence[str]) -> int:
    """Decide by the run directory in `argv`, the command line without the program's name."""
    parser = make_parser("python -m hysparse_megatron.launch.requeue", __doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--max-restarts", type=int, required=True, metavar="N")
    parser.add_argument("--wrote", type=int, choices=(0, 1), help="status.json is of this start")
    parser.add_argument("--started", type=float, default=0.0, metavar="EPOCH", help="if not known")
    parser.add_argument("--told", type=int, choices=(0, 1), default=0, help="was asked to stop")
    args = parser.parse_args(list(argv))
    status = read_status(args.run_dir)
    if args.wrote is None:  # a job script of an older version, which asks the clock
        is_of_this_start = _seconds(status.get("started")) >= int(args.started)
    else:
        is_of_this_start = bool(args.wrote)
    if holder(args.run_dir) is not None:
        is_of_this_start = False  # another run owns the directory, and writes its status
    if is_of_this_start and status.get("state") == "running":
        # Nobody was left to write down how it ended.
        cause = "the ranks ended without a word: killed, or out of memory"
        pid = _number(status, "pid")
        amend_status(args.run_dir, pid, cause, state="failed", exit_code=1, rank=None)
        status = read_status(args.run_dir)
    decision = decide(
        status,
        _read(args.run_dir / RECORD),
        is_of_this_start=is_of_this_start,
        told=bool(args.told),
        max_restarts=args.max_restarts,
    )
    write_json(args.run_dir / RECORD, vars(decision))
    print(f"{'requeue' if decision.goes_on else 'leave'}: {decision.reason}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path) or {}
    except OSError:
        return {}


def _number(facts: Mapping[str, Any], key: str) -> int:
    """A count; 0 where it is missing or something else stands there."""
    value = facts.get(key)
    return value if isinstance(value, int) else 0


def _seconds(text: Any) -> float:
    try:
        return calendar.timegm(time.strptime(text, TIME_FORMAT))
    except (TypeError, ValueError):
        return 0.0


if __name__ == "__main__":
    sys.exit(main())
