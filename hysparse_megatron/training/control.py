"""Stop flags: what one rank has noticed becomes a decision of all ranks.

Every flag is an entry of one small vector, all-reduced once a step between backward pass and
update, in evaluation, and while data is prepared. So nobody stops, skips or goes on alone.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from hysparse_megatron.errors import DataError, HySparseError, OutputError, Preempted
from hysparse_megatron.runtime.agreement import agree_on
from hysparse_megatron.runtime.signals import STOP_SIGNALS, signals_to_handle
from hysparse_megatron.runtime.worker import Worker

SIGNALS_TO_FORCE = 3
"""The first asks, the second is one too many in a hurry; this one ends the rank where it stands."""

STOP_FILE = "stop"
"""A file of this name in the run directory stops the run; it is deleted when it has."""

_LOOK_SECONDS = 0.5


class Flag(IntEnum):
    """What a rank may have to say, by its place in the vector."""

    SIGTERM = 0
    SIGUSR1 = 1
    SIGINT = 2
    SIGHUP = 3
    SIGQUIT = 4
    DEADLINE = 5
    STOP_FILE = 6
    LOST_OUTPUT = 7
    """A row, or the status, cannot be written."""
    LOSS_NOT_FINITE = 8
    GRADIENT_NOT_FINITE = 9
    LOSS_SPIKE = 10
    GRADIENT_SPIKE = 11
    BUSY = 12
    """Not done preparing; the others wait."""
    DATA_CHANGED = 13
    """A data file does not hold what its card says."""


_SIGNALS = (Flag[number.name] for number in STOP_SIGNALS)
STOPS = (*_SIGNALS, Flag.DEADLINE, Flag.STOP_FILE, Flag.LOST_OUTPUT)


class Signals:
    """Remembers stop signals, also while the main thread waits in a collective.

    Python runs signal handlers between two bytecodes, which a rank that waits for another one does
    not reach. The interpreter's wake-up descriptor is written at once; a thread reads it. The main
    thread, when it gets to the handler, waits for that thread: so the next poll knows the signal.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._handled = 0
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in signals_to_handle():
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        Worker(functools.partial(self._listen, reader))

    def _handle(self, *_: object) -> None:
        self._handled += 1
        patience = time.monotonic() + _LOOK_SECONDS
        while len(self.received) < self._handled and time.monotonic() < patience:
            time.sleep(0.001)

    def _listen(self, reader: socket.socket) -> None:
        while True:
            for number in reader.recv(16):
                if number in STOP_SIGNALS:
                    self._remember(number)

    def _remember(self, number: int) -> None:
        self.received.append(number)
        name = signal.Signals(number).name
        if len(self.received) == SIGNALS_TO_FORCE:
            _tell(f"{name} is the third signal: leaving without saving")
            os._exit(128 + number)
        if len(self.received) > 1:
            _tell(f"{name} ignored: already stopping; a third signal forces the end")


