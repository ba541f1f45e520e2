"""Processes that stay alive between layouts, so that megatron-core is imported once per process.

A job is a function that forks of the first n workers call at the same time, each with its rank,
inside a gloo process group of n ranks. A fork and not the worker: a layout is full of reference
cycles, some through C++, which would keep the threads of its process groups alive. After a failure
or a timeout all workers are killed: a rank that waits in a collective for a dead one cannot be
brought back.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.forks import INHERITED, Fork, fork_server

FIRST_JOB_EXTRA_SECONDS = 180.0
"""Added to the timeout of a job that has to start workers: imports wait for a busy disk."""
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
GRACE_SECONDS = 2.0
"""How long the other ranks get to report too, once one has failed."""


class WorkerError(RuntimeError):
    """A job that failed or took too long; the message holds what every rank had to say."""


class _Job(NamedTuple):
    function: Callable[..., Any]
    arguments: dict[str, Any]
    rank: int
    world_size: int
    port: int
    number: int
    timeout: float


class _Worker(NamedTuple):
    process: Fork
    connection: Connection


class WorkerPool:
    """`run` is the interface; `close` (also at exit) leaves no process behind."""

    def __init__(self, max_workers: int) -> None:
        self.max_workers = max_workers
        self._workers: list[_Worker] = []
        self._jobs = 0
        # The parent keeps the store, so no rank has to guess a free port.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        atexit.register(self.close)

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        timeout: float = 120.0,
        **arguments: Any,
    ) -> list[Any]:
        """`[function(0, **arguments), ..., function(world_size - 1, **arguments)]`.

        The function must be importable, arguments and results must survive pickling. Raises
        WorkerError with each failing rank's traceback, or the ranks that were not done in
        `timeout` seconds.
        """
        limit = self._limit(world_size, timeout)
        self._jobs += 1
        return self._run(
            [
                _Job(function, arguments, rank, world_size, self._store.port, self._jobs, limit)
                for rank in range(world_size)
            ]
        )

    def run_apart(
        self,
        function: Callable[..., Any],
        each: list[dict[str, Any]],
        timeout: float = 120.0,
        **arguments: Any,
    ) -> list[Any]:
        """`[function(0, **each[0], **arguments), ...]`, at the same time, each on one rank."""
        limit = self._limit(len(each), timeout)
        jobs = []
        for own in each:
            self._jobs += 1
            jobs.append(_Job(function, own | arguments, 0, 1, self._store.port, self._jobs, limit))
        return self._run(jobs)

    def _limit(self, workers: int, timeout: float) -> float:
        """Seconds that a job of so many workers, which are started, may take."""
        if workers > self.max_workers:
            raise ValueError(f"{workers} ranks asked of a pool of {self.max_workers}")
        return timeout + (FIRST_JOB_EXTRA_SECONDS if self._start(workers) else 0.0)

    def _run(self, jobs: list[_Job]) -> list[Any]:
        """Worker i does job i."""
        for worker, job in zip(self._workers, jobs, strict=False):
            worker.connection.send(job)
        results, failures = self._collect(len(jobs), jobs[0].timeout)
        if failures:
            self.close()
            name = f"{jobs[0].function.__module__}.{jobs[0].function.__name__}"
            raise WorkerError(f"{name} on {len(jobs)} ranks\n" + "\n".join(failures))
        return [results[rank] for rank in range(len(jobs))]

    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """Kill all workers; the next `run` starts new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            worker.connection.close()
        self._workers.clear()

    def _start(self, world_size: int) -> bool:
        missing = world_size - len(self._workers)
        for _ in range(missing):
            here, there = multiprocessing.Pipe()
            # Jobs may be of modules that only pytest has made importable.
            paths = f"import sys; sys.path[:] = {sys.path}"
            work = ["-c", f"{paths}; from tests.distributed.pool import work; work()"]
            process = fork_server().start(work, output=2, descriptor=there.fileno())
            there.close()
            self._workers.append(_Worker(process, here))
        return missing > 0

    def _collect(self, world_size: int, limit: float) -> tuple[dict[int, Any], list[str]]:
        waiting = {self._workers[rank].connection: rank for rank in range(world_size)}
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + limit
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                if not failures:
                    late = sorted(waiting.values())
                    failures.append(f"ranks {late} were not done after {limit:.0f} seconds")
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[index,arg-type]
                try:
                    succeeded, content = connection.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    succeeded, content = False, "the process died"
                if succeeded:
                    results[rank] = content
                else:
                    failures.append(f"rank {rank}: {content}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return results, failures


def work() -> None:
    """A worker's life: jobs until the parent is gone."""
    connection = Connection(*INHERITED)
    torch.set_num_threads(1)
    own = os.getpid()
    # A closed pipe means that the parent is gone, even if it was killed.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job = connection.recv()
            child = os.fork()
            if child == 0:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == own:
                    connection.send(_attempt(job))
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                connection.send((False, "the process died"))


def _attempt(job: _Job) -> tuple[bool, Any]:
    try:
        _join_process_group(job)
        return True, job.function(job.rank, **job.arguments)
    except BaseException:  # torch's distributed checkpoints raise no Exception
        return False, traceback.format_exc()


def _join_process_group(job: _Job) -> None:
    # A rank that is done before another has connected would close that one's connection.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    store = dist.TCPStore("127.0.0.1", job.port, is_master=False)
    dist.init_process_group(
        "gloo",
        # Keys of former jobs are still in the store.
        store=dist.PrefixStore(f"job{job.number}", store),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout),
    )
