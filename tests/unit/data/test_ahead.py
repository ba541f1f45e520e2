"""Batches that are read while a step computes: the same, one step ahead, and errors as well."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hysparse_megatron.data.read import ahead
from hysparse_megatron.data.read.ahead import ReadAhead
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.errors import DataError

CPU = torch.device("cpu")
SIZE = 3
WAIT_SECONDS = 30


class Source:
    """Two micro-batches a step, and what is done in between."""

    def __init__(self, on_read: Callable[[int], object] = lambda step: None) -> None:
        self.on_read = on_read
        self.threads: set[int] = set()

    def microbatches(self, position: Position) -> Iterator[dict[str, torch.Tensor]]:
        self.threads.add(threading.get_ident())
        self.on_read(position.steps)
        for number in range(2):
            yield {"tokens": torch.tensor([position.steps, number])}

    def after(self, position: Position) -> Position:
        return Position(position.samples + SIZE, position.left_out, position.steps + 1)


def reader(source: Any, first: int = 0, last: int = 5, device: torch.device = CPU) -> ReadAhead:
    return ReadAhead(source, at(first), range(first + 1, last + 1), device)


def at(step: int) -> Position:
    return Position(SIZE * step, 0, step)


def tokens(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["tokens"].tolist() for batch in batches]


def test_steps_come_in_order_from_anywhere() -> None:
    source = Source()
    with reader(source, first=3) as batches:
        for step in (3, 4):
            assert tokens(batches.microbatches(at(step))) == [[step, 0], [step, 1]]
            assert batches.after(at(step)) == at(step + 1)
    assert len(source.threads) == 1
    assert threading.get_ident() not in source.threads
    assert not batches._worker.is_alive()


def test_a_slow_reader_reads_while_a_step_computes() -> None:
    """Whoever computes step 0 sees step 1 being read before it is done, and so on."""
    begun = [threading.Event() for _ in range(4)]
    computed = [threading.Event() for _ in range(4)]

    def read(step: int) -> None:
        begun[step].set()
        if step:
            assert computed[step - 1].wait(WAIT_SECONDS)

    with reader(Source(read), last=4) as batches:
        for step in range(4):
            found = batches.microbatches(at(step))
            if step < 3:
                assert begun[step + 1].wait(WAIT_SECONDS)
            computed[step].set()
            assert tokens(found) == [[step, 0], [step, 1]]


def test_no_more_than_one_step_is_held_and_none_after_the_last() -> None:
    reads: list[int] = []
    done = threading.Semaphore(0)

    def read(step: int) -> None:
        reads.append(step)
        done.release()

    with reader(Source(read), last=3) as batches:
        for step in range(3):
            assert done.acquire(timeout=WAIT_SECONDS)
            assert reads == list(range(step + 1))
            batches.microbatches(at(step))
    assert reads == [0, 1, 2]


def test_what_fails_is_raised_for_its_step_as_it_was() -> None:
    error = DataError("tokens.bin: token id 9 at offset 4 is outside the vocabulary of 8")

    def read(step: int) -> None:
        if step == 2:
            raise error

    with reader(Source(read)) as batches:
        for step in (0, 1):
            assert len(batches.microbatches(at(step))) == 2
        with pytest.raises(DataError) as caught:
            batches.microbatches(at(2))
        assert caught.value is error
        with pytest.raises(ValueError, match="in order"):
            batches.microbatches(at(3))
    assert not batches._worker.is_alive()


def test_steps_out_of_order_are_refused() -> None:
    with reader(Source(), last=1) as batches:
        with pytest.raises(ValueError, match=r"got Position.*steps=1.*next is Position"):
            batches.microbatches(at(1))
        batches.microbatches(at(0))
        with pytest.raises(ValueError, match="next is None"):
            batches.microbatches(at(1))


def test_nobody_waits_for_a_file_system_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_SECONDS_TO_END", 0.05)
    release = threading.Event()
    with pytest.raises(KeyboardInterrupt), reader(Source(lambda step: release.wait())) as batches:
        raise KeyboardInterrupt
    assert batches._worker.is_alive()
    release.set()
    batches._worker.join(WAIT_SECONDS)
    assert not batches._worker.is_alive()


def test_batches_for_a_gpu_are_pinned_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thread that reads, which would take memory of the first GPU otherwise."""
    pinned, chosen = [], []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.get_ident())
        return tensor + 100

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device))
    )
    source, device = Source(), torch.device("cuda", 3)
    with reader(source, last=1, device=device) as batches:
        assert tokens(batches.microbatches(at(0))) == [[100, 100], [100, 101]]
    [thread] = source.threads
    assert pinned == [thread, thread]
    assert chosen == [(thread, device)]
