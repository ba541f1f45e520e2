"""Threads without a hang."""

import sys
import threading

import pytest

from hysparse_megatron.runtime.worker import Worker
from tests.captured import captured


def test_it_works_and_is_done() -> None:
    release = threading.Event()
    seen = []
    worker = Worker(lambda: seen.append(release.wait(30)))
    worker.join(0.01)
    assert worker.is_alive()
    release.set()
    worker.join()
    assert not worker.is_alive()
    assert seen == [True]


PROGRAM = """
import resource, sys
from hysparse_megatron.runtime import faults, worker
worker._SECONDS_TO_BEGIN = 2.0
try:
    faults._use_up_memory(int(sys.argv[1]))
except MemoryError:
    pass
try:
    worker.Worker(lambda: None)
except (MemoryError, RuntimeError):
    sys.exit(7)
"""


@pytest.mark.parametrize("left", [0, 8_400_000])
def test_without_memory_it_is_an_error(left: int) -> None:
    """For no thread; or for its stack alone, where `threading.Thread.start` never returns."""
    captured([sys.executable, "-c", PROGRAM, str(left)], timeout=60, code=7)
