"""What several parts of a run do with files alike."""

from __future__ import annotations

import os
from pathlib import Path

from hysparse_megatron.errors import ConfigError


def require_writable(path: Path | None, option: str) -> None:
    """Find out before minutes of work that a file asked for cannot be written.

    Raises ConfigError, which names the command line's `option`.
    """
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {path} ({error.strerror})") from error


def sync_folder(directory: str | os.PathLike[str]) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
