"""The manifest of a checkpoint: what it must hold to be believed, and the hash of its own content.

    {"step": 150, "files": {NAME: {"bytes": 4096, "sha256": HEX}}, "manifest_sha256": HEX, ...}

A manifest may come from a damaged disk, an editor or a stranger: nothing in it is used before its
type and range are checked. Those of early versions have no hash of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.files import sync_folder

MANIFEST = "manifest.json"

LARGEST_BYTES = 64 * 2**20
"""Of a manifest; one of ten thousand ranks has about two million."""

_OWN_HASH = "manifest_sha256"
_SHA256 = re.compile("[0-9a-f]{64}")
_KINDS: dict[str, type] = {
    "samples": int,
    "tokens": int,
    "progress": dict,
    "data": dict,
    "tokenizer": dict,
    "model": dict,
    "optim": dict,
    "settings": dict,
    "held_out": dict,
    "config_hash": str,
}
"""Types of what may be there besides `step` and `files`."""

_DESCRIPTIONS = ("tensors.json", ".metadata")
"""Files that say where tensors lie; without one of them the others are of no use."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError, saying what is wrong with it.

    The step is that of the directory's name, where it has the name of a step.
    """
    path = directory / MANIFEST
    try:
        if not path.is_file():
            raise CheckpointError("there is none" if not path.exists() else "it is no file")
        if path.stat().st_size > LARGEST_BYTES:
            raise CheckpointError(f"it has more than {LARGEST_BYTES:,} bytes")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"it cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds a {type(content).__name__}, not names and values")
    if _OWN_HASH in content and content[_OWN_HASH] != _hash(content):
        raise CheckpointError(f"it has another content than its own {_OWN_HASH} says")
    _check_step(content.get("step"), directory)
    _check_kinds(content)
    _check_files(content.get("files"))
    return content


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """The last file of a checkpoint; on disk, with the names of all files, when this returns."""
    plain = json.loads(json.dumps(content))
    with (directory / MANIFEST).open("w") as file:
        json.dump({**plain, _OWN_HASH: _hash(plain)}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(directory)


def _hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of all but itself, as plain JSON."""
    rest = {name: value for name, value in content.items() if name != _OWN_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int too


def _check_step(step: Any, directory: Path) -> None:
    if not _is_count(step):
        raise CheckpointError(f"its step is {step!r}, and no number of steps")
    named = re.fullmatch("step-([0-9]+)", directory.name)
    if named and int(named[1]) != step:
        raise CheckpointError(
            f"it is of step {step}, but its directory is named {directory.name}: was it renamed?"
        )


def _check_kinds(content: Mapping[str, Any]) -> None:
    for name, kind in _KINDS.items():
        if name in content and not isinstance(content[name], kind):
            found = type(content[name]).__name__
            raise CheckpointError(f"its {name} is a {found}, not a {kind.__name__}")
    position = content.get("progress", {}).get("position", {})
    if not isinstance(position, dict) or not all(map(_is_count, position.values())):
        raise CheckpointError("its progress.position does not count samples and steps")
    guard = content.get("progress", {}).get("guard", {})
    if not isinstance(guard, dict):
        raise CheckpointError("its progress.guard holds no names and values")
    for name in ("losses", "grad_norms"):
        values = guard.get(name, [])
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            raise CheckpointError(f"its progress.guard.{name} are no numbers")
    if not _is_count(guard.get("skipped", 0)):
        raise CheckpointError("its progress.guard.skipped is no number of steps")
    position = content.get("progress", {}).get("position", {})
    if not isinstance(position, dict) or not all(map(_is_count, position.values())):
        raise CheckpointError("its progress.position holds no names and numbers of samples")


def _check_files(files: Any) -> None:
    if not isinstance(files, dict):
        raise CheckpointError("its files are no names with sizes and hashes")
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or str(path) != name:
            raise CheckpointError(f"it names a file outside of the checkpoint: {name!r}")
        if (
            not isinstance(entry, dict)
            or not _is_count(entry.get("bytes"))
            or not _SHA256.fullmatch(str(entry.get("sha256")))
        ):
            raise CheckpointError(f"it has no size and hash for {name}")
    if not any(name.endswith(".distcp") for name in files):
        raise CheckpointError("it names no file with tensors (*.distcp)")
    if not any(name in files for name in _DESCRIPTIONS):
        raise CheckpointError(f"it names none of {', '.join(_DESCRIPTIONS)}")
