"""`debug.memory_snapshot`: who held the memory of a GPU when it ran out.

PyTorch's allocator keeps its last allocations with the lines of Python that made them. What it
knows when one fails is written to the run directory, for https://docs.pytorch.org/memory_viz.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from hysparse_megatron.errors import ConfigError

FOLDER = "memory"
"""In the run directory."""

MAX_ENTRIES = 100_000
"""Allocations and frees that are kept: several steps, some hundred megabytes of the host."""


@contextlib.contextmanager
def snapshot_when_full(run_path: Path, rank: int, device: torch.device) -> Iterator[None]:
    """Record allocations within; write them when one of this rank finds no memory.

    Raises what is raised within; of torch.OutOfMemoryError one that says where the snapshot is, or
    why there is none. Raises ConfigError where there is no GPU.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"debug.memory_snapshot: true needs a CUDA device, this is {device.type}; use false"
        )
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES, stacks="python")
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{_dump(run_path, rank)}. {error}") from error
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _dump(run_path: Path, rank: int) -> str:
    """Write the snapshot; where it is, or why it is not."""
    path = run_path / FOLDER / f"rank{rank}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as failure:
        return f"No memory snapshot ({failure})"
    return f"The memory snapshot of rank {rank} is {path}"
