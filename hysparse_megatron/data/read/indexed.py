"""Read Megatron's indexed token files: `<prefix>.bin` (tokens) and `<prefix>.idx`.

What Megatron's reader leaves to an `assert` or does not check, such as a `.bin` that is shorter
than its `.idx` says, is checked here first. Megatron is imported where it is used: it takes
seconds, and checking files needs none of it.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hysparse_megatron.errors import DataError
from hysparse_megatron.files import naming

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
TOKEN_DTYPES: dict[int, type[np.integer]] = {4: np.int32, 5: np.int64, 8: np.uint16}
_SCAN_TOKENS = 1 << 22
_SCAN_DOCUMENTS = 1 << 20


@dataclass(frozen=True)
class IndexSummary:
    """What a valid pair of files holds; `dtype` is the type of one token in the `.bin`."""

    dtype: type[np.integer]
    num_documents: int
    num_tokens: int


def check_indexed(prefix: str, *, may_be_empty: bool = False) -> IndexSummary:
    """Check that `<prefix>.idx` and `<prefix>.bin` are whole and belong together.

    Reads the index only. The tokens must lie in the `.bin` without gaps, as Megatron writes them.
    An index without documents is refused unless it `may_be_empty`.

    Raises:
        DataError: names the file and the offset in bytes where it stops being valid.
    """
    index_path, token_path = f"{prefix}.idx", f"{prefix}.bin"
    token_bytes = _size(token_path)
    dtype, num_sequences, num_borders = _read_header(index_path)
    if num_sequences == 0 and not may_be_empty:
        raise DataError(f"{index_path}: holds no document (offset 18)")

    pointers_offset = HEADER.size + 4 * num_sequences
    borders_offset = pointers_offset + 8 * num_sequences
    end, first_lost = 0, None
    for first, lengths, ends in document_ends(index_path, num_sequences, dtype().itemsize):
        pointers = np.fromfile(
            index_path, np.int64, len(lengths), offset=pointers_offset + 8 * first
        )
        wrong = np.flatnonzero((lengths < 0) | (pointers != ends - lengths * dtype().itemsize))
        if len(wrong):
            raise DataError(
                f"{index_path}: document {first + wrong[0]} does not start where the one before "
                f"it ends (offset {pointers_offset + 8 * (first + wrong[0])})"
            )
        end = int(ends[-1])
        if first_lost is None and token_bytes < end:
            first_lost = first + int(np.searchsorted(ends, token_bytes, side="right"))
    last_border = np.fromfile(
        index_path, np.int64, 1, offset=borders_offset + 8 * max(0, num_borders - 1)
    )
    if num_borders == 0 or last_border[0] != num_sequences:
        raise DataError(f"{index_path}: bad document borders (offset {borders_offset})")
    if first_lost is not None:
        raise DataError(
            f"{token_path}: ends at offset {token_bytes}, its index announces {end} bytes; "
            f"document {first_lost} and all after it are cut off"
        )
    if token_bytes > end:
        raise DataError(
            f"{token_path}: holds {token_bytes} bytes, its index announces {end}; "
            f"the bytes from offset {end} belong to no document"
        )
    return IndexSummary(dtype, num_borders - 1, end // dtype().itemsize)


def _read_header(index_path: str) -> tuple[type[np.integer], int, int]:
    """Token type, number of sequences and of document borders. Raises DataError."""
    index_bytes = _size(index_path)
    with open(index_path, "rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{index_path}: header cut off at offset {len(header)}")
    magic, version, code, num_sequences, num_borders = HEADER.unpack(header)
    if magic != MAGIC:
        raise DataError(f"{index_path}: not a Megatron index (bad header at offset 0)")
    if version != 1:
        raise DataError(f"{index_path}: index version {version} at offset 9, expected 1")
    if code not in TOKEN_DTYPES:
        raise DataError(f"{index_path}: token type code {code} at offset 17 is no token type")
    expected_bytes = HEADER.size + num_sequences * (4 + 8) + num_borders * 8
    if index_bytes < expected_bytes:
        raise DataError(
            f"{index_path}: ends at offset {index_bytes}, its header announces {expected_bytes}"
        )
    return TOKEN_DTYPES[code], num_sequences, num_borders


def document_ends(
    index_path: str, num_sequences: int, token_bytes: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """First number, lengths [tokens] and ends [bytes] of the documents, a bounded many at a time.

    An index of a large corpus takes gigabytes, which every rank of a machine would hold at once.
    """
    end = 0
    for first in range(0, num_sequences, _SCAN_DOCUMENTS):
        count = min(_SCAN_DOCUMENTS, num_sequences - first)
        lengths = np.fromfile(index_path, np.int32, count, offset=HEADER.size + 4 * first)
        ends = end + np.cumsum(lengths, dtype=np.int64) * token_bytes
        end = int(ends[-1])
        yield first, lengths, ends


def check_token_ids(prefix: str, vocab_size: int) -> None:
    """Read all tokens and refuse an id outside 0 .. vocab_size - 1.

    Raises:
        DataError: names the file, the offset in bytes and the id.
    """
    summary = check_indexed(prefix)
    if summary.num_tokens == 0:
        return
    path = f"{prefix}.bin"
    token_bytes = summary.dtype().itemsize
    for start in range(0, summary.num_tokens, _SCAN_TOKENS):
        tokens = np.fromfile(path, summary.dtype, _SCAN_TOKENS, offset=start * token_bytes)
        refuse_bad_ids(tokens, path, start, vocab_size)


def refuse_bad_ids(tokens: np.ndarray, path: str, first: int, vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary; `first` is the place of tokens[0] in the file.

    Raises:
        DataError: names the file, the offset in bytes and the id.
    """
    if int(tokens.max()) < vocab_size and int(tokens.min()) >= 0:
        return
    place = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
    raise DataError(
        f"{path}: token id {int(tokens[place])} at offset {(first + place) * tokens.itemsize} is "
        f"outside the vocabulary of {vocab_size}; was it written with another tokenizer?"
    )


