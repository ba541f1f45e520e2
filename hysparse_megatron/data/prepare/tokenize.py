"""Turn units of a corpus into shards: what every process does, on any machine, until all are done.

`python -m hysparse_megatron.data.prepare.tokenize WORK RANK WORLD_SIZE` is one process's share.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain

import numpy as np

from hysparse_megatron.data.prepare.readers import is_json_lines, read_piece
from hysparse_megatron.data.prepare.shards import (
    MAX_SAMPLES,
    Folder,
    Record,
    ShardWriter,
    WholeFile,
    Work,
    record_name,
    shard_name,
    token_dtype,
)
from hysparse_megatron.data.tokenizer import Encoder
from hysparse_megatron.errors import DataError, HySparseError
from hysparse_megatron.files import sha256_of

_BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at once: the library keeps about 100 bytes for each token meanwhile."""
_PR_SET_PDEATHSIG = 1


def tokenize_share(
    work: Work, rank: int, world_size: int, advance: Callable[[int], None] = lambda size: None
) -> None:
    """Make the shards of every `world_size`-th unit that are not there yet, from unit `rank` on.

    Args:
        advance: is told how many bytes of the corpus are done.

    Raises:
        DataError: the input cannot be read, more documents are bad than allowed, or a shard cannot
            be written. It also stands in the work folder, for who waits on another machine.
    """
    try:
        encoder = work.tokenizer.load()
        done = set(work.done())
        for unit in range(rank, len(work.units), world_size):
            if unit not in done:
                _tokenize_unit(work, unit, encoder)
                advance(work.unit_bytes(unit))
    except HySparseError as error:
        failure = {"message": str(error), "exit_code": error.exit_code}
        Folder(work.folder).write(f"failed-{rank:06d}", json.dumps(failure).encode())
        raise


def _tokenize_unit(work: Work, unit: int, encoder: Encoder) -> None:
    folder = Folder(work.folder)
    try:
        with WholeFile(folder, shard_name(unit)) as file:
            record = _Unit(work, unit, encoder, file).run()
        folder.write(record_name(unit), json.dumps(asdict(record)).encode())
    except OSError as error:
        place = error.filename or f"{work.folder}/{shard_name(unit)}"
        reason = error.strerror or error
        raise DataError(f"{place}: cannot write prepared data: {reason}") from error


class _Unit:
    """One unit on its way into its shard."""

    def __init__(self, work: Work, unit: int, encoder: Encoder, file: WholeFile) -> None:
        self._work, self._pieces, self._encoder = work, work.units[unit], encoder
        self._shard = ShardWriter(file, token_dtype(encoder.vocab_size))
        self._record = self._shard.record

    def run(self) -> Record:
        end = np.array([self._encoder.end_of_document])
        with ThreadPoolExecutor(1) as pool:  # the library encodes while the next text is read
            waiting: tuple[list[str], Future[list[np.ndarray]]] | None = None
            for batch in chain(self._batches(), [None]):
                texts, encoded = waiting or ([], None)
                found = encoded.result() if encoded else []
                waiting = None
                if batch is not None:
                    waiting = batch, pool.submit(self._encoder.encode_batch, batch)
                for text, ids in zip(texts, found, strict=True):
                    data = text.encode()
                    key = hashlib.blake2b(data, digest_size=16).digest()
                    self._shard.add(np.concatenate([ids, end]), len(data), key)
        return self._shard.finish()

    def _batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for text in self._texts():
            batch.append(text)
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _texts(self) -> Iterator[str]:
        for piece in self._pieces:
            source = self._work.sources[piece.source]
            if piece.start == 0 and source.is_local:
                self._record.source_hashes[str(piece.source)] = _hash_file(source.path)
            options = self._work.text_key, self._work.max_document_bytes
            for text in read_piece(source, piece, *options):
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


def _hash_file(path: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def main() -> int:
    """One process's share; it ends with the process that started it, which tells what failed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    folder, rank, world_size, parent = sys.argv[1], *map(int, sys.argv[2:])
    if os.getppid() != parent:
        return 1
    try:
        tokenize_share(Work.load(folder), rank, world_size)
    except HySparseError as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
