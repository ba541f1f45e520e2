"""Put the shards of a corpus together: Megatron's files of both splits, in document order.

Memory is bounded by a shard's table and a chunk of its tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hysparse_megatron.data.bulk.duplicates import find_duplicates, keys_table
from hysparse_megatron.data.bulk.index_writer import StreamedWriter
from hysparse_megatron.data.bulk.shards import (
    DOCUMENT,
    MAX_DOCUMENT_TOKENS,
    ShardRecord,
    read_table,
    read_tokens,
)
from hysparse_megatron.data.bulk.units import split_name
from hysparse_megatron.data.card import SPLITS
from hysparse_megatron.errors import DataError

_TRAIN, _VALIDATION, _DROPPED = 0, 1, 2


@dataclass(frozen=True)
class Shards:
    """The finished shards of a corpus, in document order, and how to find them."""

    records: Sequence[ShardRecord]
    path: Callable[[ShardRecord], str]
    dtype: type[np.integer]


@dataclass(frozen=True)
class Assembled:
    """What was written; `hashes` are the SHA-256 of the files by name."""

    train_documents: int
    validation_documents: int
    train_tokens: int
    validation_tokens: int
    duplicate_documents: int
    hashes: dict[str, str]


@dataclass
class _LongDocument:
    """A text file that was cut into parts."""

    num_tokens: int = 0
    is_bad: bool = False
    keys: list[str] = field(default_factory=list)

    @property
    def key(self) -> bytes:
        """As of a short document if there is one part with text, else a hash of the parts'."""
        if len(self.keys) == 1:
            return bytes.fromhex(self.keys[0])
        return hashlib.blake2b("".join(self.keys).encode(), digest_size=16).digest()

    @property
    def is_empty(self) -> bool:
        """Whether it is good and has no text."""
        return not self.keys and not self.is_bad

    @property
    def table(self) -> np.ndarray:
        """Its place among the documents: DOCUMENT [1], or [0] if it is none."""
        return keys_table([self.key] if self.keys and not self.is_bad else [])


def assemble(
    shards: Shards,
    folder: str,
    *,
    validation_fraction: float,
    seed: int,
    deduplicate: bool,
    advance: Callable[[int], None],
) -> Assembled:
    """Write both splits to `folder`, an empty one.

    Args:
        shards: of the whole corpus.
        folder: for `train.*` and `validation.*`.
        validation_fraction, seed: see `held_out`.
        deduplicate: leave out documents whose text came before.
        advance: is told how many tokens were read since it was last called.

    Raises:
        DataError: a shard is damaged, or a document is too long for Megatron's index.
    """
    long = _long_documents(shards.records)
    duplicates: Iterator[int] = iter(())
    scratch = os.path.join(folder, "duplicates")
    if deduplicate:
        os.mkdir(scratch)
        count = count_documents(shards.records).good
        duplicates = find_duplicates(
            (table for _, table in _tables(shards, long)), num_documents=count, folder=scratch
        )
    drops = _Drops(duplicates)
    writers = [StreamedWriter(os.path.join(folder, split), shards.dtype) for split in SPLITS]
    try:
        target = _DROPPED  # of a long document, until its last part
        for record, table in _tables(shards, long):
            targets = np.where(
                held_out(table["key"], seed, validation_fraction), _VALIDATION, _TRAIN
            )
            targets[drops.next(len(table))] = _DROPPED
            if record.part is None:
                _copy_documents(shards, record, table["num_tokens"], targets, writers, advance)
                continue
            if split_name(record.name)[1] == 0:
                target = int(targets[0]) if len(targets) else _DROPPED
                if target != _DROPPED:
                    num_tokens = long[record.part.source].num_tokens
                    writers[target].add_documents(np.array([num_tokens]))
            _copy_part(shards, record, target, writers, advance)
        hashes = {name: sha for writer in writers for name, sha in writer.finish().items()}
    finally:
        for writer in writers:
            writer.close()
    if deduplicate:
        _remove_folder(scratch)
    return Assembled(
        writers[_TRAIN].num_documents,
        writers[_VALIDATION].num_documents,
        writers[_TRAIN].num_tokens,
        writers[_VALIDATION].num_tokens,
        drops.count,
        hashes,
    )