class TokenFile:
    """Reads the tokens of `<prefix>.bin` as they are asked for, not through a memory map.

    Where a mapped file has become shorter, the system kills who reads there; here it is an error.
    """

    def __init__(self, prefix: str) -> None:
        self._path, self._index_path = f"{prefix}.bin", f"{prefix}.idx"
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._index_descriptor = os.open(self._index_path, os.O_RDONLY | os.O_CLOEXEC)
        self._index_bytes = os.fstat(self._index_descriptor).st_size
        for descriptor in (self._descriptor, self._index_descriptor):
            weakref.finalize(self, os.close, descriptor)

    def read(self, dtype: type[np.integer], first: int, count: int) -> np.ndarray:
        """`count` tokens from number `first` on, [count].

        Raises:
            DataError: names the file, and the offset at which it ends or cannot be read.
        """
        offset, size = first * dtype().itemsize, count * dtype().itemsize
        found = b""
        while len(found) < size:
            try:
                part = os.pread(self._descriptor, size - len(found), offset + len(found))
            except OSError as error:
                text = f"cannot be read at offset {offset}: {error.strerror}"
                raise DataError(f"{self._path}: {text}") from error
            if not part:
                raise DataError(
                    f"{self._path}: ends before offset {offset + size}: it was cut short after the "
                    "run had begun; restore it, and the same command continues"
                )
            found += part
        return np.frombuffer(found, dtype)

    def require_index(self) -> None:
        """Raise DataError if the index, which is mapped, has become shorter since it was opened."""
        size = os.fstat(self._index_descriptor).st_size
        if size < self._index_bytes:
            raise DataError(
                f"{self._index_path}: ends at offset {size}, but had {self._index_bytes} bytes "
                "when the run began; restore it, and the same command continues"
            )


def open_indexed(prefix: str) -> IndexedDataset:
    """Memory-map a checked pair of files with Megatron's reader.

    Raises:
        DataError: as `check_indexed`, or there are no tokens.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if check_indexed(prefix).num_tokens == 0:
        raise DataError(f"{prefix}.bin: holds no tokens")
    return IndexedDataset(prefix, mmap=True)


def _size(path: str) -> int:
    with naming(path):
        return os.stat(path).st_size
