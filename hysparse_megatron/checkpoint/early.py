"""The description of tensors in checkpoints of early versions: `.metadata`, a pickle.

A pickle names classes and functions that reading it calls. Here every name stands for an object
that does nothing but hold what it is given, and a name that torch's format does not have is an
error. What comes out is checked like any other index.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from hysparse_megatron.errors import CheckpointError

METADATA = ".metadata"

_FORMAT = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}
"""Names in the pickles that torch writes."""


class _Held:
    """Stands for an instance of a class, or for the result of a function."""

    state: Any

    def __new__(cls, *given: Any) -> _Held:
        del given
        held = object.__new__(cls)
        held.state = {}
        return held

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            if name == "Size":
                return tuple
            if isinstance(getattr(torch, name, None), torch.dtype):
                return name
        if name not in _FORMAT.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return type(name, (_Held,), {})


def read_early_index(directory: Path) -> dict[str, Any]:
    """What `tensors.json` would hold. Raises CheckpointError for what torch has not written."""
    try:
        with (directory / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load().state
        index = _described(metadata["state_dict_metadata"])
        for place, found in metadata["storage_data"].items():
            where = found.state
            entry = {
                "file": where["relative_path"],
                "start": where["offset"],
                "bytes": where["length"],
            }
            name, offsets = place.state["fqn"], place.state.get("offset") or ()
            if name not in index["tensors"]:
                index["objects"][name] = entry
                continue
            tensor = index["tensors"][name]
            sizes = tensor["sizes"][tuple(offsets)]
            tensor["chunks"].append({"offsets": list(offsets), "sizes": sizes, **entry})
    except Exception as error:  # a pickle of a stranger may fail in any way
        raise CheckpointError(
            f"{directory / METADATA} is no description of tensors: {type(error).__name__}: {error}"
        ) from error
    for tensor in index["tensors"].values():
        del tensor["sizes"]
    return index


def _described(entries: dict[str, _Held]) -> dict[str, Any]:
    tensors = {
        name: {
            "dtype": entry.state["properties"].state[0],
            "shape": list(entry.state["size"]),
            "chunks": [],
            "sizes": {
                tuple(chunk.state["offsets"]): list(chunk.state["sizes"])
                for chunk in entry.state["chunks"]
            },
        }
        for name, entry in entries.items()
        if "chunks" in entry.state
    }
    return {"tensors": tensors, "objects": {}}
