"""Turn units of a corpus into shards: what every process does, on any machine, until all are done.

`python -m hysparse_megatron.data.prepare.tokenize WORK RANK WORLD_SIZE PARENT` is one process's
share; it prints how many bytes it has done since it last did.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import sys
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain

import numpy as np

from hysparse_megatron.data.prepare.readers import is_json_lines, read_piece
from hysparse_megatron.data.prepare.shards import (
    DOCUMENT,
    MAX_DOCUMENT_TOKENS,
    MAX_SAMPLES,
    UNWRITABLE,
    Folder,
    Record,
    WholeFile,
    Work,
    failure_name,
    record_name,
    shard_name,
    token_dtype,
)
from hysparse_megatron.data.tokenizer import Encoder
from hysparse_megatron.errors import DataError, HySparseError
from hysparse_megatron.files import naming, sha256_of

_BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at once: the library keeps about 100 bytes for each token meanwhile."""
_PR_SET_PDEATHSIG = 1

Advance = Callable[[int], None]
"""Is told how many more bytes of the corpus are done."""


def tokenize_share(
    work: Work, rank: int, world_size: int, advance: Advance = lambda size: None
) -> None:
    """Make the shards of every `world_size`-th unit that are not there yet, from unit `rank` on.

    Raises:
        DataError: the input cannot be read, more documents are bad than allowed, or a shard cannot
            be written. It also stands in the work folder, if that has room for a note, for who
            waits on another machine.
    """
    try:
        encoder = work.tokenizer.load()
        done = set(work.done())
        for unit in range(rank, len(work.units), world_size):
            if unit not in done:
                _tokenize_unit(work, unit, encoder, advance)
    except HySparseError as error:
        failure = {"message": str(error), "exit_code": error.exit_code}
        with contextlib.suppress(OSError):  # a full disk; what was met first is what counts
            Folder(work.folder).write(failure_name(rank), json.dumps(failure).encode())
        raise


def _tokenize_unit(work: Work, unit: int, encoder: Encoder, advance: Advance) -> None:
    folder = Folder(work.folder)
    with naming(f"{work.folder}/{shard_name(unit)}", UNWRITABLE):
        with WholeFile(folder, shard_name(unit)) as file:
            record = _Unit(work, unit, encoder, file, advance).run()
        folder.write(record_name(unit), json.dumps(asdict(record)).encode())


class _Unit:
    """One unit on its way into its shard."""

    def __init__(
        self, work: Work, unit: int, encoder: Encoder, file: WholeFile, advance: Advance
    ) -> None:
        self._work, self._unit, self._encoder = work, unit, encoder
        self._file, self._dtype = file, token_dtype(encoder.vocab_size)
        self._lengths, self._keys = array("Q"), bytearray()
        self._record = Record()
        self._advance, self._bytes_read, self._bytes_told = advance, 0, 0

    def run(self) -> Record:
        with ThreadPoolExecutor(1) as pool:  # the library encodes while the next text is read
            texts: list[str] = []
            encoded = pool.submit(self._encoder.encode_batch, texts)
            for batch in chain(self._batches(), [[]]):
                before, found = texts, encoded.result()
                texts, encoded = batch, pool.submit(self._encoder.encode_batch, batch)
                for text, ids in zip(before, found, strict=True):
                    self._write(text.encode(), ids)
        table = np.empty(len(self._lengths), DOCUMENT)
        table["num_tokens"] = np.frombuffer(self._lengths, dtype=np.uint64)
        table["key"] = np.frombuffer(self._keys, dtype="<u8").reshape(-1, 2)
        self._file.write(table)
        self._record.sha256 = self._file.sha256()
        self._tell(self._work.unit_bytes(self._unit))
        return self._record

    def _write(self, text: bytes, ids: np.ndarray) -> None:
        tokens = self._encoder.document(ids)
        if len(tokens) > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"a document has {len(tokens):,} tokens, Megatron's index can hold "
                f"{MAX_DOCUMENT_TOKENS:,}; cut it"
            )
        self._file.write(tokens.astype(self._dtype, casting="unsafe"))
        self._lengths.append(len(tokens))
        self._keys += hashlib.blake2b(text, digest_size=16).digest()
        self._record.num_tokens += len(tokens)
        self._record.num_documents += 1
        self._record.largest_id = max(self._record.largest_id, int(tokens.max()))
        self._record.text_bytes += len(text)

    def _tell(self, num_bytes: int) -> None:
        if num_bytes > self._bytes_told:
            self._advance(num_bytes - self._bytes_told)
            self._bytes_told = num_bytes

    def _batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for text in self._texts():
            batch.append(text)
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                self._tell(self._bytes_read)
                batch, size = [], 0
        yield batch

    def _texts(self) -> Iterator[str]:
        before = 0
        for piece in self._work.units[self._unit]:
            source = self._work.sources[piece.source]
            start, before = before - piece.start, before + piece.stop - piece.start
            if piece.start == 0 and source.is_local:
                with naming(source.path):
                    self._record.source_hashes[str(piece.source)] = sha256_of(source.path)

            def at(offset: int, start: int = start, end: int = before) -> None:
                self._bytes_read = min(start + offset, end)

            options = self._work.text_key, self._work.max_document_bytes
            for text in read_piece(source, piece, *options, at):
                if isinstance(text, DataError):
                    self._count_bad(text)
                elif not text:
                    self._record.empty_documents += 1
                else:
                    if source.kind == "text" and is_json_lines(text):
                        self._record.warnings.append(
                            f"{source.path}: read as one text, but every line is a JSON object; "
                            "name it .jsonl, or give --format jsonl"
                        )
                    if source.kind == "text" and "\0" in text:
                        self._record.warnings.append(
                            f"{source.path}: holds NUL characters, as UTF-16 and files that were "
                            "copied in part do"
                        )
                    yield text

    def _count_bad(self, error: DataError) -> None:
        self._record.bad_documents += 1
        if len(self._record.bad_samples) < MAX_SAMPLES:
            self._record.bad_samples.append(str(error))
        limit = self._work.max_bad
        if limit is not None and self._record.bad_documents > limit:
            raise too_many_bad(self._record.bad_samples, self._record.bad_documents, limit)


def too_many_bad(samples: list[str], found: int, limit: int) -> DataError:
    """The error for more bad documents than allowed; `samples` are messages of the first."""
    listed = "".join(f"\n  {sample}" for sample in samples)
    return DataError(
        f"{found} bad document(s) so far, {limit} allowed; mend them, or leave them out by "
        f"preparing with hysparse prepare-data --max-bad:{listed}"
    )


def main() -> int:
    """One process's share; it ends with the process that started it, which tells what failed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    folder, rank, world_size, parent = sys.argv[1], *map(int, sys.argv[2:])
    if os.getppid() != parent:
        return 1
    try:
        with naming(folder, UNWRITABLE):
            work = Work.load(folder)
            tokenize_share(work, rank, world_size, lambda size: print(size, flush=True))
    except HySparseError as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
