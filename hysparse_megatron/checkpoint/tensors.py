"""The tensors of a checkpoint, described by JSON and read without unpickling anything.

megatron-core's format describes tensors in a pickle, `.metadata`, and stores each as a zip archive
of its bytes and a pickle that says how to build a tensor of them. `tensors.json` names the place,
shape and type of every tensor, so that the bytes suffice.

    {"tensors": {NAME: {"dtype": "float32", "shape": [8, 4], "chunks": [
        {"offsets": [0, 0], "sizes": [4, 4], "file": "__0_0.distcp", "start": 64, "bytes": 1261}
     ]}}, "objects": [NAME]}

`objects` are pickled: settings of the optimizer, needed to go on training and not for the weights.
"""

from __future__ import annotations

import io
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hysparse_megatron.errors import CheckpointError

INDEX = "tensors.json"
OPTIMIZER = "optimizer."
"""What the names of optimizer state begin with."""


def write_index(metadata: Metadata, places: dict[Any, Any], directory: Path) -> None:
    """Write `tensors.json` from megatron-core's description of the files.

    `places` says where each chunk and object lies, by its `MetadataIndex`.
    """
    tensors: dict[str, Any] = {}
    objects = []
    sizes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            objects.append(name)
            continue
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": []}
        sizes |= {(name, tuple(chunk.offsets)): list(chunk.sizes) for chunk in entry.chunks}
    for index, place in places.items():
        if index.fqn in tensors:
            offsets = tuple(index.offset or ())
            tensors[index.fqn]["chunks"].append(
                {
                    "offsets": list(offsets),
                    "sizes": sizes[index.fqn, offsets],
                    "file": place.relative_path,
                    "start": place.offset,
                    "bytes": place.length,
                }
            )
    with (directory / INDEX).open("w") as file:
        json.dump({"tensors": tensors, "objects": sorted(objects)}, file)


def read_index(directory: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a checkpoint by name: dtype, shape and chunks. Raises CheckpointError."""
    try:
        return json.loads((directory / INDEX).read_text())["tensors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory / INDEX} cannot be read ({type(error).__name__}: {error}); checkpoints of "
            "early versions have none"
        ) from error


def num_bytes(entry: dict[str, Any]) -> int:
    """The size of a tensor of the index."""
    return math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize


def read_tensor(directory: Path, entry: dict[str, Any]) -> Tensor:
    """One whole tensor of the index, on the CPU.

    Raises CheckpointError when the file does not hold what the index says.
    """
    dtype = getattr(torch, entry["dtype"])
    whole = torch.empty(entry["shape"], dtype=dtype)
    covered = 0
    for chunk in entry["chunks"]:
        content = _content(directory / chunk["file"], chunk["start"], chunk["bytes"])
        numel = math.prod(chunk["sizes"])
        if len(content) != numel * dtype.itemsize:
            raise CheckpointError(
                f"{directory / chunk['file']}: {len(content)} bytes at {chunk['start']} are no "
                f"tensor {chunk['sizes']} of {entry['dtype']}"
            )
        covered += numel
        if numel:
            piece = torch.frombuffer(content, dtype=dtype).view(chunk["sizes"])
            places = zip(chunk["offsets"], chunk["sizes"], strict=True)
            whole[tuple(slice(start, start + size) for start, size in places)] = piece
    if covered != whole.numel():
        raise CheckpointError(
            f"{directory}: chunks hold {covered} of the {whole.numel()} values of a tensor"
        )
    return whole


def _content(path: Path, start: int, length: int) -> bytearray:
    """The bytes of the tensor archived there."""
    with path.open("rb") as file:
        file.seek(start)
        archived = file.read(length)
    try:
        with zipfile.ZipFile(io.BytesIO(archived)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            order = archive.read(names["byteorder"]).decode()
            content = bytearray(archive.read(names["data/0"]))
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
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
