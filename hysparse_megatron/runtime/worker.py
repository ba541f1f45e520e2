"""Threads that cannot hang their maker, also when memory is used up."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable

_SECONDS_TO_BEGIN = 30.0
"""Far more than a thread takes to begin on a busy machine."""


class Worker:
    """Runs `work` in a thread that ends with the process.

    `threading.Thread.start` waits without end for a thread that finds no memory for its first
    lines. Here that is a MemoryError; a system that gives no thread at all raises RuntimeError.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._begun, self._done = threading.Event(), threading.Event()
        _thread.start_new_thread(self._run, (work,))
        if not self._begun.wait(_SECONDS_TO_BEGIN):
            raise MemoryError("a thread was started and could not begin")

    def _run(self, work: Callable[[], object]) -> None:
        self._begun.set()
        try:
            work()
        finally:
            self._done.set()

    def is_alive(self) -> bool:
        """Whether the work is not done yet."""
        return not self._done.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the work is done, for `timeout` seconds at most."""
        self._done.wait(timeout)
