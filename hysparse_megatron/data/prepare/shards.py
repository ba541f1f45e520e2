"""Shards: what a unit of the corpus becomes, tokens and a table of documents, and what is kept of
the work until the corpus is whole. All of it lies in one folder, of any file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import numpy as np

from hysparse_megatron.data.places import is_local
from hysparse_megatron.data.prepare.sources import Piece, Source
from hysparse_megatron.data.tokenizer_choice import TokenizerChoice
from hysparse_megatron.errors import ConfigError, DataError

DOCUMENT = np.dtype([("num_tokens", "<u4"), ("key", "<u8", 2)])
"""A document of a shard: its tokens, the closing one included, and 16 bytes of its text's hash."""

MAX_DOCUMENT_TOKENS = 2**31 - 1
"""What Megatron's index can hold."""

MAX_SAMPLES = 10
UNWRITABLE = "cannot write prepared data"
UNFINISHED = ".tmp"
"""Ends the names of local files that are being written."""
_CHUNK_TOKENS = 1 << 20
_MAX_UINT16_VOCAB = 65500  # Megatron's limit


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type of one token that Megatron takes for a vocabulary."""
    return np.uint16 if vocab_size < _MAX_UINT16_VOCAB else np.int32


class Folder:
    """A folder of a local file system, or of one that fsspec knows.

    Raises:
        ConfigError: a URL whose protocol or package is missing.
        DataError: a URL whose file system, as an archive, cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path) if is_local(path) else path.rstrip("/")
        self.is_local = is_local(path)
        if self.is_local:  # fsspec would cut a name that holds `::`
            self._fs, self._root = fsspec.filesystem("file"), self.path
            return
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.path)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{path}: cannot be reached: {error}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be reached: {error}") from error

    def make(self) -> None:
        """Create it and its parents."""
        self._fs.makedirs(self._root, exist_ok=True)

    def names(self) -> set[str]:
        """Of its files and folders; none if it is not there."""
        self._fs.invalidate_cache(self._root)
        if not self._fs.isdir(self._root):
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, False)}

    def open(self, name: str, mode: str = "rb") -> Any:
        """A file in it, in binary."""
        if self.is_local:
            return open(os.path.join(self.path, name), mode)
        return self._fs.open(f"{self._root}/{name}", mode)

    def read_json(self, name: str) -> Any:
        """Raises OSError, ValueError."""
        with self.open(name) as stream:
            return json.load(stream)

    def write(self, name: str, data: bytes) -> None:
        """A whole file: nobody sees half of it, also after a loss of power."""
        with WholeFile(self, name) as file:
            file.write(data)

    def remove(self, *names: str) -> None:
        """Delete files in it, or, without names, all of it."""
        for path in [f"{self._root}/{name}" for name in names] or [self._root]:
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)


class WholeFile:
    """A file that is written from start to end and hashed, and has its name once it is whole."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        # Object stores show a file when it is closed.
        self._written_as = f"{name}.{secrets.token_hex(4)}{UNFINISHED}" if folder.is_local else name
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self._stream = folder.open(self._written_as, "wb")

    def write(self, data: bytes | np.ndarray) -> None:
        """Append bytes, or those of an array."""
        data = data if isinstance(data, bytes) else data.tobytes()
        self._hash.update(data)
        self.num_bytes += len(data)
        self._stream.write(data)

    def sha256(self) -> str:
        """Of what was written."""
        return self._hash.hexdigest()

    def __enter__(self) -> WholeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._folder.is_local:
            if kind is None:  # a remote file that is not closed does not come into being
                self._stream.close()
            return
        place, name = (os.path.join(self._folder.path, n) for n in (self._written_as, self._name))
        try:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                os.replace(place, name)
        finally:
            # Closing writes what is buffered: where a disk is full it fails once more, and only
            # then is the room of a removed file free. A file that is whole has its name by now.
            with contextlib.suppress(OSError):
                self._stream.close()
            with contextlib.suppress(OSError):
                os.remove(place)


@dataclass
class Record:
    """What is known of a finished unit.

    Attributes:
        num_tokens, num_documents: in the shard.
        largest_id: of its tokens; -1 if there are none.
        text_bytes: of the documents, as UTF-8.
        empty_documents, bad_documents: left out.
        bad_samples: what is wrong with the first bad ones.
        warnings: what else is to be told, in a line each.
        sha256: of the shard's file.
        source_hashes: SHA-256 of the local files whose first piece is in the unit, by number.
    """

    num_tokens: int = 0
    num_documents: int = 0
    largest_id: int = -1
    text_bytes: int = 0
    empty_documents: int = 0
    bad_documents: int = 0
    bad_samples: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sha256: str = ""
    source_hashes: dict[str, str] = field(default_factory=dict)


def shard_name(unit: int) -> str:
    """Of a unit's shard in the work folder."""
    return f"{unit:08d}.shard"


