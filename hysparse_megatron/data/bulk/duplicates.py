"""Find documents whose text came before, in bounded memory.

The hashes of all texts are dealt into partitions on disk by their first bits, 24 bytes a document.
Equal texts meet in one partition; each is sorted in memory, and the places of its duplicates are
written as a sorted run, 8 bytes each. Merging the runs gives all duplicates in document order.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator

import numpy as np

from hysparse_megatron.data.bulk.shards import DOCUMENT

_ENTRY = np.dtype([("key", "<u8", 2), ("place", "<u8")])
_PARTITION_BYTES = 8 * 1024 * 1024
_MAX_PARTITIONS = 512
_CHUNK_DOCUMENTS = 1 << 16


def find_duplicates(
    tables: Iterable[np.ndarray], *, num_documents: int, folder: str
) -> Iterator[int]:
    """Places of all documents but the first of each text, ascending.

    Args:
        tables: DOCUMENT arrays that together hold every document, in order.
        num_documents: in all tables.
        folder: an empty folder to work in.
    """
    needed = num_documents * _ENTRY.itemsize // _PARTITION_BYTES + 1
    num_partitions = min(_MAX_PARTITIONS, 1 << (needed - 1).bit_length())
    partitions = _partition(tables, num_partitions, folder)
    runs = [_write_run(path) for path in partitions]
    return heapq.merge(*(_read_run(run) for run in runs))


def _partition(tables: Iterable[np.ndarray], num_partitions: int, folder: str) -> list[str]:
    paths = [os.path.join(folder, f"keys-{index:04d}") for index in range(num_partitions)]
    streams = [open(path, "wb") for path in paths]  # noqa: SIM115
    try:
        place = 0
        for table in tables:
            for start in range(0, len(table), _CHUNK_DOCUMENTS):
                chunk = table[start : start + _CHUNK_DOCUMENTS]
                entries = np.empty(len(chunk), _ENTRY)
                entries["key"] = chunk["key"]
                entries["place"] = np.arange(place, place + len(chunk))
                place += len(chunk)
                targets = entries["key"][:, 0] % np.uint64(num_partitions)
                for index in np.unique(targets):
                    streams[int(index)].write(entries[targets == index].tobytes())
    finally:
        for stream in streams:
            stream.close()
    return paths


def _write_run(path: str) -> str:
    """Replace a partition by the sorted places of its duplicates."""
    entries = np.fromfile(path, _ENTRY)
    keys = entries["key"]
    order = np.lexsort((entries["place"], keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    again = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1)) + 1
    run = f"{path}.run"
    np.sort(entries["place"][order[again]]).tofile(run)
    os.remove(path)
    return run


def _read_run(path: str) -> Iterator[int]:
    with open(path, "rb") as stream:
        while len(places := np.fromfile(stream, "<u8", 4096)):
            yield from places.tolist()


def keys_table(keys: list[bytes]) -> np.ndarray:
    """A DOCUMENT array of documents known by their keys alone (16 bytes each)."""
    table = np.zeros(len(keys), DOCUMENT)
    table["key"] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
    return table
