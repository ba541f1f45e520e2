"""Writing a checkpoint: a temporary directory, files, hashes, the manifest, and a rename.

All ranks write into one directory, in the background if asked. It becomes a checkpoint by a rename,
after everything in it and the manifest are on disk; whatever happens before leaves the older
checkpoints as they are. Decisions about the file system are made on rank 0 and broadcast.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from hysparse_megatron.checkpoint.manifest import write_manifest
from hysparse_megatron.checkpoint.store import remove_leftovers, step_directory, unfinished_name
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.files import sha256_of, sync_folder
from hysparse_megatron.runtime import faults
from hysparse_megatron.runtime.agreement import on_rank_zero
from hysparse_megatron.runtime.worker import Worker


@dataclass(frozen=True)
class Job:
    """What is left to do on one rank once its tensors are safe from training."""

    write: Callable[[], None]
    """Write this rank's files. Local, in any thread."""
    finish: Callable[[], None]
    """Write what describes the files of all ranks. Collective, after every rank's `write`."""


class CheckpointWrite:
    """One checkpoint on its way to disk. Made, asked and finished by all ranks together.

    `start(directory)` copies what is to be written; `facts` are added to the manifest. Files are
    written by a thread if `in_background`, else before the constructor returns. Raises
    CheckpointError if the place cannot be written to or is taken; what else fails, on any rank, is
    raised by `finish`.
    """

    def __init__(
        self,
        checkpoints: Path,
        step: int,
        start: Callable[[Path], Job],
        facts: dict[str, Any],
        in_background: bool = False,
    ) -> None:
        self.step = step
        self._checkpoints, self._facts = checkpoints, facts
        self._final = step_directory(checkpoints, step)
        self._began = time.monotonic()
        self._failure: str | None = None
        self._files: dict[str, dict[str, Any]] = {}
        self._job: Job | None = None
        self._temporary = on_rank_zero(self._prepare, CheckpointError)
        try:
            self._job = start(self._temporary)
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            self._failure = describe_error(error)
        self._thread = Worker(self._write)
        if not in_background:
            self._thread.join()

    def _prepare(self) -> Path:
        if self._final.exists():
            raise CheckpointError(f"{self._final} exists already and is not written over; move it")
        # The run directory has one owner, so nobody else is writing here.
        remove_leftovers(self._checkpoints)
        temporary = unfinished_name(self._final)
        temporary.mkdir(parents=True)
        return temporary

    def _write(self) -> None:
        if self._job is None:
            return
        mine = f"__{dist.get_rank()}_"
        try:
            faults.reach("write", self.step)
            self._job.write()
            self._files = _describe(self._temporary, lambda name: name.startswith(mine))
        except (Exception, CheckpointException) as error:
            self._failure = describe_error(error)

    def is_written(self, device: torch.device) -> bool:
        """Whether every rank has written its files, or failed to. Collective, and short."""
        busy = torch.tensor([self._thread.is_alive()], dtype=torch.int32, device=device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        return not busy.item()

    def finish(self) -> Path:
        """Wait for the files of all ranks and make them a checkpoint; returns its directory.

        Raises CheckpointError on every rank if any of them failed; nothing is left then.
        """
        self._thread.join()
        failures = _gather_failures(self._failure)
        if not failures and self._job is not None:
            try:
                self._job.finish()
            except (Exception, CheckpointException) as error:
                self._failure = describe_error(error)
            failures = _gather_failures(self._failure)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._files)
        files = {name: entry for part in parts for name, entry in part.items()}
        on_rank_zero(lambda: self._publish(failures, files), CheckpointError)
        return self._final

    def _publish(self, failures: list[str], files: dict[str, dict[str, Any]]) -> None:
        try:
            if failures:
                raise CheckpointError(f"{self._final} was not written; {'; '.join(failures)}")
            files = files | _describe(self._temporary, lambda name: name not in files)
            facts = {
                "step": self.step,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "written_in_seconds": round(time.monotonic() - self._began, 3),
                **self._facts,
            }
            faults.reach("manifest", self.step)
            write_manifest(self._temporary, {**facts, "files": files})
            if self._final.exists():
                raise CheckpointError(f"{self._final} appeared while it was being written")
            os.rename(self._temporary, self._final)
            sync_folder(self._checkpoints)
        except OSError as error:
            text = describe_error(error)
            raise CheckpointError(f"{self._final} was not written; rank 0: {text}") from error
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


def describe_error(error: BaseException) -> str:
    """Its type and message; an error of ours is its message."""
    if isinstance(error, CheckpointException):  # whose text is a trace of calls
        return "; ".join(describe_error(cause) for cause, _ in error.failures.values())
    text = str(error)
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def _gather_failures(failure: str | None) -> list[str]:
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, failure)
    return [f"rank {rank}: {text}" for rank, text in enumerate(gathered) if text]


def _describe(directory: Path, wanted: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of files, which are on disk then."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file() and wanted(name):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            entries[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return entries
