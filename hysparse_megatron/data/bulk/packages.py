"""Packages that only some inputs need."""

from __future__ import annotations

import importlib
from typing import Any

from hysparse_megatron.errors import ConfigError


def require_package(name: str, purpose: str) -> Any:
    """Import a package that training does not need, as `import name`.

    Args:
        name: of the package, the same for Python and for pip; or of a module in it.
        purpose: completes "... needs the package NAME".

    Raises:
        ConfigError: it is not installed; names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): "
            f"pip install {package}"
        ) from error
