"""Cut the files of a corpus into units of work: what one worker turns into one shard.

A unit is a piece of one file of about `unit_bytes`, or several small files. Where the cuts lie
depends on the files alone, so the shards are the same whatever the number of workers. Lines are
never cut: a line belongs to the piece in which it starts.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hysparse_megatron.data.bulk.packages import require_package
from hysparse_megatron.data.bulk.sources import Source
from hysparse_megatron.data.bulk.streams import cut_stream
from hysparse_megatron.errors import DataError

_MIN_UNIT_BYTES, _MAX_UNIT_BYTES = 4 * 1024 * 1024, 64 * 1024 * 1024
_UNITS = 10_000


@dataclass(frozen=True)
class Piece:
    """A range of one file.

    Attributes:
        source: number of the file in the corpus.
        part: number of the piece in its file.
        start, stop: bytes of text, JSON lines (where lines start) and Arrow (whole messages),
            counted in the decompressed file; rows of Parquet.
        is_last: no piece of the file follows.
        spill: file with the decompressed bytes of exactly this piece, for compressed files.
    """

    source: int
    part: int
    start: int
    stop: int
    is_last: bool
    spill: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the piece is its whole file."""
        return self.part == 0 and self.is_last


@dataclass(frozen=True)
class Unit:
    """Pieces that go into one shard; names sort in the order of the documents.

    `size_bytes` is the share of the corpus on disk, for the progress.
    """

    name: str
    pieces: tuple[Piece, ...]
    size_bytes: int


