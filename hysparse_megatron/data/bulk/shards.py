"""A shard: the tokens of one unit and a table of its documents, in one file.

The file holds the tokens of all documents, then one `DOCUMENT` record each. What else is known of
it stands in its `ShardRecord`, which goes to the journal.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from hysparse_megatron.errors import DataError

DOCUMENT = np.dtype([("num_tokens", "<u4"), ("key", "<u8", 2)])
"""A document of a shard: its tokens, the closing one included, and 16 bytes of its text's hash."""

MAX_DOCUMENT_TOKENS = 2**31 - 1
"""What Megatron's index can hold."""

_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class TextPart:
    """What a part of a text file adds to its document.

    Attributes:
        source: number of the file.
        key: hash of the part's text, hexadecimal; empty for a part without text.
        is_last: the document ends here.
        is_bad: the part, so the document, cannot be used.
    """

    source: int
    key: str
    is_last: bool
    is_bad: bool


@dataclass(frozen=True)
class ShardRecord:
    """One finished unit.

    Attributes:
        name: of the unit and the shard.
        num_tokens, num_documents: in the shard; a part of a document has no record of its own.
        text_bytes: of the documents, as UTF-8.
        empty_documents, bad_documents: left out.
        bad_samples: messages of the first bad documents.
        size_bytes: the unit's share of the corpus on disk.
        sha256: of the shard file.
        source_hashes: SHA-256 of the files whose first piece is in the unit, by number.
        finished_source: number of the file whose last piece this is, for files cut up, else -1.
        part: for a part of a text file.
    """

    name: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    empty_documents: int
    bad_documents: int
    size_bytes: int
    sha256: str
    bad_samples: list[str] = field(default_factory=list)
    source_hashes: dict[str, str] = field(default_factory=dict)
    finished_source: int = -1
    part: TextPart | None = None


class ShardWriter:
    """Writes one shard, which appears under its name when it is whole.

    Args:
        path: of the shard.
        dtype: of one token.
    """

    def __init__(self, path: str, dtype: type[np.integer]) -> None:
        self._path = path
        self._temporary = f"{path}.tmp-{os.getpid()}"
        self._dtype = dtype
        self._hash = hashlib.sha256()
        self._lengths = array("Q")
        self._keys = bytearray()
        self.num_tokens = 0
        self._stream: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Append tokens: integers [num_tokens]."""
        self._write(np.asarray(tokens).astype(self._dtype, casting="unsafe").tobytes())
        self.num_tokens += len(tokens)

    def add_document(self, num_tokens: int, key: bytes) -> None:
        """Note that the next `num_tokens` tokens are the document with this key (16 bytes)."""
        self._lengths.append(num_tokens)
        self._keys += key

    def finish(self) -> str:
        """Complete the shard; returns the SHA-256 of the file."""
        table = np.empty(len(self._lengths), DOCUMENT)
        table["num_tokens"] = np.frombuffer(self._lengths, dtype=np.uint64)
        table["key"] = np.frombuffer(self._keys, dtype="<u8").reshape(-1, 2)
        self._write(table.tobytes())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.rename(self._temporary, self._path)
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Remove what was written, unless it is finished."""
        self._stream.close()
        if os.path.exists(self._temporary):
            os.remove(self._temporary)

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._stream.write(data)


def shard_bytes(record: ShardRecord, dtype: type[np.integer]) -> int:
    """Size of the shard's file."""
    return record.num_tokens * dtype().itemsize + record.num_documents * DOCUMENT.itemsize


def read_table(path: str, record: ShardRecord, dtype: type[np.integer]) -> np.ndarray:
    """The documents of a shard: DOCUMENT [num_documents]."""
    offset = record.num_tokens * dtype().itemsize
    return np.fromfile(path, DOCUMENT, record.num_documents, offset=offset)


def read_tokens(
    path: str, record: ShardRecord, dtype: type[np.integer]
) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens of a shard in chunks, each with its place; the whole file is checked on the way.

    Raises:
        DataError: the contents are not what was written. The file is removed, so that the next
            run writes it anew.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for start in range(0, record.num_tokens, _CHUNK_TOKENS):
            count = min(_CHUNK_TOKENS, record.num_tokens - start)
            data = stream.read(count * dtype().itemsize)
            digest.update(data)
            yield start, np.frombuffer(data, dtype)
        digest.update(stream.read())
    if digest.hexdigest() != record.sha256:
        os.remove(path)
        raise DataError(
            f"{path}: damaged on disk since it was written; it is removed now, so the same "
            "command does its part again and goes on"
        )
