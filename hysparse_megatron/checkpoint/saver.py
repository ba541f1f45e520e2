"""When a run's checkpoints are written: at most one at a time, beside training if asked."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.state import start_save
from hysparse_megatron.checkpoint.writer import CheckpointWrite
from hysparse_megatron.training.state import TrainingState


class Saver:
    """Saves `state` under `checkpoints`. Every method is collective and may raise CheckpointError.

    `facts(step, progress)` goes into the manifest. `published(directory, seconds)` is called on all
    ranks with every checkpoint that is complete, and how long that took from the start of its save.
    """

    def __init__(
        self,
        state: TrainingState,
        checkpoints: Path,
        facts: Callable[[int, dict[str, Any]], dict[str, Any]],
        say: Callable[[str], None],
        published: Callable[[Path, float], None] = lambda directory, seconds: None,
    ) -> None:
        self._state, self._checkpoints = state, checkpoints
        self._facts, self._say, self._published = facts, say, published
        self._pending: CheckpointWrite | None = None
        self._deleting: threading.Thread | None = None
        self._waited_seconds = 0.0
        self._began = 0.0

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Save what training has reached; a save that is still under way is waited for."""
        repeated = self._pending is not None and self._pending.step == step
        self.finish()
        if repeated:
            return
        started = self._began = time.monotonic()
        asynchronous = self._state.config.checkpoint.asynchronous
        self._pending = CheckpointWrite(
            self._checkpoints,
            step,
            functools.partial(start_save, self._state, step),
            self._facts(step, progress),
            in_background=asynchronous,
        )
        self._waited_seconds = time.monotonic() - started
        if not asynchronous:
            self.finish()

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None

    def poll(self) -> None:
        """Complete a save whose files are written; returns at once otherwise."""
        started = time.monotonic()
        if self._pending is not None and self._pending.is_written(self._state.device):
            self._complete()
        else:
            self._waited_seconds += time.monotonic() - started

    def finish(self) -> None:
        """Wait for a save that is under way, and for the deletions after one."""
        if self._pending is not None:
            self._complete()
        if self._deleting is not None:
            self._deleting.join()

    def _complete(self) -> None:
        started = time.monotonic()
        assert self._pending is not None
        pending, self._pending = self._pending, None
        directory = pending.finish()
        self._waited_seconds += time.monotonic() - started
        self._published(directory, time.monotonic() - self._began)
        self._say(f"saved {directory} (training waited {self._waited_seconds:.2f} s)")
        if dist.get_rank() == 0:
            # To delete a large file takes time as well.
            self._deleting = threading.Thread(target=self._prune, args=(directory,), daemon=True)
            self._deleting.start()

    def _prune(self, newest: Path) -> None:
        checkpoint = self._state.config.checkpoint
        keep, every = checkpoint.keep, checkpoint.keep_every
        for failure in store.prune(self._checkpoints, keep, every, newest)[1]:
            self._say(f"WARNING: {failure}")
