"""When a run's checkpoints are written: at most one at a time, beside training if asked.

And which of them have been seen to be good. What is saved is finite, which is less: so the newest
checkpoint after which a good step was made is never deleted, and a start after a numerical stop
goes on from there.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.finite import rank_not_finite
from hysparse_megatron.checkpoint.state import Saveable, start_save
from hysparse_megatron.checkpoint.writer import CheckpointWrite
from hysparse_megatron.errors import CheckpointError, NumericalStop
from hysparse_megatron.runtime.agreement import on_rank_zero
from hysparse_megatron.runtime.worker import Worker


class Saver:
    """Saves `state` under `checkpoints`. Every method is collective and may raise CheckpointError.

    `facts(step, progress)` goes into the manifest. `published(directory, seconds)` is called on all
    ranks with every checkpoint that is complete, and how long that took from the start of its save.
    `loaded` is the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        state: Saveable,
        checkpoints: Path,
        facts: Callable[[int, dict[str, Any]], dict[str, Any]],
        log: Callable[[str], None],
        published: Callable[[Path, float], None] = lambda directory, seconds: None,
        loaded: Path | None = None,
    ) -> None:
        self._state, self._checkpoints = state, checkpoints
        self._facts, self._log, self._published = facts, log, published
        self._pending: CheckpointWrite | None = None
        self._newest = loaded
        self._is_proven = False
        """Whether a good step was made with what was saved or loaded last."""
        self._deleting: Worker | None = None
        self._waited_seconds = 0.0
        self._began = 0.0

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Save what training has reached; a save that is still under way is waited for.

        Raises NumericalStop, and saves nothing, where that is not finite.
        """
        repeated = self._pending is not None and self._pending.step == step
        self.finish_save()
        if repeated:
            return
        rank = rank_not_finite(self._state)
        if rank is not None:
            raise NumericalStop(
                f"weights or optimizer state on rank {rank} are not finite after step {step}, "
                "though its loss and gradient were: nothing is saved. The newest checkpoint is "
                "from before; lower optim.learning_rate"
            )
        self._is_proven = False
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
            self.finish_save()

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

    def finish_save(self) -> None:
        """Wait for a save that is under way."""
        if self._pending is not None:
            self._complete()

    @property
    def is_deleting(self) -> bool:
        """Whether checkpoints that are not kept are still being deleted, by this rank alone."""
        return self._deleting is not None and self._deleting.is_alive()

    def finish(self) -> None:
        """Wait for a save that is under way, and for the deletions after one."""
        self.finish_save()
        if self._deleting is not None:
            self._deleting.join()

    def saw_good_step(self) -> None:
        """Learn that a step was good: so is what was saved or loaded last before it."""
        if self._is_proven:
            return
        self._is_proven = True
        if self._pending is None and self._newest is not None:
            self._tidy(self._newest)

    def set_aside_unproven(self) -> Path | None:
        """After a numerical stop: put the newest checkpoint aside if no good step followed it.

        The next start then goes on from an older one, which is returned; None where there is none,
        or the newest has been seen to be good.
        """
        self.finish()

        def put_aside() -> tuple[list[Path], Path | None]:
            if self._newest is None or store.is_proven(self._newest):
                return [], None
            older = next(iter(store.older_than(self._newest)), None)
            if older is None:
                return [], None
            return store.set_aside(self._checkpoints, store.step_of(older)), older

        renamed, older = on_rank_zero(put_aside, CheckpointError)
        for path in renamed:
            self._log(f"WARNING: no good step was made after it, so it is set aside: {path}")
        if older is not None:
            self._log(f"the next start goes on from {older}")
        return older

    def _complete(self) -> None:
        started = time.monotonic()
        assert self._pending is not None
        pending, self._pending = self._pending, None
        directory = pending.finish()
        self._waited_seconds += time.monotonic() - started
        self._published(directory, time.monotonic() - self._began)
        self._log(f"saved {directory} (training waited {self._waited_seconds:.2f} s)")
        self._newest = directory
        self._tidy(directory)

    def _tidy(self, newest: Path) -> None:
        if dist.get_rank() == 0:
            # To delete a large file takes time as well.
            prune = functools.partial(self._prune, newest, self._is_proven, self._deleting)
            self._deleting = Worker(prune)

    def _prune(self, newest: Path, is_proven: bool, before: Worker | None) -> None:
        if before is not None:
            before.join()
        if is_proven:
            store.mark_proven(newest)
        checkpoint = self._state.config.checkpoint
        keep, every = checkpoint.keep, checkpoint.keep_every
        for failure in store.prune(self._checkpoints, keep, every, newest)[1]:
            self._log(f"WARNING: {failure}")
