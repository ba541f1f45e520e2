"""Batches that a thread reads while a step computes: those of the next step, and no others.

PyTorch's `DataLoader` reads beside training in processes of their own, copies of a rank with all
its threads and its GPU, and wraps what fails there into another message. What is read here is a few
numbers a token, by calls that let other threads run.
"""

from __future__ import annotations

from queue import SimpleQueue
from typing import TYPE_CHECKING

from hysparse_megatron.data.read.batches import BatchSource
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.runtime import faults
from hysparse_megatron.runtime.worker import Worker

if TYPE_CHECKING:
    import numpy as np
    import torch

type Batch = dict[str, torch.Tensor]

_SECONDS_TO_END = 1.0
"""For a thread that may be reading; who ends does not wait for a file system that hangs."""


class ReadAhead:
    """Takes the place of a `BatchSource` in a loop that goes from step to step, as a context.

    What reading raises is raised by `microbatches`, for the step whose batches could not be read.

    Args:
        source: what is read.
        position: where the loop begins.
        steps: numbers from 1 of the steps that the loop will do, for `faults`.
        device: a CUDA device whose copies are to be asynchronous: batches lie in pinned memory.
    """

    def __init__(
        self, source: BatchSource, position: Position, steps: range, device: torch.device
    ) -> None:
        self._source = source
        self._device = device
        self._steps = iter(steps)
        self._asked: SimpleQueue[tuple[Position, int] | None] = SimpleQueue()
        self._read: SimpleQueue[list[Batch] | BaseException] = SimpleQueue()
        self._next: Position | None = None
        self._worker = Worker(self._work)
        self._ask(position)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._asked.put(None)
        self._worker.join(_SECONDS_TO_END)

    def _ask(self, position: Position) -> None:
        step = next(self._steps, None)
        self._next = None if step is None else position
        if step is not None:
            self._asked.put((position, step))

    def microbatches(self, position: Position) -> list[Batch]:
        """As `BatchSource.microbatches`, all of the step; the next step's are read from now on.

        Raises ValueError at another position than the one after the last.
        """
        if position != self._next:
            raise ValueError(f"batches are read in order: got {position}, next is {self._next}")
        found = self._read.get()
        if isinstance(found, BaseException):
            self._next = None
            raise found
        self._ask(self._source.after(position))
        return found

    def after(self, position: Position) -> Position:
        """As `BatchSource.after`."""
        return self._source.after(position)

    def sample_ids(self, position: Position) -> np.ndarray:
        """As `BatchSource.sample_ids`."""
        return self._source.sample_ids(position)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                self._read.put(self._batches(*asked))
            except BaseException as error:
                self._read.put(error)

    def _batches(self, position: Position, step: int) -> list[Batch]:
        faults.reach("read", step)
        batches = list(self._source.microbatches(position))
        if self._device.type != "cuda":
            return batches
        import torch

        torch.cuda.set_device(self._device)  # a thread begins on the first one
        return [{name: part.pin_memory() for name, part in batch.items()} for batch in batches]
