"""Start all ranks of a run on this machine: `python -m launch.local --nproc 4 [overrides]`.

Checks the configuration once, before any rank starts, so that mistakes cost seconds and exit with
code 2. Then it starts the ranks, passes signals on to all of them, and sees to it that none is
left: where one has failed, the others get a short time to end by themselves and are killed then.
Its exit code is the run's; `status.json` says which rank began it, also if that rank could not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from hysparse_megatron.command import command, positive
from hysparse_megatron.config.cli import arguments_of, load, run_parser
from hysparse_megatron.plan.suggest import check
from hysparse_megatron.rundir import amend_status, refuse_start
from hysparse_megatron.status import STATES

SECONDS_TO_FOLLOW = 5.0
"""How long ranks may outlive one that failed: they have lost it, or will never notice."""
SECONDS_TO_END = 60.0
"""The same where it ended as it should."""
_LOOK_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_FORCED = 128
"""Above this, a rank's code is that of a signal it was sent for the third time."""


@command
def main(argv: Sequence[str]) -> int:
    """Run with `argv`, the command line without the program's name; returns the exit code."""
    parser = run_parser("launch.local", "Train with several processes on this machine.")
    parser.add_argument(
        "--nproc",
        "--nproc-per-node",
        "--nproc_per_node",
        type=positive,
        default=1,
        metavar="RANKS",
        help="processes, the ranks of the run (default 1); torchrun's name does as well",
    )
    found = parser.parse_intermixed_args(list(argv))
    num_ranks, parsed = found.nproc, arguments_of(found)
    config = load(parsed)
    if not parsed.show:
        check(config, num_ranks)
        refuse_start(config)
    module = ["-m", "hysparse_megatron", *parsed.words]
    if parsed.show:
        return subprocess.run([sys.executable, *module], check=False).returncode
    ranks = Ranks([sys.executable, *module], num_ranks)
    ending = ranks.wait()
    if ending.cause is not None:
        print(ending.cause, file=sys.stderr, flush=True)
    if ending.code not in (0, 2):  # a bad configuration was no start
        amend_status(
            config.run_path,
            ranks.processes[0].pid,
            ending.cause,
            state=STATES.get(ending.code, "failed"),
            exit_code=ending.code,
            rank=ending.rank,
        )
    return ending.code


@dataclass(frozen=True)
class Ending:
    """How a run ended: its exit code and the rank that began it."""

    code: int
    rank: int | None = None
    cause: str | None = None
    """What that rank could not tell, because it was killed."""


class Ranks:
    """The running ranks of one run."""

    def __init__(self, command: Sequence[str], num_ranks: int) -> None:
        port = free_port(int(os.environ.get("MASTER_PORT", "0")))
        threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
        shared = {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._pass_on)
        for rank in range(num_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(
                subprocess.Popen(
                    command,
                    env={"OMP_NUM_THREADS": threads, **os.environ, **shared, **own},
                    # Ctrl-C reaches the ranks through us, once, like any other signal.
                    start_new_session=True,
                    preexec_fn=_end_with_launcher,
                )
            )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> Ending:
        """Wait until no rank is left.

        The code is the one of the first rank that failed; a rank killed by a signal makes it 1.
        """
        first: int | None = None
        deadline = float("inf")
        while any(process.poll() is None for process in self.processes):
            first = self._first_failed() if first is None else first
            if first is not None or any(process.poll() == 0 for process in self.processes):
                crashed = first is not None and self.processes[first].poll() not in STATES
                allowed = SECONDS_TO_FOLLOW if crashed else SECONDS_TO_END
                deadline = min(deadline, time.monotonic() + allowed)
            if time.monotonic() > deadline:
                return self._kill_the_rest(first)
            time.sleep(_LOOK_SECONDS)
        first = self._first_failed() if first is None else first
        if first is None:
            return Ending(0)
        code = self.processes[first].returncode
        if code < 0:
            return Ending(1, first, f"rank {first} was killed by {_signal_name(-code)}")
        if code > _FORCED:
            name = _signal_name(code - _FORCED)
            return Ending(code, first, f"rank {first} was forced to end by {name}")
        return Ending(code, first)

    def _first_failed(self) -> int | None:
        """A rank that ended with another code than 0, one killed by a signal before others."""
        codes = [(rank, process.poll()) for rank, process in enumerate(self.processes)]
        failed = [(code, rank) for rank, code in codes if code]
        return min(failed)[1] if failed else None

    def _kill_the_rest(self, first: int | None) -> Ending:
        left = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
        for rank in left:
            with contextlib.suppress(ProcessLookupError):
                self.processes[rank].kill()
        for process in self.processes:
            process.wait()
        named = ", ".join(map(str, left))
        text = f"rank {named} did not end after the others and was killed: stopped or hanging"
        code = self.processes[first].returncode if first is not None else 1
        if first is not None and code < 0:
            return Ending(1, first, f"rank {first} was killed by {_signal_name(-code)}; {text}")
        return Ending(code, left[0], text)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _end_with_launcher() -> None:
    """Let the system kill a rank when the launcher dies, even by SIGKILL. Runs in the rank."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there, else a free port, with a note about it."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            print(f"note: port {wanted} cannot be used ({error.strerror}); taking another one")
            return free_port()
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
