"""Read the documents of a piece of a file, in bounded memory."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from hysparse_megatron.data.bulk.packages import require_package
from hysparse_megatron.data.bulk.sources import Source
from hysparse_megatron.data.bulk.streams import open_source
from hysparse_megatron.data.bulk.units import Piece
from hysparse_megatron.data.corpus import decode_utf8, json_line_text
from hysparse_megatron.data.tokenizer import cut_text
from hysparse_megatron.errors import DataError

_BLOCK_BYTES = 1024 * 1024
_ROWS_BYTES = 4 * 1024 * 1024


def read_documents(
    source: Source, piece: Piece, *, text_key: str, max_document_bytes: int
) -> Iterator[str | DataError]:
    """Text of each document that starts in the piece, in order; "" for one without text.

    Bad documents (bad UTF-8, bad JSON, missing field, too long) come as errors that name the file
    and the place. Of text files only whole ones are read: see `read_text_pieces`.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        if source.kind == "jsonl":
            yield from _read_json_lines(source, piece, text_key, max_document_bytes)
        elif source.kind == "text":
            yield _read_text(source, piece)
        else:
            rows = _read_parquet if source.kind == "parquet" else _read_arrow
            yield from _limited(rows(source, piece, text_key), max_document_bytes)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read: {error.strerror or error}") from error


def read_text_pieces(source: Source, piece: Piece) -> Iterator[str | DataError]:
    """A part of a text file in pieces to encode; after an error nothing follows."""
    with _open(source, piece) as stream:
        base = piece.start if piece.spill else 0
        start, stop = _line_borders(stream, piece)
        decoder = codecs.getincrementaldecoder("utf-8")()
        stream.seek(start)
        text, offset = "", start
        while offset < stop:
            block = stream.read(min(_BLOCK_BYTES, stop - offset))
            if offset + base == 0 and block.startswith(codecs.BOM_UTF8):
                offset, block = offset + len(codecs.BOM_UTF8), block[len(codecs.BOM_UTF8) :]
            # The decoder keeps the first bytes of a character that the block before cut.
            kept = len(decoder.getstate()[0])
            offset += len(block)
            try:
                text += decoder.decode(block, final=offset >= stop or not block)
            except UnicodeDecodeError as error:
                place = base + offset - len(block) - kept + error.start
                byte = error.object[error.start]
                yield DataError(f"{source.path}: bad UTF-8 (byte 0x{byte:02x}) at offset {place}")
                return
            if not block:
                break
            *ready, text = cut_text(text) if text else [""]  # the last may go on
            yield from ready
        yield from cut_text(text)


def _open(source: Source, piece: Piece) -> BinaryIO:
    return open_source(piece.spill or source.path)


def _line_borders(stream: BinaryIO, piece: Piece) -> tuple[int, int]:
    """Start of the first line that starts in the piece, and of the first that does not.

    In bytes of the opened file. The lines between are the piece.
    """
    size = os.fstat(stream.fileno()).st_size
    if piece.spill:
        return 0, size
    start = 0 if piece.start == 0 else _next_line(stream, piece.start, piece.stop)
    if start >= piece.stop:
        return start, start
    return start, size if piece.is_last else _next_line(stream, piece.stop, size)


def _next_line(stream: BinaryIO, offset: int, limit: int) -> int:
    """Where the first line at or after `offset` starts; `limit`, or a little more, for none."""
    stream.seek(offset - 1)
    while stream.tell() < limit:
        block = stream.readline(_BLOCK_BYTES)
        if not block or block.endswith(b"\n"):
            break
    return stream.tell()


def _read_text(source: Source, piece: Piece) -> str | DataError:
    with _open(source, piece) as stream:
        return decode_utf8(stream.read(), source.path, 0)


def _read_json_lines(
    source: Source, piece: Piece, text_key: str, max_document_bytes: int
) -> Iterator[str | DataError]:
    with _open(source, piece) as stream:
        base = piece.start if piece.spill else 0
        start, stop = _line_borders(stream, piece)
        stream.seek(start)
        offset = start
        while offset < stop:
            line = stream.readline(max_document_bytes + 1)
            if not line:
                return
            if len(line) > max_document_bytes and not line.endswith(b"\n"):
                yield _too_long(
                    f"{source.path}: line at offset {base + offset}", max_document_bytes
                )
                offset += len(line) + _skip_line(stream)
                continue
            yield json_line_text(line, source.path, base + offset, text_key)
            offset += len(line)


