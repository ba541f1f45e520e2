"""What one worker process does: turn units into shards.

Workers are started once and get one unit after the other. They share nothing but the folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event

import numpy as np

from hysparse_megatron.data.bulk.readers import read_documents, read_text_pieces
from hysparse_megatron.data.bulk.shards import (
    MAX_DOCUMENT_TOKENS,
    ShardRecord,
    ShardWriter,
    TextPart,
)
from hysparse_megatron.data.bulk.sources import Source
from hysparse_megatron.data.bulk.streams import open_source
from hysparse_megatron.data.bulk.tokenizers import Encoder, TokenizerChoice
from hysparse_megatron.data.bulk.units import Piece, Unit
from hysparse_megatron.data.tokenizer import cut_text
from hysparse_megatron.errors import DataError, Preempted

_BATCH_CHARACTERS = 256 * 1024
"""Text that is encoded at once: the library keeps about 100 bytes for each token meanwhile."""
_MAX_SAMPLES = 5
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class WorkerOptions:
    """What all workers are told once."""

    folder: str
    tokenizer: TokenizerChoice
    dtype: type[np.integer]
    text_key: str
    max_document_bytes: int
    max_bad: int | None


class _Worker:
    def __init__(self, options: WorkerOptions, stop: Event) -> None:
        self.options = options
        self.stop = stop
        self.encoder: Encoder = options.tokenizer.load()


_worker: _Worker | None = None  # one a process: what the initializer of a process pool can reach


def start_worker(options: WorkerOptions, stop: Event, parent: int) -> None:
    """Prepare a process to run units; it ends with its parent, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Ctrl-C reaches all processes of a terminal; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core: threads of the library would only wait for each other.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    be_worker(options, stop)


def be_worker(options: WorkerOptions, stop: Event) -> None:
    """Let `run_unit` work in this process."""
    global _worker
    _worker = _Worker(options, stop)


def run_unit(unit: Unit, sources: tuple[Source, ...]) -> ShardRecord:
    """Write the shard of a unit; `sources` are those of its pieces.

    Raises:
        DataError: the input cannot be read, more documents are bad than allowed, or the shard
            cannot be written.
        Preempted: the parent wants to stop.
    """
    assert _worker is not None
    path = os.path.join(_worker.options.folder, unit.name)
    try:
        shard = ShardWriter(path, _worker.options.dtype)
        try:
            return _UnitRun(_worker, unit, shard).run(sources)
        finally:
            shard.discard()
    except OSError as error:
        place = error.filename or path
        raise DataError(f"{place}: cannot write prepared data: {error.strerror}") from error


