"""Write Megatron's pair of files as a stream: memory does not grow with the number of documents.

Megatron's own builder, as `IndexedWriter` uses it, keeps a list entry per document. The bytes are
the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np

from hysparse_megatron.data.indexed import HEADER, MAGIC, TOKEN_DTYPES

_CHUNK_DOCUMENTS = 1 << 18
_MAX_UINT16_VOCAB = 65500  # Megatron's limit


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type of one token that Megatron takes for a vocabulary."""
    return np.uint16 if vocab_size < _MAX_UINT16_VOCAB else np.int32


class HashedFile:
    """A file that is written once from start to end, and its SHA-256."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stream = open(path, "wb")  # noqa: SIM115
        self._hash = hashlib.sha256()

    def write(self, array: np.ndarray | bytes) -> None:
        """Append an array's bytes."""
        data = array if isinstance(array, bytes) else array.tobytes()
        self._hash.update(data)
        self._stream.write(data)

    def close(self) -> str:
        """Close the file; returns its SHA-256."""
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        return self._hash.hexdigest()


class StreamedWriter:
    """Append documents to `<prefix>.bin`; `finish` writes `<prefix>.idx`.

    Lengths wait in `<prefix>.lengths`, which `finish` removes.
    """

    def __init__(self, prefix: str, dtype: type[np.integer]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._tokens = HashedFile(f"{prefix}.bin")
        self._lengths = HashedFile(f"{prefix}.lengths")
        self.num_documents = 0
        self.num_tokens = 0

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Append tokens of the writer's type: [num_tokens]."""
        self._tokens.write(tokens)
        self.num_tokens += len(tokens)

    def add_documents(self, lengths: np.ndarray) -> None:
        """Note the lengths of the next documents: integers [num_documents], in tokens."""
        self._lengths.write(lengths.astype(np.int32))
        self.num_documents += len(lengths)

    def finish(self) -> dict[str, str]:
        """Complete both files; returns the SHA-256 of each by its name."""
        name = os.path.basename(self._prefix)
        hashes = {f"{name}.bin": self._tokens.close()}
        self._lengths.close()
        index = HashedFile(f"{self._prefix}.idx")
        try:
            code = next(c for c, dtype in TOKEN_DTYPES.items() if dtype is self._dtype)
            count = self.num_documents
            index.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
            for lengths in self._read_lengths():
                index.write(lengths)
            start = 0
            for lengths in self._read_lengths():
                ends = start + np.cumsum(lengths, dtype=np.int64) * self._dtype().itemsize
                index.write(np.concatenate([np.array([start]), ends[:-1]]))
                start = int(ends[-1])
            for first in range(0, count + 1, _CHUNK_DOCUMENTS):
                last = min(first + _CHUNK_DOCUMENTS, count + 1)
                index.write(np.arange(first, last, dtype=np.int64))
        finally:
            hashes[f"{name}.idx"] = index.close()
        os.remove(self._lengths.path)
        return hashes

    def close(self) -> None:
        """Close the files without an index: what was written is to be thrown away."""
        self._tokens.close()
        self._lengths.close()

    def _read_lengths(self) -> Iterator[np.ndarray]:
        with open(self._lengths.path, "rb") as stream:
            while len(lengths := np.fromfile(stream, np.int32, _CHUNK_DOCUMENTS)):
                yield lengths
