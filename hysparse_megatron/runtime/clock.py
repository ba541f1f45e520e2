"""How long this rank computes by itself: what tells a slow machine from one that waits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class ForwardClock:
    """Adds up the time of this rank's forward passes.

    Receiving from and sending to pipeline neighbours happen between them and do not count, nor does
    what is `paused` within, which is waiting for data-parallel ranks. Other collectives inside do:
    tensor-parallel ranks, and ranks that share experts, have one speed. On a GPU events are
    recorded in its stream, and nothing waits for them before `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._running = False
        self._seconds = 0.0
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens within."""
        self._running = True
        try:
            with self._span(1):
                yield
        finally:
            self._running = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens within."""
        with self._span(-1) if self._running else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _span(self, sign: int) -> Iterator[None]:
        if not self._cuda:
            started = time.monotonic()
            yield
            self._seconds += sign * (time.monotonic() - started)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((sign, start, end))

    def take(self) -> float:
        """Seconds since the last call.

        Waits for the last counted pass, so call it after a step, which has waited anyway.
        """
        for sign, start, end in self._events:
            end.synchronize()
            self._seconds += sign * start.elapsed_time(end) / 1e3
        self._events.clear()
        taken, self._seconds = self._seconds, 0.0
        return taken
