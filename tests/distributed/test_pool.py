"""The pool reports what went wrong, recovers from it, and leaves nothing behind."""

import os
from collections.abc import Iterator

import pytest

from tests.distributed import pool_jobs
from tests.distributed.pool import WorkerError, WorkerPool

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def own_pool() -> Iterator[WorkerPool]:
    """Not the session's, whose workers are expensive to lose."""
    workers = WorkerPool(max_workers=2)
    yield workers
    workers.close()


def test_jobs_of_different_sizes_share_processes(own_pool: WorkerPool) -> None:
    pair = own_pool.run(2, pool_jobs.sum_of_ranks, factor=5)
    alone = own_pool.run(1, pool_jobs.sum_of_ranks, factor=5)
    again = own_pool.run(2, pool_jobs.sum_of_ranks, factor=7)
    assert [total for total, _ in pair] == [5, 5]
    assert [total for total, _ in alone] == [0]
    assert [total for total, _ in again] == [7, 7]
    assert {pid for _, pid in pair} == {pid for _, pid in again} == set(own_pool.pids())
    assert os.getpid() not in {pid for _, pid in pair}


def test_failure_is_reported_with_rank_and_traceback(own_pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"rank 1: (?s:.*)fail_on(?s:.*)told to fail"):
        own_pool.run(2, pool_jobs.fail_on, bad_rank=1)
    assert own_pool.pids() == []
    assert own_pool.run(2, pool_jobs.sum_of_ranks, factor=3)[0][0] == 3


def test_a_rank_may_be_done_before_others_have_joined(own_pool: WorkerPool) -> None:
    """On a busy machine one of four such jobs failed: the first rank closed its connections."""
    for _ in range(8):
        assert own_pool.run(2, pool_jobs.sleep_on, slow_rank=-1) == [None, None]


def test_dead_process_is_reported(own_pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 0: the process died"):
        own_pool.run(2, pool_jobs.die_on, dying_rank=0)


def test_timeout_names_the_ranks_and_kills_them(own_pool: WorkerPool) -> None:
    own_pool.run(2, pool_jobs.sum_of_ranks, factor=1)
    pids = own_pool.pids()
    with pytest.raises(WorkerError, match=r"ranks \[1\] were not done after 5 seconds"):
        own_pool.run(2, pool_jobs.sleep_on, slow_rank=1, timeout=5.0)
    assert not any(_is_running(pid) for pid in pids)


def test_too_many_ranks_are_refused(own_pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="3 ranks asked of a pool of 2"):
        own_pool.run(3, pool_jobs.sum_of_ranks, factor=1)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
