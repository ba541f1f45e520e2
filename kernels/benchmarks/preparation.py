"""What happens before anything is timed: results are checked and kernels compiled, in parallel.

Compiling takes minutes and one core. Worker processes therefore run every check, and one pass of
what compiles longest, so that the timing process finds the kernels in the caches on disk.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import torch
from hysparse_kernels.benchmarking.problem import Inputs, Problem
from hysparse_kernels.benchmarking.selections import synthetic

from benchmarks import fla_peer
from benchmarks.checks import Check, check, small_problems
from benchmarks.peers import BY_TABLE, OTHERS, Peer, output_of

_TUNING_PARTS = 4
"""Workers that share the configurations of one autotuner."""


@dataclass(frozen=True)
class Job:
    """One check or, with `parts`, one share of compiling a peer's kernels for a problem."""

    table: str
    peer_name: str
    problem: Problem
    shape: str
    """Of the timed problem."""
    device: str
    backend: str
    part: int = 0
    parts: int = 0

    @property
    def peer(self) -> Peer:
        """The implementation."""
        return next(peer for peer in BY_TABLE[self.table] if peer.name == self.peer_name)


def jobs(
    problems: Sequence[Problem], tables: Sequence[str], device: str, backend: str
) -> list[Job]:
    """Compilation first, because it takes longest, then the checks.

    Ours are checked on an aligned and an odd problem of every shape, others on the odd one of the
    first shape only: it is the shape they are timed at that counts.
    """
    compilation, checks = [], []
    shapes = list(dict.fromkeys(problem.shape for problem in problems))
    for table in tables:
        for peer in BY_TABLE.get(table, ()):
            for shape in shapes:
                of_shape = [problem for problem in problems if problem.shape == shape]
                if device != "cpu":
                    parts = _TUNING_PARTS if peer.name == "fla" else 1
                    compilation += [
                        Job(table, peer.name, problem, shape, device, backend, part, parts)
                        for problem in _compiled_for(peer, of_shape)
                        for part in range(parts)
                    ]
                if peer.name == "no_indices":
                    continue
                both = peer.name not in OTHERS or shape == shapes[0]
                for small in small_problems(of_shape[0])[: 2 if both else 1]:
                    checks.append(Job(table, peer.name, small, shape, device, backend))
    return compilation + checks


def _compiled_for(peer: Peer, problems: list[Problem]) -> list[Problem]:
    """Problems of one shape that stand for all of it, as far as this peer's compiler is concerned.

    torch.compile makes new kernels for every length, fla-core's depend on it in part, and ours only
    on whether sizes are multiples of 16.
    """
    if peer.name == "flex":
        return problems
    if peer.name == "fla":
        return problems[:1]
    if peer.name in OTHERS:
        return []
    return [replace(problems[0], sequence=min(problems[0].sequence, 4096))]


def run(job: Job) -> Check | None:
    """The check's result; compilation has none, and its failures show when the peer is timed."""
    torch.manual_seed(0)
    if not job.parts:
        return check(job.table, job.peer, job.problem, torch.device(job.device), job.backend)
    try:
        _compile(job)
    except Exception:
        return None
    return None


def _compile(job: Job) -> None:
    device = torch.device(job.device)
    inputs = Inputs.random(job.problem, device, job.backend, torch.bfloat16)
    if job.table == "sparse":
        inputs.indices = synthetic(job.problem, device, clustered=False)
    share = fla_peer.only_part(job.part, job.parts)
    with share if job.peer_name == "fla" else contextlib.nullcontext():
        output = output_of(job.peer.make(inputs)())
        torch.autograd.grad(output, inputs.leaves, inputs.grad)
        torch.cuda.synchronize()


def run_all(work: list[Job], processes: int) -> Iterator[tuple[Job, Check | None]]:
    """Every job and its result, in order; in this process if there is only one.

    A worker that dies, as a crashing kernel can make it, takes the others with it: what is left
    then runs here, where the crash shows.
    """
    if processes < 2 or len(work) < 2:
        for job in work:
            yield job, run(job)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start_worker) as pool:
        futures: list[Future[Check | None]] = [pool.submit(run, job) for job in work]
        for job, future in zip(work, futures, strict=True):
            try:
                yield job, future.result()
            except BrokenProcessPool:
                yield job, run(job)


def _start_worker() -> None:
    """Workers compile one thing at a time: torch would start as many helpers in each as cores."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def default_processes(device: str) -> int:
    """Half of the cores, at most 8; one without a GPU, where nothing is compiled."""
    return 1 if device == "cpu" else max(1, min(8, (os.cpu_count() or 2) // 2))