def _skip_line(stream: BinaryIO) -> int:
    """Pass over the rest of a line; returns its bytes."""
    skipped = 0
    while block := stream.readline(_BLOCK_BYTES):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def _too_long(where: str, max_document_bytes: int) -> DataError:
    return DataError(f"{where}: longer than {max_document_bytes:,} bytes")


def _limited(
    rows: Iterator[tuple[str, str | DataError | None]], max_document_bytes: int
) -> Iterator[str | DataError]:
    for where, text in rows:
        if text is None:
            yield DataError(f"{where}: has no text (null)")
        elif isinstance(text, str) and len(text) > max_document_bytes:
            yield _too_long(where, max_document_bytes)
        else:
            yield text


def _read_parquet(
    source: Source, piece: Piece, text_key: str
) -> Iterator[tuple[str, str | DataError | None]]:
    parquet = require_package("pyarrow.parquet", f"reading {source.path}")
    pyarrow = require_package("pyarrow", f"reading {source.path}")
    try:
        # Read by buffers: whole column chunks may be as large as the file.
        with parquet.ParquetFile(source.path, buffer_size=_BLOCK_BYTES, pre_buffer=False) as file:
            _check_field(pyarrow, file.schema_arrow, source.path, text_key)
            groups, row = _row_groups(file.metadata, piece)
            for batch in file.iter_batches(
                _rows_at_once(file.metadata, groups),
                row_groups=groups,
                columns=[text_key],
                use_threads=False,
            ):
                first, row = row, row + batch.num_rows
                if row <= piece.start:
                    continue
                if first >= piece.stop:
                    return
                for number, text in enumerate(_texts(batch.column(0), source.path, first), first):
                    if piece.start <= number < piece.stop:
                        yield f"{source.path}: row {number}", text
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{source.path}: damaged Parquet file: {error}") from error


def _rows_at_once(metadata: Any, groups: list[int]) -> int:
    """Rows of about `_ROWS_BYTES`."""
    size = sum(metadata.row_group(index).total_byte_size for index in groups)
    rows = sum(metadata.row_group(index).num_rows for index in groups)
    return max(1, min(1024, _ROWS_BYTES * rows // max(1, size)))


def _row_groups(metadata: Any, piece: Piece) -> tuple[list[int], int]:
    """Row groups that hold rows of the piece, and the number of the first one's first row."""
    groups: list[int] = []
    first_row, row = 0, 0
    for index in range(metadata.num_row_groups):
        rows = metadata.row_group(index).num_rows
        if row < piece.stop and row + rows > piece.start:
            if not groups:
                first_row = row
            groups.append(index)
        row += rows
    return groups, first_row


def _read_arrow(
    source: Source, piece: Piece, text_key: str
) -> Iterator[tuple[str, str | DataError | None]]:
    pyarrow = require_package("pyarrow", f"reading {source.path}")
    try:
        # Read, not mapped: mapped pages of a large file would count as this process's memory.
        with pyarrow.OSFile(source.path, "rb") as stream:
            schema = pyarrow.ipc.read_schema(stream)
            _check_field(pyarrow, schema, source.path, text_key)
            stream.seek(piece.start)
            while stream.tell() < piece.stop:
                place = stream.tell()
                message = pyarrow.ipc.read_message(stream)
                batch = pyarrow.ipc.read_record_batch(message, schema)
                column = batch.column(schema.get_field_index(text_key))
                for number, text in enumerate(_texts(column, source.path, 0)):
                    yield f"{source.path}: row {number} of the batch at offset {place}", text
    except (pyarrow.ArrowException, ValueError, EOFError) as error:
        raise DataError(f"{source.path}: damaged Arrow stream: {error}") from error


def _check_field(pyarrow: Any, schema: Any, path: str, text_key: str) -> None:
    if text_key not in schema.names:
        found = ", ".join(schema.names[:8]) or "none"
        raise DataError(f"{path}: missing column '{text_key}'; columns found: {found}")
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column '{text_key}' is {kind}, expected strings")


def _texts(column: Any, path: str, first_row: int) -> Iterable[str | DataError | None]:
    """Values of a column of strings; one that is no UTF-8 becomes an error."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [
            None if value is None else decode_utf8(value, f"{path}: row {first_row + index}", 0)
            for index, value in enumerate(column.cast("binary").to_pylist())
        ]
