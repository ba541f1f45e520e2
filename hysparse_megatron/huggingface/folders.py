"""Folders that get their name when they are whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hysparse_megatron.errors import CheckpointError, ConfigError


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, which gets its name when it is whole.

    Raises ConfigError if there is something of this name, CheckpointError if it cannot be written.
    """
    refuse_taken(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            write(temporary)
            _open_modes(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder} was not written: {error}") from error


def _open_modes(folder: Path) -> None:
    """Give a folder and its files the modes of new ones: `mkdtemp` and safetensors keep to 0700."""
    probe = folder / "probe"
    probe.mkdir()
    mode = probe.stat().st_mode & 0o777  # 0777 less the umask, which cannot be read by itself
    probe.rmdir()
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def refuse_taken(folder: Path) -> None:
    """Raise ConfigError if something of this name would be written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not written over: choose another one")
