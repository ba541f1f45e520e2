"""Streams whose copies happen as late as they may: when the stream that computes waits for them.

What reads a copy without waiting for it reads nothing of sense, and what gives memory away that a
copy still reads or writes is found out. The stream that computes, `Late.main`, does all at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hysparse_megatron.model import offload


class Event:
    """A place in a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._place = stream, stream.added

    def wait(self) -> None:
        """Do what comes before it."""
        self._stream.run(self._place)


class Stream:
    """Does what was added to it in order, and none of it before it is asked for."""

    def __init__(self, *, late: bool = True) -> None:
        self._late, self._waiting = late, list[Callable[[], None]]()
        self.added = 0

    def add(self, work: Callable[[], None]) -> None:
        if self._late:
            self._waiting.append(work)
            self.added += 1
        else:
            work()

    def run(self, place: int) -> None:
        while self._waiting and self.added - len(self._waiting) < place:
            self._waiting.pop(0)()

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.add(event.wait)

    def wait_stream(self, stream: Stream) -> None:
        self.add(stream.record_event().wait)


class Late:
    """Stands for `torch.cuda`."""

    Stream = Stream

    def __init__(self) -> None:
        self.main, self.out = Stream(late=False), Stream()
        self._current = self.main
        self.copies = 0
        self.lost: list[str] = []
        """Copies whose memory on the device was given away before them."""

    def current_stream(self) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        former, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = former

    def copy(self, real: Callable[..., Tensor], into: Tensor, source: Tensor) -> Tensor:
        """`into.copy_(source)`, later unless it is the main stream's."""
        if self._current is self.main:
            return real(into, source)
        out = self._current is self.out
        device = source if out else into
        if not out:
            into.fill_(255)
        place = weakref.ref(device.untyped_storage())
        host = into if out else source

        def work() -> None:
            storage = place()
            if storage is None:
                self.lost.append("to the host" if out else "back")
                return
            there = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            real(host, there) if out else real(there, host)
            self.copies += 1

        self._current.add(work)
        return into

    def install(self, host: offload.Offload, monkeypatch: pytest.MonkeyPatch) -> None:
        """Copies of `host` happen late."""
        link = offload._Link(torch.device("cpu"))
        link._module = self  # type: ignore[assignment]
        link._out, link._back = self.out, Stream()
        host._link = link
        real = torch.Tensor.copy_

        def copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            return self.copy(real, into, source)

        monkeypatch.setattr(torch.Tensor, "copy_", copy)