def held_out(keys: np.ndarray, seed: int, validation_fraction: float) -> np.ndarray:
    """Which documents go to validation: bool [n], for keys uint64 [n, 2].

    It depends on the seed and the document's text alone, so copies of a text never lie in both
    splits, and adding documents moves none.
    """
    label = hashlib.sha256(f"hysparse-split-2\0{seed}".encode()).digest()
    salts = np.frombuffer(label[:16], "<u8")
    mixed = _mix(_mix(keys[:, 0] ^ salts[0]) ^ keys[:, 1] ^ salts[1])
    # 53 bits, which a float holds exactly.
    chance: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
    return chance < validation_fraction


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble the bits of uint64 [n]; every one of the result depends on all."""
    for shift, factor in ((32, 0x9E3779B97F4A7C15), (29, 0xD6E8FEB86659FD93)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    scrambled: np.ndarray = values ^ (values >> np.uint64(32))
    return scrambled


@dataclass(frozen=True)
class DocumentCounts:
    """Documents of a corpus before duplicates are left out; a text file counts once.

    `text_bytes` are those of the `good` ones, as UTF-8.
    """

    good: int
    empty: int
    bad: int
    text_bytes: int


def count_documents(records: Sequence[ShardRecord]) -> DocumentCounts:
    """Count the documents of these shards, however many parts they lie in."""
    long = _long_documents(records)
    short = [record for record in records if record.part is None]
    used = [r for r in records if r.part is None or not long[r.part.source].is_bad]
    return DocumentCounts(
        good=sum(r.num_documents for r in short) + sum(len(d.table) for d in long.values()),
        empty=sum(r.empty_documents for r in short) + sum(d.is_empty for d in long.values()),
        bad=sum(r.bad_documents for r in short) + sum(d.is_bad for d in long.values()),
        text_bytes=sum(record.text_bytes for record in used),
    )


def _long_documents(records: Sequence[ShardRecord]) -> dict[int, _LongDocument]:
    """The documents that lie in several shards, by the number of their file."""
    documents: dict[int, _LongDocument] = {}
    for record in records:
        if record.part is None:
            continue
        document = documents.setdefault(record.part.source, _LongDocument())
        document.num_tokens += record.num_tokens
        document.is_bad |= record.part.is_bad
        if record.part.key:
            document.keys.append(record.part.key)
        if document.num_tokens > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"source file number {record.part.source} is one document of more than "
                f"{MAX_DOCUMENT_TOKENS:,} tokens, the most that Megatron's index can hold; cut it"
            )
    return documents


def _tables(
    shards: Shards, long: dict[int, _LongDocument]
) -> Iterator[tuple[ShardRecord, np.ndarray]]:
    """Every shard with the documents that start in it: DOCUMENT [n]."""
    for record in shards.records:
        if record.part is None:
            yield record, read_table(shards.path(record), record, shards.dtype)
        elif split_name(record.name)[1] == 0:
            yield record, long[record.part.source].table
        else:
            yield record, np.empty(0, DOCUMENT)


class _Drops:
    """Hands out ascending places of documents to drop, table by table."""

    def __init__(self, places: Iterator[int]) -> None:
        self._places = places
        self._pending = next(places, None)
        self._first = 0
        self.count = 0

    def next(self, num_documents: int) -> list[int]:
        """Places to drop among the next documents, counted from the first of them."""
        last = self._first + num_documents
        found = []
        while self._pending is not None and self._pending < last:
            found.append(self._pending - self._first)
            self._pending = next(self._places, None)
        self._first = last
        self.count += len(found)
        return found


def _copy_documents(
    shards: Shards,
    record: ShardRecord,
    lengths: np.ndarray,
    targets: np.ndarray,
    writers: Sequence[StreamedWriter],
    advance: Callable[[int], None],
) -> None:
    """Copy each document of a shard to the split it goes to."""
    ends = np.cumsum(lengths, dtype=np.int64)
    for split, writer in enumerate(writers):
        writer.add_documents(lengths[targets == split])
    for start, tokens in read_tokens(shards.path(record), record, shards.dtype):
        # Documents that have tokens in this chunk, and how many.
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, start + len(tokens), side="left")) + 1
        inside = np.minimum(ends[first:last], start + len(tokens))
        counts = np.diff(inside, prepend=start)
        of_token = np.repeat(targets[first:last], counts)
        for split, writer in enumerate(writers):
            writer.add_tokens(tokens[of_token == split])
        advance(len(tokens))


def _copy_part(
    shards: Shards,
    record: ShardRecord,
    target: int,
    writers: Sequence[StreamedWriter],
    advance: Callable[[int], None],
) -> None:
    for _, tokens in read_tokens(shards.path(record), record, shards.dtype):
        if target != _DROPPED:
            writers[target].add_tokens(tokens)
        advance(len(tokens))


def _remove_folder(folder: str) -> None:
    for entry in os.scandir(folder):
        os.remove(entry.path)
    os.rmdir(folder)
