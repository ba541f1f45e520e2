"""Writes whole checkpoints in tests: of anything, or of a training state."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hysparse_megatron.checkpoint.state import start_save
from hysparse_megatron.checkpoint.store import MANIFEST, digest_of, step_directory
from hysparse_megatron.checkpoint.writer import CheckpointWrite, Job
from hysparse_megatron.training.state import TrainingState


def write_checkpoint(
    checkpoints: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any]
) -> Path:
    """Files of `write(directory)`, called on every rank. Returns the checkpoint's directory."""

    def start(directory: Path) -> Job:
        return Job(write=lambda: write(directory), finish=lambda: None)

    return CheckpointWrite(checkpoints, step, start, facts).finish()


def write_step(checkpoints: Path, step: int, facts: dict[str, Any]) -> Path:
    """A whole checkpoint of one small file, for what only looks at manifests. Needs no ranks."""
    directory = step_directory(checkpoints, step)
    directory.mkdir(parents=True)
    shard = directory / "__0_0.distcp"
    shard.write_text(f"weights {step}")
    files = {shard.name: {"bytes": shard.stat().st_size, "sha256": digest_of(shard)}}
    manifest = {"step": step, "files": files, **facts}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return directory


def save(state: TrainingState, run_dir: Path, step: int) -> Path:
    """Model and optimizer, as a run saves them."""
    start = functools.partial(start_save, state, step)
    return CheckpointWrite(run_dir / "checkpoints", step, start, {}).finish()
