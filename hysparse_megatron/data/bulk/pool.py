"""Worker processes: a bounded number of units is under way at any time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from hysparse_megatron.data.bulk.shards import ShardRecord
from hysparse_megatron.data.bulk.sources import Source
from hysparse_megatron.data.bulk.units import Unit
from hysparse_megatron.data.bulk.worker import WorkerOptions, be_worker, run_unit, start_worker
from hysparse_megatron.errors import HySparseError


def run_units(
    units: Iterator[Unit], sources: Sequence[Source], options: WorkerOptions, *, workers: int
) -> Iterator[ShardRecord]:
    """Turn units into shards; yields each record when it is finished, in any order.

    The next units are asked for while the workers are busy. However the iteration ends, the
    workers stop within one batch of text. With 0 workers this process does the work itself.

    Raises:
        HySparseError: a worker was killed.
        DataError: as `run_unit`.
    """
    if workers == 0:
        yield from _run_here(units, sources, options)
        return
    # Not forked: a fork would keep the lock of a parent that was killed.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(
        workers, context, initializer=start_worker, initargs=(options, stop, os.getpid())
    )
    pending: set[Future[ShardRecord]] = set()
    units_of: dict[Future[ShardRecord], Unit] = {}
    try:
        while True:
            while len(pending) < 2 * workers and (unit := next(units, None)) is not None:
                with _without_interrupts():  # it may start a worker
                    future = pool.submit(run_unit, unit, _own(unit, sources))
                units_of[future] = unit
                pending.add(future)
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                record = future.result()
                _remove_spills(units_of.pop(future))
                yield record
    except BrokenProcessPool as error:
        raise HySparseError(
            "a worker process was killed, perhaps for want of memory; run the same command again "
            "to go on, with fewer --workers if memory is short"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal: what is started within never sees it.

    A worker that imports cannot ignore it by itself yet. Here it waits until the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_here(
    units: Iterator[Unit], sources: Sequence[Source], options: WorkerOptions
) -> Iterator[ShardRecord]:
    be_worker(options, multiprocessing.get_context("spawn").Event())
    for unit in units:
        record = run_unit(unit, _own(unit, sources))
        _remove_spills(unit)
        yield record


def _own(unit: Unit, sources: Sequence[Source]) -> tuple[Source, ...]:
    return tuple(sources[piece.source] for piece in unit.pieces)


def _remove_spills(unit: Unit) -> None:
    for piece in unit.pieces:
        if piece.spill:
            os.remove(piece.spill)
