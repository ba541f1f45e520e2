"""Tensors of a Hugging Face folder, read one at a time from its safetensors files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hysparse_megatron.errors import CheckpointError, ConfigError
from hysparse_megatron.huggingface.settings import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class _Place:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFolder:
    """The tensors of all shards by name. Files are open only while they are read.

    Raises ConfigError for a folder without safetensors or with an adapter, and CheckpointError,
    with its path, for a shard that is missing, truncated or lacks what the index says, or a tensor
    that several shards hold with other values.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / ADAPTER).exists():  # which transformers would apply, where peft is installed
            raise ConfigError(f"{folder / ADAPTER}: merge the adapter into the weights first")
        files = [SINGLE]
        named: dict[str, str] = {}
        # A whole file comes first, as in transformers: an index beside it is left from before.
        if not (folder / SINGLE).is_file():
            if not (folder / INDEX).is_file():
                raise ConfigError(
                    f"{folder} holds neither {SINGLE} nor {INDEX}; transformers writes them: "
                    "model.save_pretrained(folder)"
                )
            named = _weight_map(folder)
            files = sorted(set(named.values()))
        # Absolute paths too, as transformers reads them.
        held = {file: _places(folder / file) for file in files}
        # Of several shards with a tensor transformers reads the last.
        self._places = {name: place for found in held.values() for name, place in found.items()}
        for name, file in named.items():
            if name not in held[file]:
                raise CheckpointError(f"{folder / file} lacks {name}, which {INDEX} says it holds")
            if not _alike(name, held[file][name], self._places[name]):
                raise CheckpointError(
                    f"{name} is another in {self._places[name].file} than in {folder / file}, "
                    f"where {INDEX} says it is"
                )

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor. Raises ConfigError for one that weights cannot have here."""
        found = self._places[name].dtype
        if found not in _DTYPES:
            raise ConfigError(f"{name} is {found}; allowed {', '.join(_DTYPES)}: not quantised")
        return _DTYPES[found]

    def widest(self, names: Sequence[str]) -> torch.dtype:
        """The type that holds the values of several tensors exactly: fp32 for bf16 and fp16."""
        return functools.reduce(torch.promote_types, map(self.dtype, names))

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        return _read(name, self._places[name].file)


def _weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor, as the index has it."""
    found = read_json(folder, INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{folder / INDEX} is damaged: weight_map names no files")
    return found


def _read(name: str, file: Path) -> Tensor:
    try:
        # The file is mapped: what was read of it would stay in memory while it is open.
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name).clone()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error


def _alike(name: str, one: _Place, other: _Place) -> bool:
    """Whether a tensor is the same in two files, bit by bit: a NaN is equal to no number."""
    if one.file == other.file:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = (_read(name, place.file).reshape(-1).view(torch.uint8) for place in (one, other))
    return torch.equal(*bits)


def _places(file: Path) -> dict[str, _Place]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: _Place(file, tuple(found.get_shape()), found.get_dtype())
                for name, found in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error
