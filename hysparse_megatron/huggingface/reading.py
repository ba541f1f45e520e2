"""Tensors of a Hugging Face folder, read one at a time from its safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hysparse_megatron.errors import CheckpointError, ConfigError
from hysparse_megatron.huggingface.settings import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorFolder:
    """The tensors of all shards by name.

    Raises ConfigError for a folder without safetensors, and CheckpointError, with its path, for a
    shard that is missing, truncated or lacks what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[Path, Any] = {}
        if (folder / INDEX).is_file():
            self._names = {
                name: folder / file for name, file in read_json(folder, INDEX)["weight_map"].items()
            }
        elif (folder / SINGLE).is_file():
            self._names = dict.fromkeys(self._open(folder / SINGLE).keys(), folder / SINGLE)
        else:
            raise ConfigError(
                f"{folder} holds neither {SINGLE} nor {INDEX}; transformers writes them: "
                "model.save_pretrained(folder)"
            )
        for path in set(self._names.values()):
            held = set(self._open(path).keys())
            lost = [name for name, file in self._names.items() if file == path and name not in held]
            if lost:
                raise CheckpointError(f"{path} lacks {lost[0]}, which {INDEX} says it holds")

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is missing or damaged: {error}") from error
        return self._files[path]

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Likewise. Raises ConfigError for one that weights cannot have here."""
        found = self._slice(name).get_dtype()
        if found not in _DTYPES:
            raise ConfigError(f"{name} is {found}; allowed {', '.join(_DTYPES)}: not quantised")
        return _DTYPES[found]

    def _slice(self, name: str) -> Any:
        return self._open(self._names[name]).get_slice(name)

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        path = self._names[name]
        try:
            return self._open(path).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
