"""Start all ranks of a run on this machine: `hysparse launch --nproc 4 [overrides]`.

Checks the configuration once, before any rank starts, so that mistakes cost seconds and exit with
code 2. Then it starts the ranks, passes signals on to all of them, and sees to it that none is
left: where one has failed, the others get a short time to end by themselves and are killed then.
Its exit code is the run's; `status.json` says which rank began it, also if that rank could not.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from hysparse_megatron.command import INTERRUPTED, command, positive
from hysparse_megatron.config.blend import num_datasets
from hysparse_megatron.config.cli import arguments_of, load, run_parser
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.suggest import check, overview_of
from hysparse_megatron.rundir import amend_status, refuse_start
from hysparse_megatron.runtime.launcher import (
    LOOPBACK,
    STORE_DESCRIPTOR,
    loopback_interface,
    require_descriptors,
)
from hysparse_megatron.runtime.signals import signals_to_handle
from hysparse_megatron.status import STATES

from .checks import disk
from .findings import Level

SECONDS_TO_FOLLOW = 5.0
"""How long ranks may outlive one that failed: they have lost it, or will never notice."""
SECONDS_TO_END = 60.0
"""The same where it ended as it should."""
_LOOK_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_LAST_PORT = 65535
_FORCED = 128
"""Above this, a rank's code is that of a signal it was sent for the third time."""


@functools.partial(command, is_run=True)
def main(argv: Sequence[str]) -> int:
    """Run with `argv`, the command line without the program's name; returns the exit code."""
    return launch(argv).code


def launch(argv: Sequence[str]) -> Ending:
    """As `main`. Raises ConfigError for a run that is not started."""
    parser = run_parser("hysparse launch", "Train with several processes on this machine.")
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
        require_descriptors(num_ranks, num_datasets(config.data.blend))
        _look_at_the_disk(config, num_ranks)
    module = ["-m", "hysparse_megatron", *parsed.words]
    if parsed.show:
        return Ending(subprocess.run([sys.executable, *module], check=False).returncode)
    ranks = Ranks([sys.executable, *module], num_ranks)
    ending = ranks.wait()
    # After Ctrl-C the rank has said so.
    if ending.cause is not None and ending.code != INTERRUPTED:
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
    return dataclasses.replace(ending, told=ranks.told)


def _look_at_the_disk(config: Config, num_ranks: int) -> None:
    """Compare what is free with what the checkpoints will take, as `hysparse submit` does.

    Raises ConfigError if there is no room for one.
    """
    for finding in disk(config, overview_of(config, num_ranks)):
        text = f"{finding.what}: {finding.found}. {finding.fix}"
        if finding.level is Level.FAIL:
            raise ConfigError(text)
        if finding.level is Level.WARN:
            print(f"warning: {text}", flush=True)


@dataclass(frozen=True)
class Ending:
    """How a run ended: its exit code and the rank that began it."""

    code: int
    rank: int | None = None
    cause: str | None = None
    """What that rank could not tell, because it was killed."""
    told: bool = False
    """Whether a signal asked it to stop."""


class Ranks:
    """The running ranks of one run."""

    def __init__(self, command: Sequence[str], num_ranks: int) -> None:
        store = listen(_wanted_port())
        threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
        shared = {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(store.getsockname()[1]),
        }
        defaults = {"OMP_NUM_THREADS": threads, **loopback_interface()}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told = False
        for number in signals_to_handle():
            signal.signal(number, self._pass_on)
        for rank in range(num_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                own[STORE_DESCRIPTOR] = str(store.fileno())
            self.processes.append(
                subprocess.Popen(
                    command,
                    env={**defaults, **os.environ, **shared, **own},
                    pass_fds=[store.fileno()] if rank == 0 else [],
                    # Ctrl-C reaches the ranks through us, once, like any other signal.
                    start_new_session=True,
                    preexec_fn=_prepare_rank,
                )
            )
        store.close()  # rank 0 alone keeps it: it ends with that rank

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.told = True
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


def _prepare_rank() -> None:
    """Let the system kill a rank when the launcher dies, even by SIGKILL, and keep Ctrl-C for when
    it can be told in one line: see `expect_interrupt`. Runs in the rank."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wanted_port() -> int:
    text = os.environ.get("MASTER_PORT", "0")
    if not text.isdecimal() or int(text) > _LAST_PORT:
        raise ConfigError(f"MASTER_PORT: got {text}; allowed a port, up to {_LAST_PORT}")
    return int(text)


def listen(wanted: int = 0) -> socket.socket:
    """A socket at which the ranks meet, reachable from this machine alone.

    At port `wanted` if that is free, else at another one, with a note about it. Raises ConfigError
    if there is no loopback to listen at.
    """
    try:
        return _listen(wanted)
    except OSError as error:
        if wanted and error.errno in (errno.EADDRINUSE, errno.EACCES):
            print(f"note: port {wanted} cannot be used ({error.strerror}); taking another one")
            return listen()
        raise ConfigError(
            f"nobody can listen at {LOOPBACK}, where the ranks of this machine meet "
            f"({error.strerror}): bring up the loopback, ip link set lo up"
        ) from error


def _listen(port: int) -> socket.socket:
    server = socket.socket()
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((LOOPBACK, port))
        server.listen(socket.SOMAXCONN)
    except OSError:
        server.close()
        raise
    return server


if __name__ == "__main__":
    sys.exit(main())
