"""Which checkpoint to load: one decision of all ranks, each of which hashes a share of the files.

Everything here is collective over the default process group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hysparse_megatron.checkpoint import store
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.runtime.agreement import on_rank_zero


def latest(checkpoints: Path, content: bool) -> tuple[Path | None, list[str]]:
    """`store.latest_checkpoint`, of which all ranks are told alike."""
    return store.latest_checkpoint(checkpoints, _judge(content), _agreed)


def resolve(path: Path, step: int | None, content: bool) -> Path:
    """`store.resolve`, of which all ranks are told alike."""
    return store.resolve(path, step, _judge(content), _agreed)


def _judge(content: bool) -> store.Problems:
    return functools.partial(problems_of, content=content)


def _agreed[Answer](look: Callable[[], Answer]) -> Answer:
    return on_rank_zero(look, CheckpointError)


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