class _UnitRun:
    """The work on one unit and its counts."""

    def __init__(self, worker: _Worker, unit: Unit, shard: ShardWriter) -> None:
        self._worker = worker
        self._options = worker.options
        self._unit = unit
        self._shard = shard
        self._num_documents = 0
        self._text_bytes = 0
        self._empty_documents = 0
        self._bad_documents = 0
        self._bad_samples: list[str] = []
        self._source_hashes: dict[str, str] = {}

    def run(self, sources: tuple[Source, ...]) -> ShardRecord:
        part = None
        for piece, source in zip(self._unit.pieces, sources, strict=True):
            if piece.part == 0:
                self._source_hashes[str(piece.source)] = hash_file(source.path)
            if source.kind == "text" and (piece.spill or not piece.is_whole):
                part = self._write_part(source, piece)
        if part is None:
            self._write_documents(sources)
        last = self._unit.pieces[-1]
        return ShardRecord(
            name=self._unit.name,
            num_tokens=self._shard.num_tokens,
            num_documents=self._num_documents,
            text_bytes=self._text_bytes,
            empty_documents=self._empty_documents,
            bad_documents=self._bad_documents,
            size_bytes=self._unit.size_bytes,
            sha256=self._shard.finish(),
            bad_samples=self._bad_samples,
            source_hashes=self._source_hashes,
            finished_source=last.source if last.is_last else -1,
            part=part,
        )

    def _write_documents(self, sources: tuple[Source, ...]) -> None:
        """All documents of all pieces, each closed."""
        keys: list[bytes] = []
        for lengths in self._encode(self._pieces_of_documents(sources, keys)):
            for num_tokens, key in zip(lengths, keys, strict=False):
                if num_tokens > MAX_DOCUMENT_TOKENS:
                    raise DataError(f"unit {self._unit.name}: a document of {num_tokens} tokens")
                self._shard.add_document(num_tokens, key)
            self._num_documents += len(lengths)
            del keys[: len(lengths)]

    def _pieces_of_documents(
        self, sources: tuple[Source, ...], keys: list[bytes]
    ) -> Iterator[tuple[str, bool]]:
        """Pieces of text, with whether each ends its document; notes every document's key."""
        options = self._options
        for piece, source in zip(self._unit.pieces, sources, strict=True):
            for text in read_documents(
                source,
                piece,
                text_key=options.text_key,
                max_document_bytes=options.max_document_bytes,
            ):
                if isinstance(text, DataError):
                    self._count_bad(text)
                elif not text:
                    self._empty_documents += 1
                else:
                    data = text.encode()
                    self._text_bytes += len(data)
                    keys.append(text_key_of(data))
                    *before, last = cut_text(text)
                    yield from ((piece_text, False) for piece_text in before)
                    yield last, True

    def _write_part(self, source: Source, piece: Piece) -> TextPart:
        """One part of a text file; the last one closes the document."""
        digest = hashlib.blake2b(digest_size=16)
        is_bad = False

        def pieces() -> Iterator[tuple[str, bool]]:
            nonlocal is_bad
            for text in read_text_pieces(source, piece):
                if isinstance(text, DataError):
                    is_bad = True
                    self._count_bad(text)
                    return
                data = text.encode()
                self._text_bytes += len(data)
                digest.update(data)
                yield text, False

        for _ in self._encode(pieces()):
            pass
        if piece.is_last:
            self._shard.add_tokens(np.array([self._worker.encoder.end_of_document]))
        key = digest.hexdigest() if self._text_bytes else ""
        return TextPart(piece.source, key, piece.is_last, is_bad)

    def _encode(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[list[int]]:
        """Write the tokens of all pieces; yields the lengths of the documents that ended."""
        num_tokens = 0  # of the document that has not ended
        for batch in _batches(pieces):
            if self._worker.stop.is_set():
                raise Preempted("stopped")
            encoded = self._worker.encoder.encode_batch([text for text, _ in batch])
            end = np.array([self._worker.encoder.end_of_document])
            parts: list[np.ndarray] = []
            lengths: list[int] = []
            for ids, (_, is_end) in zip(encoded, batch, strict=True):
                parts.append(ids)
                num_tokens += len(ids)
                if is_end:
                    parts.append(end)
                    lengths.append(num_tokens + 1)
                    num_tokens = 0
            self._shard.add_tokens(np.concatenate(parts))
            yield lengths

    def _count_bad(self, error: DataError) -> None:
        self._bad_documents += 1
        if len(self._bad_samples) < _MAX_SAMPLES:
            self._bad_samples.append(str(error))
        limit = self._options.max_bad
        if limit is not None and self._bad_documents > limit:
            raise too_many_bad(self._bad_samples, self._bad_documents, limit)


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def text_key_of(data: bytes) -> bytes:
    """What stands for a text when duplicates are looked for: 16 bytes of a hash.

    That two of n different texts have the same key has a chance of about n**2 / 2**129.
    """
    return hashlib.blake2b(data, digest_size=16).digest()


def too_many_bad(samples: list[str], found: int, limit: int) -> DataError:
    """The error for more bad documents than allowed; `samples` are messages of the first."""
    listed = "".join(f"\n  {sample}" for sample in samples)
    return DataError(
        f"{found} bad document(s) so far, {limit} allowed; mend them, or leave them out with "
        f"--max-bad:{listed}"
    )


def hash_file(path: str) -> str:
    """SHA-256 of a file of the corpus. Raises DataError."""
    with open_source(path) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
