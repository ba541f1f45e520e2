"""Writes whole checkpoints in tests: of anything, or of a training state."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hysparse_megatron.checkpoint.manifest import write_manifest
from hysparse_megatron.checkpoint.state import start_save
from hysparse_megatron.checkpoint.store import step_directory
from hysparse_megatron.checkpoint.tensors import INDEX
from hysparse_megatron.checkpoint.writer import CheckpointWrite, Job
from hysparse_megatron.files import sha256_of
from hysparse_megatron.training.state import TrainingState


def write_checkpoint(
    checkpoints: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any]
) -> Path:
    """Files of `write(directory)`, called on every rank. Returns the checkpoint's directory."""

    def start(directory: Path) -> Job:
        # Without a description of the tensors it is no checkpoint.
        return Job(lambda: write(directory), (directory / INDEX).touch)

    return CheckpointWrite(checkpoints, step, start, facts).finish()


def write_texts(checkpoints: Path, step: int, content: str = "weights") -> Path:
    """A checkpoint of one shard of text, with a folder in it."""

    def write_files(directory: Path) -> None:
        (directory / "__0_0.distcp").write_text(content)
        (directory / "common").mkdir()
        (directory / "common" / "metadata.json").write_text("{}")

    return write_checkpoint(checkpoints, step, write_files, {"tokens": 10 * step})


def flip_a_byte(directory: Path) -> None:
    """Damage its shard as a disk may: the size stays."""
    shard = directory / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)


def write_step(checkpoints: Path, step: int, facts: dict[str, Any]) -> Path:
    """A whole checkpoint of one small file, for what only looks at manifests. Needs no ranks."""
    directory = step_directory(checkpoints, step)
    directory.mkdir(parents=True)
    shard = directory / "__0_0.distcp"
    shard.write_text(f"weights {step}")
    (directory / INDEX).write_text('{"tensors": {}, "objects": {}}')
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in directory.iterdir()
    }
    write_manifest(directory, {"step": step, "files": files, **facts})
    return directory


def save(state: TrainingState, run_dir: Path, step: int) -> Path:
    """Model and optimizer, as a run saves them."""
    start = functools.partial(start_save, state, step)
    return CheckpointWrite(run_dir / "checkpoints", step, start, {}).finish()
