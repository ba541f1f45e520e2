"""Compressed files, which can only be read from their start.

One process decompresses, far faster than text is tokenized, and writes piece after piece to disk
("spills" it) for the workers. No more pieces exist at once than are asked for.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

from hysparse_megatron.data.bulk.packages import require_package
from hysparse_megatron.data.bulk.sources import Source
from hysparse_megatron.errors import DataError

_BLOCK_BYTES = 64 * 1024
# A zstd block of a few bytes may stand for 128 KiB: what is fed at once bounds what comes out.
_ZSTD_FEED_BYTES = 1024


@dataclass(frozen=True)
class StreamPart:
    """A piece of a decompressed file.

    Attributes:
        number: of the piece in its file, from 0.
        start, stop: its place in the decompressed file, in bytes; it ends with a line.
        is_last: the file ends here.
        spill: the file that holds it.
        compressed_bytes: what was read of the compressed file since the piece before.
    """

    number: int
    start: int
    stop: int
    is_last: bool
    spill: str
    compressed_bytes: int


def cut_stream(
    source: Source,
    *,
    unit_bytes: int,
    spill_path: Callable[[int], str],
    is_wanted: Callable[[int], bool],
) -> Iterator[StreamPart]:
    """Decompress a file and yield the wanted pieces, cut as those of a plain file.

    A piece holds the lines that start in bytes [n, n + 1) * unit_bytes of the decompressed file,
    for some n. Only the last may be empty.

    Raises:
        DataError: the file is damaged or cut off, or cannot be read (names file and offset).
    """
    with open_source(source.path) as stream:
        cutter = _Cutter(unit_bytes, spill_path, is_wanted, stream.tell)
        try:
            for block in _decompress(source, stream):
                yield from cutter.add(block)
            yield from cutter.finish(source.file.size_bytes)
        finally:
            cutter.close()


def open_source(path: str) -> BufferedReader:
    """Open a file of the corpus for reading. Raises DataError."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class _Cutter:
    """Cuts a stream of blocks; a piece is written while it comes in, whatever its lines' length."""

    def __init__(
        self,
        unit_bytes: int,
        spill_path: Callable[[int], str],
        is_wanted: Callable[[int], bool],
        tell: Callable[[], int],
    ) -> None:
        self._unit_bytes = unit_bytes
        self._spill_path = spill_path
        self._is_wanted = is_wanted
        self._tell = tell
        self._number = 0
        self._start = 0
        self._offset = 0
        self._reported_bytes = 0
        self._spill: BinaryIO | None = None
        self._open()

    def _open(self) -> None:
        wanted = self._is_wanted(self._number)
        self._spill = open(self._spill_path(self._number), "wb") if wanted else None  # noqa: SIM115

    def _write(self, block: bytes) -> None:
        if self._spill is not None:
            self._spill.write(block)
        self._offset += len(block)

    def close(self) -> None:
        """Close the open piece's file."""
        if self._spill is not None:
            self._spill.close()

    def add(self, block: bytes) -> Iterator[StreamPart]:
        """Take the next bytes; yields the pieces that they complete."""
        while block:
            border = (self._start // self._unit_bytes + 1) * self._unit_bytes
            # The line that holds the byte before the border is the last of this piece.
            from_place = max(0, border - 1 - self._offset)
            line_end = block.find(b"\n", from_place) if from_place < len(block) else -1
            if line_end < 0:
                self._write(block)
                return
            self._write(block[: line_end + 1])
            block = block[line_end + 1 :]
            yield from self._part(False, self._tell())

    def finish(self, size_bytes: int) -> Iterator[StreamPart]:
        """Yield the last piece; `size_bytes` is the size of the compressed file."""
        yield from self._part(True, size_bytes)

    def _part(self, is_last: bool, read_bytes: int) -> Iterator[StreamPart]:
        size, self._reported_bytes = read_bytes - self._reported_bytes, read_bytes
        spill, number, start = self._spill, self._number, self._start
        self.close()
        self._number, self._start = number + 1, self._offset
        if not is_last:
            self._open()
        if spill is not None:
            yield StreamPart(number, start, self._start, is_last, spill.name, size)


def _decompress(source: Source, stream: BinaryIO) -> Iterator[bytes]:
    """The decompressed file in blocks of bounded size. Raises DataError."""
    errors: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if source.compression == "gz":
        blocks = _decompress_gzip(stream)
    else:
        zstandard = require_package("zstandard", f"reading {source.path}")
        blocks = _decompress_zstd(zstandard, stream)
        errors += (zstandard.ZstdError,)
    while True:
        try:
            block = next(blocks, b"")
        except errors as error:
            raise DataError(
                f"{source.path}: cannot be decompressed, near offset {stream.tell()}: {error}"
            ) from error
        except OSError as error:
            raise DataError(f"{source.path}: cannot be read: {error.strerror}") from error
        if not block:
            return
        yield block


def _decompress_gzip(stream: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as reader:
        while block := reader.read(_BLOCK_BYTES):
            yield block


def _decompress_zstd(zstandard: Any, stream: BinaryIO) -> Iterator[bytes]:
    """Frame after frame. The library's own reader takes a file that is cut off for a whole one."""
    decompressor = None
    while fed := stream.read(_ZSTD_FEED_BYTES):
        while fed:
            if decompressor is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            block = decompressor.decompress(fed)
            fed = b""
            if decompressor.eof:
                fed, decompressor = decompressor.unused_data, None
            if block:
                yield block
    if decompressor is not None:
        raise EOFError("the file ends in the middle of a frame")