def default_unit_bytes(total_bytes: int) -> int:
    """Size of a unit for a corpus of this size.

    A unit is what a kill costs each worker, so it should be small; of a large corpus there should
    not be too many, because each has a file and a place in memory.
    """
    return max(_MIN_UNIT_BYTES, min(_MAX_UNIT_BYTES, total_bytes // _UNITS))


def unit_name(source: int, part: int) -> str:
    """Name of the unit that starts with this piece."""
    return f"{source:08d}-{part:06d}"


def split_name(name: str) -> tuple[int, int]:
    """Source and part of a unit's name."""
    source, _, part = name.partition("-")
    return int(source), int(part)


def cut_units(
    sources: Sequence[Source],
    *,
    unit_bytes: int,
    spill_folder: str,
    is_done: Callable[[str], bool],
    is_finished: Callable[[int], bool],
) -> Iterator[Unit]:
    """Units of the corpus that are not done, in order.

    Args:
        sources: of `list_sources`.
        unit_bytes: size of a unit, about.
        spill_folder: decompressed pieces are written there; whoever takes a unit removes them.
        is_done: whether the unit of this name needs no work.
        is_finished: whether all pieces of a source, given by number, are done.

    Raises:
        DataError: a file cannot be read or decompressed (names file and offset).
    """
    group: list[Piece] = []
    group_bytes = 0
    for number, source in enumerate(sources):
        size = source.file.size_bytes
        is_plain = source.kind in ("text", "jsonl") and source.compression is None
        if is_plain and size <= unit_bytes:
            group.append(Piece(number, 0, 0, size, True))
            group_bytes += size
            if group_bytes >= unit_bytes or len(group) >= 10_000:
                yield from _grouped(group, group_bytes, is_done)
                group, group_bytes = [], 0
            continue
        yield from _grouped(group, group_bytes, is_done)
        group, group_bytes = [], 0
        if is_plain or not is_finished(number):
            yield from _cut_file(number, source, unit_bytes, spill_folder, is_done)
    yield from _grouped(group, group_bytes, is_done)


def _grouped(
    pieces: list[Piece], size_bytes: int, is_done: Callable[[str], bool]
) -> Iterator[Unit]:
    if pieces:
        name = unit_name(pieces[0].source, 0)
        if not is_done(name):
            yield Unit(name, tuple(pieces), size_bytes)


def _cut_file(
    number: int,
    source: Source,
    unit_bytes: int,
    spill_folder: str,
    is_done: Callable[[str], bool],
) -> Iterator[Unit]:
    """Units of one file that needs its own."""
    if source.compression:
        for cut in cut_stream(
            source,
            unit_bytes=unit_bytes,
            spill_path=lambda part: os.path.join(spill_folder, f"{unit_name(number, part)}.spill"),
            is_wanted=lambda part: not is_done(unit_name(number, part)),
        ):
            piece = Piece(number, cut.number, cut.start, cut.stop, cut.is_last, cut.spill)
            yield Unit(unit_name(number, cut.number), (piece,), cut.compressed_bytes)
        return
    if source.kind == "parquet":
        cuts, sizes = _parquet_cuts(source, unit_bytes)
    elif source.kind == "arrow":
        cuts, sizes = _arrow_cuts(source, unit_bytes)
    else:
        cuts = [*range(0, source.file.size_bytes, unit_bytes), source.file.size_bytes]
        sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
    for part, (start, stop) in enumerate(itertools.pairwise(cuts)):
        name = unit_name(number, part)
        if not is_done(name):
            piece = Piece(number, part, start, stop, part == len(sizes) - 1)
            yield Unit(name, (piece,), sizes[part])


def _parquet_cuts(source: Source, unit_bytes: int) -> tuple[list[int], list[int]]:
    """Borders of the units in rows, and each one's share of the file in bytes.

    Small row groups are put together. Large ones are cut, but into few pieces: reading one decodes
    what lies before it in the row group.
    """
    parquet = require_package("pyarrow.parquet", f"reading {source.path}")
    try:
        with parquet.ParquetFile(source.path) as file:
            metadata = file.metadata
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            shapes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (OSError, ValueError) as error:
        raise DataError(f"{source.path}: not a Parquet file: {error}") from error
    cuts, pending_bytes, row = [0], 0, 0
    for rows, size in shapes:
        if size > 8 * unit_bytes:
            if row > cuts[-1]:
                cuts.append(row)
            pieces = min(rows, -(-size // (8 * unit_bytes)))
            cuts += [row + rows * (index + 1) // pieces for index in range(pieces)]
            pending_bytes = 0
        else:
            pending_bytes += size
            if pending_bytes >= unit_bytes:
                cuts.append(row + rows)
                pending_bytes = 0
        row += rows
    if row > cuts[-1] or len(cuts) == 1:
        cuts.append(row)
    return cuts, _shares(cuts, source.file.size_bytes)


def _arrow_cuts(source: Source, unit_bytes: int) -> tuple[list[int], list[int]]:
    """Borders of the units in bytes, each at the start of a message of the stream."""
    pyarrow = require_package("pyarrow", f"reading {source.path}")
    cuts: list[int] = []
    try:
        with pyarrow.OSFile(source.path, "rb") as stream:
            if stream.read(6) == b"ARROW1":
                raise DataError(
                    f"{source.path}: is an Arrow file, not a stream; save it as Parquet"
                )
            stream.seek(0)
            pyarrow.ipc.read_message(stream)  # the schema
            cuts.append(end := stream.tell())
            while _skip_message(pyarrow, stream):
                end = stream.tell()
                if end - cuts[-1] >= unit_bytes:
                    cuts.append(end)
            if end > cuts[-1] or len(cuts) == 1:
                cuts.append(end)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{source.path}: not an Arrow stream: {error}") from error
    return cuts, _shares(cuts, source.file.size_bytes)


def _skip_message(pyarrow: Any, stream: Any) -> bool:
    """Pass over the next message of an Arrow stream; False at its end, marked or not."""
    try:
        pyarrow.ipc.read_message(stream)
    except EOFError:
        return False
    return True


def _shares(cuts: list[int], size_bytes: int) -> list[int]:
    """Split the size of a file in the proportion of its cuts, without a remainder."""
    first, last = cuts[0], cuts[-1]
    places = [size_bytes * (cut - first) // max(1, last - first) for cut in cuts[:-1]]
    return [b - a for a, b in itertools.pairwise([*places, size_bytes])]