def _tell(text: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    print(f"rank {rank}: {text}", file=sys.stderr, flush=True)


class Deadline:
    """When a run has to stop so that its last checkpoint is saved in time. Times are in seconds."""

    def __init__(self, minutes: float | None, environment: Mapping[str, str] = os.environ) -> None:
        """`minutes` from now; without, the end of the Slurm job, if this is one."""
        self._started = time.time()
        self.end: float | None = None
        if minutes is not None:
            self.end = self._started + 60 * minutes
        elif environment.get("SLURM_JOB_END_TIME", "").isdecimal():
            self.end = float(environment["SLURM_JOB_END_TIME"])
        self._save_seconds = 0.0
        self._step_seconds = 0.0
        self._is_first_step = True

    def saw_save(self, seconds: float) -> None:
        """Learn how long a save takes."""
        self._save_seconds = max(self._save_seconds, seconds)

    def saw_step(self, seconds: float) -> None:
        """Learn how long a step takes; a start's first one, which compiles, says nothing of it."""
        if not self._is_first_step:
            self._step_seconds = seconds
        self._is_first_step = False

    def reserve(self) -> float:
        """How long before the end to stop: half more than the longest save, and two steps.

        Before the first save a tenth of the time given, five minutes at most.
        """
        if self.end is None:
            return 0.0
        save = 1.5 * self._save_seconds or min(300.0, (self.end - self._started) / 10)
        return save + 2 * self._step_seconds + 2.0

    def is_near(self) -> bool:
        """Whether it is time to save."""
        return self.end is not None and time.time() + self.reserve() >= self.end


class Watch:
    """One rank's flags, and what all ranks agreed on."""

    def __init__(
        self, device: torch.device, signals: Signals, deadline: Deadline, stop_file: Path
    ) -> None:
        self._device = device
        self._signals = signals
        self.deadline = deadline
        self._stop_file = stop_file
        self.stopping: str | None = None
        """Why all ranks stop, and which rank noticed; None while they go on."""
        self.stopping_rank: int | None = None
        self.data_problem: Callable[[], DataError | None] = lambda: None
        """What this rank has found out about its data files meanwhile."""
        self._lost_output = ""
        self._output_lost_by: int | None = None

    def poll(self, raised: Iterable[Flag] = ()) -> dict[Flag, int]:
        """Flags that are up on some rank, `raised` here among them, each with a rank that has it.

        Collective, one all-reduce. A stop is remembered in `stopping`.

        Raises:
            DataError: on all ranks, if one has a `data_problem`.
        """
        problem = self.data_problem()
        mine = {*raised, *self._stops()} | ({Flag.DATA_CHANGED} if problem else set())
        vector = [dist.get_rank() + 1 if flag in mine else 0 for flag in Flag]
        flags = torch.tensor(vector, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        found = {flag: rank - 1 for flag, rank in zip(Flag, flags.tolist(), strict=True) if rank}
        if Flag.DATA_CHANGED in found:
            agree_on((None, problem))
        for flag in STOPS:
            if flag in found and self.stopping is None:
                name = flag.name if flag.name.startswith("SIG") else flag.name.lower()
                self.stopping = f"{name.replace('_', ' ')} on rank {found[flag]}"
                self.stopping_rank = found[flag]
        if self._output_lost_by is None:
            self._output_lost_by = found.get(Flag.LOST_OUTPUT)
        return found

    def lose_output(self, error: OSError) -> None:
        """Say that what this rank writes cannot be written; all ranks stop at the next poll."""
        self._lost_output = self._lost_output or str(error)

    def _stops(self) -> Iterable[Flag]:
        yield from (Flag[signal.Signals(number).name] for number in set(self._signals.received))
        if self.deadline.is_near():
            yield Flag.DEADLINE
        # Not Path.exists, which raises what a file system that is away for a moment answers.
        if dist.get_rank() == 0 and os.path.exists(self._stop_file):
            yield Flag.STOP_FILE
        if self._lost_output:
            yield Flag.LOST_OUTPUT

    def forget_stop_file(self) -> None:
        """Delete the stop file for the next start, or say that it cannot be. Call it on rank 0."""
        try:
            self._stop_file.unlink(missing_ok=True)
        except OSError as error:
            why = error.strerror or error
            _tell(f"WARNING: {self._stop_file} cannot be deleted ({why}): the next start stops too")

    def attend[Result](self, action: Callable[[], Result]) -> Result:
        """Run `action`, which must not use process groups, in a thread, polling until all are done.

        Collective. Raises what `action` raises, or Preempted when a stop is agreed on; the thread
        is left behind then and ends with the process.
        """
        outcome: list[Result] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                outcome.append(action())
            except BaseException as error:
                failure.append(error)

        thread = Worker(work)
        busy = True
        while busy:
            thread.join(_LOOK_SECONDS)
            busy = Flag.BUSY in self.poll([Flag.BUSY] if thread.is_alive() else ())
            self.stop_before_first_step()
        if failure:
            raise failure[0]
        return outcome[0]

    def wait_while(self, is_busy: Callable[[], bool]) -> None:
        """Poll until `is_busy` on no rank, however long that takes. Collective."""
        while Flag.BUSY in self.poll([Flag.BUSY] if is_busy() else ()):
            time.sleep(_LOOK_SECONDS)

    def stop_before_first_step(self) -> None:
        """Raise Preempted if a stop was agreed on: there is nothing to save yet."""
        if self.stopping is not None:
            raise self.ending("before any step of this start; nothing new to save")

    def ending(self, where: str) -> HySparseError:
        """The error to stop with, `where` training stands."""
        if self._output_lost_by is None:
            return Preempted(f"stopped by {self.stopping} {where}. The same command continues")
        why = self._lost_output or f"see rank {self._output_lost_by}"
        return OutputError(
            f"{self._stop_file.parent} cannot be written ({why}); "
            f"stopped {where}. Make room there, and the same command continues"
        )

    def require_output(self) -> None:
        """Raise OutputError on all ranks if what belongs to the last steps is not on disk."""
        self.poll()
        if self._output_lost_by is not None:
            raise self.ending("after the last step, which is saved")
