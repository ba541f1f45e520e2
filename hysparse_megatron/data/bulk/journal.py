"""The work folder of a preparation: shards, and a journal of those that are finished.

A killed preparation leaves the folder; the next one with the same request goes on from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from hysparse_megatron.data.bulk.shards import ShardRecord, TextPart, shard_bytes
from hysparse_megatron.data.bulk.units import split_name
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import sync_folder

_REQUEST_NAME, _JOURNAL_NAME = "request.json", "journal.jsonl"


class WorkFolder:
    """Finished shards by the name of their unit. Used by one process, under a lock.

    Args:
        path: of the folder; created.
        request: what decides the contents of the shards, as JSON values.
        dtype: of one token.
        discard: throw away what a preparation of another request left. One that has not finished
            a shard is always thrown away: the first try may have had a wrong option.

    Raises:
        ConfigError: the folder belongs to another request (names what differs), or is no work
            folder.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: str, request: Mapping[str, Any], dtype: type[np.integer], *, discard: bool
    ) -> None:
        self.path = path
        self.records: dict[str, ShardRecord] = {}
        self._dtype = dtype
        self._journal_path = os.path.join(path, _JOURNAL_NAME)
        found = read_request(path)
        if found is not None and found != request:
            if not discard and self._has_shards():
                raise ConfigError(_difference(path, found, request))
            shutil.rmtree(path)
        os.makedirs(path, exist_ok=True)
        if found is None and any(_REQUEST_NAME not in name for name in os.listdir(path)):
            raise ConfigError(f"{path}: holds other files; name another output")
        self._remove_unfinished()
        if found == request:
            self._read_journal()
        else:
            _write_atomically(os.path.join(path, _REQUEST_NAME), json.dumps(request, indent=2))
        self._journal = open(self._journal_path, "ab")  # noqa: SIM115

    def add(self, record: ShardRecord) -> None:
        """Note that a shard is finished, so that no kill loses it."""
        self.records[record.name] = record
        self._journal.write(json.dumps(asdict(record)).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def shard_path(self, record: ShardRecord) -> str:
        """Where a shard is."""
        return os.path.join(self.path, record.name)

    def in_order(self) -> list[ShardRecord]:
        """All records in the order of the documents."""
        return [self.records[name] for name in sorted(self.records)]

    def finished_sources(self) -> set[int]:
        """Numbers of the files that were cut into units of their own which are all there."""
        found: dict[int, int] = {}
        needed: dict[int, int] = {}
        for record in self.records.values():
            source, part = split_name(record.name)
            found[source] = found.get(source, 0) + 1
            needed[record.finished_source] = part + 1
        return {source for source, count in found.items() if count == needed.get(source)}

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        self.close()
        shutil.rmtree(self.path)

    def _has_shards(self) -> bool:
        try:
            return os.path.getsize(self._journal_path) > 0
        except OSError:
            return False

    def _remove_unfinished(self) -> None:
        for entry in os.scandir(self.path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif ".tmp-" in entry.name or entry.name.endswith(".spill"):
                os.remove(entry.path)

    def _read_journal(self) -> None:
        """Take over the shards that are there; cut off a last line that a kill left unfinished."""
        try:
            with open(self._journal_path, "rb") as stream:
                lines = stream.readlines()
        except FileNotFoundError:
            return
        valid_bytes = 0
        for line in lines:
            record = _parse(line)
            if record is None:
                break
            valid_bytes += len(line)
            if self._is_there(record):
                self.records[record.name] = record
        os.truncate(self._journal_path, valid_bytes)

    def _is_there(self, record: ShardRecord) -> bool:
        try:
            found = os.path.getsize(self.shard_path(record))
        except OSError:
            return False
        return found == shard_bytes(record, self._dtype)


def _parse(line: bytes) -> ShardRecord | None:
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
        part = values.pop("part")
        return ShardRecord(**values, part=TextPart(**part) if part else None)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def read_request(path: str) -> dict[str, Any] | None:
    """The request of a work folder; None if no preparation has begun in it, {} if damaged."""
    try:
        with open(os.path.join(path, _REQUEST_NAME), "rb") as stream:
            values = json.load(stream)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _difference(path: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [name for name in wanted if found.get(name) != wanted[name]]
    listed = "; ".join(
        f"{name}: {found.get(name)!r} -> {wanted[name]!r}"
        if not name.endswith("sha256")
        else f"{name.removesuffix('_sha256')} changed"
        for name in names
    )
    return (
        f"{path}: holds an unfinished preparation of another request ({listed}); repeat that one "
        "to finish it, or throw it away with --overwrite"
    )


def _write_atomically(path: str, text: str) -> None:
    temporary = f"{path}.tmp-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, path)
    sync_folder(os.path.dirname(path))
