"""From tensors that training changes to a file: copied at once, written later.

megatron-core plans who writes what and describes the files; what it plans to write is copied here
into host memory, pinned if it comes from a GPU, and written by whoever calls `write`. The memory is
kept for the next save: taking it anew would cost more time than the copy.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from hysparse_megatron.checkpoint.tensors import write_index
from hysparse_megatron.errors import CheckpointError

_memory: dict[MetadataIndex, Tensor] = {}
"""Host copies by what they are a copy of, as of the last save. One save is under way at a time."""


class StagingWriter(FileSystemWriterAsync):
    """Writes one rank's share into one file, `__RANK_0.distcp`."""

    _file: Path
    _name: str
    _bytes: list[tuple[WriteItem, Any]]
    _tensors: list[tuple[WriteItem, Tensor]]
    _results: list[WriteResult]
    failure: Exception | None = None
    """Why rank 0 could not describe the files."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Copy everything that `plan` wants written."""
        self._name = f"{plan.storage_data.prefix}0.distcp"
        self._file = Path(self.checkpoint_dir) / self._name
        self._bytes, self._tensors, self._results = [], [], []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                self._bytes.append((item, planner.resolve_data(item)))
            else:
                tensor: Any = planner.resolve_data(item)
                self._tensors.append((item, _copy(item.index, tensor)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        kept = {item.index for item, _ in self._tensors}
        for index in _memory.keys() - kept:
            del _memory[index]

    def get_save_function_and_args(self) -> tuple[Any, Any, list[Any]]:
        """What megatron-core puts into the request that `save` returns."""
        return self.write, None, []

    def write(self) -> None:
        """Write the copies. Local, in any thread. Raises CheckpointError with path and bytes."""
        if not self._bytes and not self._tensors:
            return
        bucket = (str(self._file), self._name, (self._bytes, self._tensors))
        _, results = self.write_preloaded_data([self.transforms], 0, bucket, None, None, True)
        if isinstance(results, BaseException):
            raise CheckpointError(self._explain(results)) from results
        self._results = results

    def _explain(self, error: BaseException) -> str:
        planned = sum(tensor.nbytes for _, tensor in self._tensors)
        written = self._file.stat().st_size if self._file.exists() else 0
        free = shutil.disk_usage(self._file.parent).free if self._file.parent.exists() else 0
        cause = error
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        return (
            f"{type(cause).__name__}: {cause}; {self._file} has {written:,} of at least "
            f"{planned:,} bytes, and its file system {free:,} bytes free"
        )

    def retrieve_write_results(self) -> list[WriteResult]:
        """Where `write` put what."""
        return self._results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describe the files of all ranks. On rank 0, while the others wait for it.

        That is why an error is kept: raised here it would leave them waiting.
        """
        try:
            super().finish(metadata, results)
            places = {result.index: result.storage_data for part in results for result in part}
            write_index(metadata, places, Path(self.checkpoint_dir))
        except Exception as error:
            self.failure = error


def _copy(index: MetadataIndex, tensor: Tensor) -> Tensor:
    """A contiguous host copy with a storage of its own, as the file would hold all of a storage."""
    copy = _memory.get(index)
    if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
        shape, pinned = tensor.shape, tensor.is_cuda
        copy = torch.empty(shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        _memory[index] = copy
    return copy.copy_(tensor.detach(), non_blocking=True)
