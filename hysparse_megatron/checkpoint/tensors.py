"""The content of a checkpoint, described by JSON and read without unpickling.

megatron-core's format describes tensors in a pickle, `.metadata`, and stores each as a zip archive
of its bytes and a pickle that says how to build a tensor of them. `tensors.json` names the place,
shape and type of every tensor, so that the bytes suffice.

    {"tensors": {NAME: {"dtype": "float32", "shape": [8, 4], "chunks": [
        {"offsets": [0, 0], "sizes": [4, 4], "file": "__0_0.distcp", "start": 64, "bytes": 1261}
     ]}}, "objects": {NAME: {"file": "__0_0.distcp", "start": 1325, "bytes": 2093}}}

`objects` are settings of the optimizer, needed to go on training and not for the weights. Early
versions gave their names alone; where they lie stands in `.metadata` then.
"""

from __future__ import annotations

import io
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hysparse_megatron.checkpoint.early import read_early_index
from hysparse_megatron.errors import CheckpointError

INDEX = "tensors.json"
OPTIMIZER = "optimizer."
"""What the names of optimizer state begin with."""

Index = dict[str, dict[str, Any]]
"""`tensors` and `objects`, as above."""


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    # A NaN is both the smallest and the largest value.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def write_index(metadata: Metadata, places: dict[Any, Any], directory: Path) -> None:
    """Write `tensors.json` from megatron-core's description of the files.

    `places` says where each chunk and object lies, by its `MetadataIndex`.
    """
    tensors: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    sizes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": []}
            sizes |= {(name, tuple(chunk.offsets)): list(chunk.sizes) for chunk in entry.chunks}
    for index, place in places.items():
        where = {"file": place.relative_path, "start": place.offset, "bytes": place.length}
        if index.fqn not in tensors:
            objects[index.fqn] = where
            continue
        offsets = tuple(index.offset or ())
        chunk = {"offsets": list(offsets), "sizes": sizes[index.fqn, offsets], **where}
        tensors[index.fqn]["chunks"].append(chunk)
    with (directory / INDEX).open("w") as file:
        json.dump({"tensors": tensors, "objects": objects}, file)


def read_index(directory: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a checkpoint by name: dtype, shape and chunks. Raises CheckpointError."""
    return _checked(directory, ("tensors",))["tensors"]


def read_whole_index(directory: Path) -> Index:
    """Tensors and objects of a checkpoint. Raises CheckpointError for an index that is damaged."""
    return _checked(directory, ("tensors", "objects"))


def _checked(directory: Path, parts: Sequence[str]) -> Index:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text()) if path.exists() else read_early_index(directory)
        if "objects" in parts and isinstance(index["objects"], list):
            index["objects"] = read_early_index(directory)["objects"]
        file_sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
        checks = {"tensors": _check_tensor, "objects": _check_place}
        for part in parts:
            for name, entry in index[part].items():
                checks[part](name, entry, file_sizes)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return index


def _check_tensor(name: str, entry: dict[str, Any], file_sizes: dict[str, int]) -> None:
    """Raise ValueError unless the chunks lie in the tensor and are as many values as it has."""
    dtype = getattr(torch, entry["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name}: no type of numbers: {entry['dtype']}")
    shape = _counts(entry["shape"])
    covered = 0
    for chunk in entry["chunks"]:
        _check_place(name, chunk, file_sizes)
        offsets, sizes = _counts(chunk["offsets"]), _counts(chunk["sizes"])
        ends = zip(offsets, sizes, shape, strict=True)
        if any(offset + size > whole for offset, size, whole in ends):
            raise ValueError(f"{name}: a chunk {sizes} at {offsets} is not in {shape}")
        if math.prod(sizes) * dtype.itemsize > chunk["bytes"]:
            raise ValueError(f"{name}: {chunk['bytes']} bytes are no {sizes} of {dtype}")
        covered += math.prod(sizes)
    if covered != math.prod(shape):
        raise ValueError(f"{name}: chunks hold {covered} of the values of {shape}")


def _check_place(name: str, place: dict[str, Any], file_sizes: dict[str, int]) -> None:
    start, length = _counts([place["start"], place["bytes"]])
    if start + length > file_sizes.get(place["file"], -1):
        raise ValueError(f"{name} is said to lie in {place['file']}, which does not hold it")


def _counts(values: list[Any]) -> list[int]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"no sizes: {values}")
    return values


def num_bytes(entry: dict[str, Any]) -> int:
    """The size of a tensor of the index."""
    return math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize


def read_tensor(directory: Path, entry: dict[str, Any]) -> Tensor:
    """One whole tensor of the index, on the CPU.

    Raises CheckpointError when the file does not hold what the index says.
    """
    dtype = getattr(torch, entry["dtype"])
    whole = torch.empty(entry["shape"], dtype=dtype)
    for chunk in entry["chunks"]:
        numel = math.prod(chunk["sizes"])
        content = _content(directory / chunk["file"], chunk, numel * dtype.itemsize)
        if numel:
            piece = torch.frombuffer(content, dtype=dtype).view(chunk["sizes"])
            places = zip(chunk["offsets"], chunk["sizes"], strict=True)
            whole[tuple(slice(start, start + size) for start, size in places)] = piece
    return whole


def _content(path: Path, chunk: dict[str, Any], num_bytes: int) -> bytearray:
    """The bytes of the tensor archived there, which are to be so many."""
    start = chunk["start"]
    try:
        with path.open("rb") as file:
            file.seek(start)
            archived = file.read(chunk["bytes"])
        with zipfile.ZipFile(io.BytesIO(archived)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            order = archive.read(names["byteorder"]).decode()
            found = archive.getinfo(names["data/0"]).file_size
            # Asked before: a few bytes may stand for more than memory holds.
            if found != num_bytes:
                raise CheckpointError(
                    f"{path}: {found} bytes at {start} are no tensor of {num_bytes} bytes, "
                    f"{chunk['sizes']}"
                )
            content = bytearray(archive.read(names["data/0"]))
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: no tensor at {start}: {error}") from error
    if order != sys.byteorder:
        raise CheckpointError(f"{path} was written on a machine of {order}-endian numbers")
    return content


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint by their global names, whole, whatever layout wrote them."""
    return {
        name: read_tensor(directory, entry)
        for name, entry in read_index(directory).items()
        if not name.startswith(OPTIMIZER)
    }
