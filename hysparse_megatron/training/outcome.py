"""What the run directory is told of a run's beginning and end. Rank 0 alone has one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hysparse_megatron.checkpoint import store
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import (
    CheckpointError,
    ConfigError,
    HySparseError,
    OutputError,
    Preempted,
    RankFailure,
)
from hysparse_megatron.rundir import RunDirectory, amend_status
from hysparse_megatron.runtime.agreement import on_rank_zero
from hysparse_megatron.status import STATES
from hysparse_megatron.tracking.summary import write_summary
from hysparse_megatron.training.control import Watch

Log = Callable[[str], None]


def open_directory(config: Config, machine: Mapping[str, Any], log: Log) -> RunDirectory | None:
    """Rank 0's run directory, with what runs this start in its record; None on the others."""
    opened: list[RunDirectory] = []
    on_rank_zero(lambda: opened.append(RunDirectory(config, machine)), ConfigError)
    if not opened:
        return None
    if opened[0].former_owner:
        log(f"note: {opened[0].former_owner} ended without giving up {config.run_path}")
    for line in opened[0].warnings:
        log(f"WARNING: {line}")
    for line in opened[0].changed_keys:
        log(f"note: changed since the last start in {config.run_path}: {line}")
    return opened[0]


def write_no_meeting(config: Config, error: RankFailure) -> None:
    """Say in `status.json` that the ranks did not meet, before anyone owns the directory."""
    amend_status(
        config.run_path, os.getpid(), str(error), state="failed", exit_code=1, rank=error.rank
    )


def is_finished(
    config: Config, directory: RunDirectory | None, latest: Path | None, log: Log
) -> bool:
    """Whether nothing is left to train after `latest`; notes the step that the run begins at."""
    done = 0
    if latest is not None:
        if directory is not None:
            note_checkpoint(directory, latest)
        done, evaluation_due = on_rank_zero(lambda: _reached(directory, latest), CheckpointError)
        if done >= config.train.steps and not evaluation_due:
            if directory is not None and directory.state() != "finished":
                directory.write_status("finished", exit_code=0, step=done)  # killed at its very end
            log(f"{config.run_path} is finished: step {done} of {config.train.steps}, {latest}")
            log("train on with a larger train.steps, or start anew with another run_dir")
            return True
    if directory is not None:
        directory.write_status("running", step=done)
    return False


def _reached(directory: RunDirectory | None, latest: Path) -> tuple[int, bool]:
    """The step of a checkpoint, and whether a stop cut short the evaluation that belongs to it
    and no start has made up for it since."""
    manifest = store.read_manifest(latest)
    due = bool(manifest.get("progress", {}).get("evaluation_due"))
    return manifest["step"], due and directory is not None and directory.state() != "finished"


def note_checkpoint(directory: RunDirectory, checkpoint: Path) -> None:
    """A checkpoint is whole: `status.json` names its step and time, if they can be read now."""
    with contextlib.suppress(OSError, CheckpointError):
        step = store.read_manifest(checkpoint)["step"]
        directory.status.saw_checkpoint(step, (checkpoint / store.MANIFEST).stat().st_mtime)


def note_saved(directory: RunDirectory, checkpoint: Path) -> None:
    """The same of a run that goes on, said at once: it may be killed before its next row."""
    note_checkpoint(directory, checkpoint)
    with contextlib.suppress(OSError):  # whoever writes the rows tells all ranks of a full disk
        directory.write_status("running")


def write_finish(
    config: Config,
    directory: RunDirectory,
    tokenizer: str,
    num_ranks: int,
    overrides: Sequence[str],
    log: Log,
) -> None:
    """The run has reached its end: its status, and the summary with the next commands."""
    directory.write_status("finished", exit_code=0, step=config.train.steps)
    try:
        log(write_summary(config, directory, tokenizer, num_ranks, overrides))
    # The run is done and saved: what its presets have become meanwhile must not make it fail.
    except Exception as error:
        log(f"WARNING: no summary.md: {type(error).__name__}: {error}")


def write_end(directory: RunDirectory, error: BaseException, watch: Watch) -> None:
    """Say in `status.json` how a run ended that did not finish."""
    ours = isinstance(error, HySparseError)
    code = error.exit_code if isinstance(error, HySparseError) else 1
    rank: int | None = None if ours else 0
    if isinstance(error, RankFailure):
        rank = error.rank
    elif isinstance(error, Preempted):
        rank = watch.stopping_rank
    if isinstance(error, Preempted | OutputError):
        watch.forget_stop_file()
    cause = str(error) if ours else f"{type(error).__name__}: {error}"
    state = STATES.get(code, "failed")
    with contextlib.suppress(OSError):  # the error itself must not be lost over a full disk
        directory.write_status(state, exit_code=code, cause=cause, rank=rank)
