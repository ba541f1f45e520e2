"""A checkpoint of weights alone, made by one process of tensors that come one after another.

For weights that come from elsewhere: no model is built, and no more than one tensor is in memory.
A run starts from it with `checkpoint.load`; it cannot be continued, as it holds no optimizer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from hysparse_megatron.checkpoint.tensors import is_finite, write_index
from hysparse_megatron.checkpoint.writer import CheckpointWrite, Job
from hysparse_megatron.errors import CheckpointError

_OBJECTS: dict[str, list[Any]] = {
    "common_state/shard_0_1": [{"step": 0}],
    "output_layer._extra_state/shard_0_1": [None],
}
"""What megatron-core looks for beside tensors, under the names it gives whole objects."""

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True)
class Source:
    """A weight that is read when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Returns it, on the CPU."""


class _IndexedWriter(torch_checkpoint.FileSystemWriter):
    """Writes `tensors.json` too."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        places = {result.index: result.storage_data for part in results for result in part}
        write_index(metadata, places, Path(self.path))


class _ReadWhenWritten(DefaultSavePlanner):
    """Plans with tensors without memory, and reads each as its file is written."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        super().__init__(flatten_state_dict=False)
        self._sources = sources

    def lookup_object(self, index: MetadataIndex) -> Any:
        source = self._sources.get(index.fqn)
        if source is None:
            return super().lookup_object(index)
        tensor = source.read()
        if tuple(tensor.shape) != source.shape or tensor.dtype != source.dtype:
            raise CheckpointError(
                f"{index.fqn}: got {tensor.dtype} {list(tensor.shape)}, expected {source.dtype} "
                f"{list(source.shape)}"
            )
        if not is_finite(tensor):
            raise CheckpointError(f"{index.fqn} holds NaN or infinity, of which nothing can start")
        return tensor


def save_weights(checkpoints: Path, sources: Mapping[str, Source], facts: dict[str, Any]) -> Path:
    """Write `checkpoints/step-00000000` and return it; `facts` are added to its manifest.

    Raises CheckpointError if it cannot be written or a weight is not finite; nothing is left then.
    """

    def start(directory: Path) -> Job:
        return Job(write=lambda: _write(sources, directory), finish=lambda: None)

    with _process_group():
        return CheckpointWrite(checkpoints, 0, start, facts).finish()


def _write(sources: Mapping[str, Source], directory: Path) -> None:
    planned = {
        name: torch.empty(source.shape, dtype=source.dtype, device="meta")
        for name, source in sources.items()
    }
    torch_checkpoint.save(
        {**_OBJECTS, **planned},
        # Of a file with several tensors torch would keep all in memory.
        storage_writer=_IndexedWriter(directory, single_file_per_rank=False),
        planner=_ReadWhenWritten(sources),
    )
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """The default process group, or one of this process alone while there is none."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
