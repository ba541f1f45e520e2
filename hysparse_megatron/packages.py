"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from hysparse_megatron.errors import ConfigError

_EXTRAS = {
    "backports.zstd": "data",
    "datatrove": "data",
    "pyarrow": "data",
    "ray": "ray",
    "safetensors": "huggingface",
    "sentencepiece": "data",
    "tqdm": "data",
    "transformers": "huggingface",
}
"""The extra of this project that brings a package."""


def require_package(name: str, purpose: str) -> Any:
    """Import a package that training does not need, as `import name`.

    Args:
        name: of a package in `_EXTRAS`, or of a module in it.
        purpose: completes "... needs the package NAME".

    Raises:
        ConfigError: it is not installed; names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = next(key for key in _EXTRAS if f"{name}.".startswith(f"{key}."))
        raise ConfigError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): "
            f"pip install {package} (the extra `{_EXTRAS[package]}` of this project has it)"
        ) from error
