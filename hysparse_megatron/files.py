"""What several parts of a run do with files alike."""

from __future__ import annotations

import os


def sync_folder(directory: str | os.PathLike[str]) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
