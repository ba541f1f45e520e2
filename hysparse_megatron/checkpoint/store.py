"""Checkpoint directories: how one is written, which one is the latest, which ones are kept.

    checkpoints/step-00000100/           complete and valid
    checkpoints/step-00000100/manifest.json    written last: files, sizes, hashes, step, ...
    checkpoints/step-00000200.tmp/       being written, or left behind by a killed run

A checkpoint is written into a `.tmp` directory, which is renamed after its manifest is on disk.
"Latest" is computed by looking: the newest directory whose manifest is there and whose files have
the sizes it names. Decisions about the file system are made on rank 0 and broadcast.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.runtime.agreement import on_rank_zero

MANIFEST = "manifest.json"


def step_directory(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps belongs."""
    return checkpoints / f"step-{step:08d}"


def write_checkpoint(
    checkpoints: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any]
) -> Path:
    """Write one checkpoint with `write(directory)`, collective over all ranks.

    Returns its directory. `facts` are added to the manifest. Raises CheckpointError; an older
    checkpoint is never touched.
    """
    final = step_directory(checkpoints, step)
    temporary = final.with_suffix(".tmp")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    on_rank_zero(prepare, CheckpointError)
    failure = None
    try:
        write(temporary)
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        failure = f"{type(error).__name__}: {error}"
    rank = dist.get_rank()
    mine = {} if failure else _describe(temporary, lambda name: name.startswith(f"__{rank}_"))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (failure, mine))

    def publish() -> None:
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(gathered) if text]
        if failures:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{final} was not written; {'; '.join(failures)}")
        files = {name: entry for _, part in gathered for name, entry in part.items()}
        files |= _describe(temporary, lambda name: name not in files)
        _write_json(temporary / MANIFEST, {"step": step, **facts, "files": files})
        if final.exists():  # an invalid one, or it would have been resumed from
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync_directory(checkpoints)

    on_rank_zero(publish, CheckpointError)
    return final


def latest_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and what is wrong with the ones that are newer.

    (None, []) where there is none at all. Local; call it on rank 0. Raises CheckpointError when
    there are checkpoints and not one is valid: a fresh start would hide that.
    """
    rejected: list[str] = []
    for directory in _step_directories(checkpoints):
        problems = problems_of(directory)
        if not problems:
            return directory, rejected
        rejected += problems
    if rejected:
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is valid: {'; '.join(rejected)}. Restore one, or "
            "delete them to start anew"
        )
    return None, []


def _step_directories(checkpoints: Path) -> list[Path]:
    """Published checkpoints, valid or not, newest first."""
    found = (path for path in checkpoints.glob("step-*") if path.suffix != ".tmp")
    return sorted(found, reverse=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what killed runs were writing. Only for the owner of the run directory."""
    for path in checkpoints.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def problems_of(directory: Path, content: bool = True) -> list[str]:
    """What is wrong with a checkpoint directory.

    A missing or odd manifest, missing or truncated files and, with `content`, files whose hash is
    another than the manifest says.
    """
    try:
        manifest = read_manifest(directory)
        int(manifest["step"])
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"{directory / MANIFEST}: {type(error).__name__}: {error}"]
    problems = []
    for name, (size, digest) in files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != size:
            found = path.stat().st_size
            problems.append(f"{path} has {found} bytes; the manifest says {size} bytes")
        elif content and _digest(path) != digest:
            problems.append(f"{path} has another content than the manifest says")
    return problems


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError when it is missing or garbled."""
    try:
        return json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the manifest: {error}") from error


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint a user means by a step directory or a run directory.

    Raises CheckpointError when there is no valid one.
    """
    if (path / MANIFEST).exists():
        problems = problems_of(path)
        if problems:
            raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
        return path
    found, _ = latest_checkpoint(path / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"no valid checkpoint at {path}; name a step directory or a run directory"
        )
    return found


def prune(checkpoints: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` valid checkpoints (0 keeps all). Call it on rank 0.

    Returns what was deleted. Failure to delete is not an error: training goes on.
    """
    found = _step_directories(checkpoints)
    valid = [path for path in found if not problems_of(path, content=False)]
    doomed = valid[keep:] if keep else []
    for directory in doomed:
        shutil.rmtree(directory, ignore_errors=True)
    return doomed


def _describe(directory: Path, wanted: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    entries = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file() and wanted(name):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            entries[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    return entries


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
