"""Which checkpoint to load: one decision of all ranks, each of which hashes a share of the files.

Everything here is collective over the default process group.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hysparse_megatron.checkpoint import store
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.runtime.agreement import on_rank_zero


def newest(checkpoints: Path, content: bool) -> tuple[Path | None, list[str]]:
    """`store.latest_checkpoint`, of which all ranks are told alike."""
    candidates = on_rank_zero(lambda: store.published(checkpoints), CheckpointError)
    return store.newest_whole(candidates, functools.partial(problems_of, content=content))


def exactly(checkpoints: Path, step: int, content: bool) -> Path:
    """The checkpoint after `step` steps. Raises CheckpointError when it is not there or damaged."""
    directory = store.step_directory(checkpoints, step)
    return _require(directory, content)


def named(path: Path, step: int | None, content: bool) -> Path:
    """The checkpoint that a user means by a step or run directory; of the latter, after `step`.

    Raises CheckpointError when there is no valid one.
    """
    if on_rank_zero(lambda: store.is_checkpoint(path), CheckpointError):
        return _require(path, content)
    if step is not None:
        return exactly(path / "checkpoints", step, content)
    found, _ = newest(path / "checkpoints", content)
    if found is None:
        raise store.nothing_at(path)
    return found


def _require(directory: Path, content: bool) -> Path:
    problems = problems_of(directory, content)
    if problems:
        raise CheckpointError(f"{directory} is damaged or missing: {'; '.join(problems)}")
    return directory


def problems_of(directory: Path, content: bool) -> list[str]:
    """`store.problems_of`; with `content` the ranks read the files side by side."""

    def look() -> tuple[list[str], dict[str, str]]:
        problems = store.problems_of(directory, content=False)
        files = {} if problems else store.read_manifest(directory)["files"]
        return problems, {name: str(entry["sha256"]) for name, entry in files.items()}

    problems, digests = on_rank_zero(look, CheckpointError)
    if problems or not content:
        return problems
    names = sorted(digests)[dist.get_rank() :: dist.get_world_size()]
    found: list[Any] = [None] * dist.get_world_size()
    mine = {name: digests[name] for name in names}
    dist.all_gather_object(found, store.changed_files(directory, mine))
    return [problem for part in found for problem in part]