def record_name(unit: int) -> str:
    """Of its record, which is written after it."""
    return f"{unit:08d}.json"


def failure_name(rank: int) -> str:
    """Of the note that a process leaves of what ended it."""
    return f"failed-{rank:06d}"


def is_failure(name: str) -> bool:
    """Whether it is the name of such a note, and not of one that is being written."""
    return re.fullmatch(r"failed-\d+", name) is not None


@dataclass(frozen=True)
class Work:
    """What processes that share the work on a corpus have to know. It lies in the work folder.

    Attributes:
        folder: of shards, records and this.
        sources, units: see `sources.py`.
        tokenizer: by a name that is valid on all machines.
        text_key, max_document_bytes, max_bad: see `PrepareRequest`.
    """

    folder: str
    sources: list[Source]
    units: list[list[Piece]]
    tokenizer: TokenizerChoice
    text_key: str
    max_document_bytes: int
    max_bad: int | None

    def save(self) -> None:
        """Write it to its folder."""
        Folder(self.folder).write("work.json", json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, folder: str) -> Work:
        """The work that lies in a folder. Raises OSError, ValueError."""
        values = Folder(folder).read_json("work.json")
        values["sources"] = [Source(**source) for source in values["sources"]]
        values["units"] = [[Piece(**piece) for piece in unit] for unit in values["units"]]
        values["tokenizer"] = TokenizerChoice(**values["tokenizer"])
        return cls(**values)

    def done(self) -> list[int]:
        """Units whose record is there."""
        names = Folder(self.folder).names()
        return [unit for unit in range(len(self.units)) if record_name(unit) in names]

    def unit_bytes(self, unit: int) -> int:
        """Size of its pieces as they are stored."""
        return sum(piece.stop - piece.start for piece in self.units[unit])

    def records(self) -> list[Record]:
        """Of all units that are done, in order. Raises DataError."""
        folder = Folder(self.folder)
        found = []
        for unit in self.done():
            try:
                found.append(Record(**folder.read_json(record_name(unit))))
            except (OSError, ValueError, TypeError) as error:
                raise self._damaged(unit, record_name(unit)) from error
        return found

    def tables(self, records: list[Record], dtype: type[np.integer]) -> Iterator[np.ndarray]:
        """The documents of every shard: DOCUMENT [num_documents]. Raises DataError."""
        folder = Folder(self.folder)
        for unit, record in enumerate(records):
            try:
                with folder.open(shard_name(unit)) as stream:
                    stream.seek(record.num_tokens * dtype().itemsize)
                    yield np.frombuffer(stream.read(), DOCUMENT, record.num_documents)
            except (OSError, ValueError) as error:
                raise self._damaged(unit, shard_name(unit)) from error

    def tokens(
        self, unit: int, record: Record, dtype: type[np.integer]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Tokens of a shard in chunks, each with its place; the whole file is checked on the way.

        Raises:
            DataError: it is not what was written.
        """
        digest = hashlib.sha256()
        with Folder(self.folder).open(shard_name(unit)) as stream:
            for start in range(0, record.num_tokens, _CHUNK_TOKENS):
                count = min(_CHUNK_TOKENS, record.num_tokens - start)
                data = stream.read(count * dtype().itemsize)
                digest.update(data)
                yield start, np.frombuffer(data, dtype)
            digest.update(stream.read())
        if digest.hexdigest() != record.sha256:
            raise self._damaged(unit, shard_name(unit))

    def _damaged(self, unit: int, name: str) -> DataError:
        Folder(self.folder).remove(shard_name(unit), record_name(unit))
        return DataError(
            f"{self.folder}/{name}: damaged since it was written; it is removed now, so the same "
            "command does its part again and goes on"
        )
