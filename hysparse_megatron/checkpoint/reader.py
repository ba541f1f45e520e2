"""torch's reader of the format, which unpickles nothing but plain values.

megatron-core loads through it: what it asks for as a whole object is decoded by torch's
weights-only rules, and the description of all of it comes from `tensors.json`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from hysparse_megatron.checkpoint.tensors import read_whole_index
from hysparse_megatron.errors import CheckpointError

_COMMON = "common.pt"
"""Where versions of megatron-core before ours kept what is no tensor, and newer ones still look."""


def use_for_loading(directory: Path) -> None:
    """Let megatron-core load `directory` through this reader.

    Raises CheckpointError for an index that is damaged, and for a file that megatron-core would
    prefer, and unpickle.
    """
    if (directory / _COMMON).exists():
        raise CheckpointError(f"{directory / _COMMON} is no file of our checkpoints; remove it")
    # Read once, and here: torch goes on without a description if reading it fails.
    metadata = _as_metadata(directory)

    def make_reader(*_: Any, **__: Any) -> _PlainReader:
        return _PlainReader(directory, metadata)

    serialization._get_filesystem_reader = make_reader
    torch_strategy._get_filesystem_reader = make_reader


class _PlainReader(FileSystemReader):
    """Reads checkpoints of anybody."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The description that torch keeps as a pickle."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what `plan` says. torch itself reads tensors by the weights-only rules."""
        return super().read_data(plan, _OfPlainObjects(planner))  # type: ignore[arg-type]


class _OfPlainObjects:
    """A planner that is given objects of plain values alone."""

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The planner unpickles without restrictions: it gets a pickle of ours.
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), plain)
        plain.seek(0)
        self._planner.load_bytes(read_item, plain)


def _as_metadata(directory: Path) -> Metadata:
    index = read_whole_index(directory)
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in index["tensors"].items():
        chunks = []
        for chunk in tensor["chunks"]:
            offsets = torch.Size(chunk["offsets"])
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
            places[MetadataIndex(name, offsets)] = _place(chunk)
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, tensor["dtype"])),
            torch.Size(tensor["shape"]),
            chunks,
        )
    for name, place in index["objects"].items():
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _place(place)
    return Metadata(state_dict_metadata=entries, storage_data=places)


def _place(place: dict[str, Any]) -> _StorageInfo:
    return _StorageInfo(place["file"], place["start"], place["bytes"])
