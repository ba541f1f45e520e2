"""Read documents: every one becomes its text, or what is wrong with it and where.

datatrove's readers leave out what they cannot parse with a line in a log. Here it is told by file
and offset and counted, and a damaged or cut-off file is an error.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import fsspec

from hysparse_megatron.data.prepare.sources import Piece, Source
from hysparse_megatron.errors import DataError
from hysparse_megatron.packages import require_package

_BUFFER_BYTES = 1 << 20
_ROWS = 1024


def read_piece(
    source: Source, piece: Piece, text_key: str, max_document_bytes: int
) -> Iterator[str | DataError]:
    """Texts of a piece's documents, "" for an empty one, and what is wrong with bad ones.

    Args:
        text_key: field of a JSON line, or column, that holds the text.
        max_document_bytes: longer JSON lines and rows are bad.

    Raises:
        DataError: the file cannot be read, or not to its end (names file and offset).
    """
    stream = _open(source)
    errors: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    with stream:
        decompressed: Any = stream
        if source.compression == "gz":
            decompressed = gzip.GzipFile(fileobj=stream)
        elif source.compression == "zst":
            zstd = require_package("backports.zstd", f"reading {source.path}")
            window = {zstd.DecompressionParameter.window_log_max: 31}
            decompressed = zstd.ZstdFile(stream, options=window)
            errors += (zstd.ZstdError,)
        try:
            if source.kind == "text":
                yield decode_utf8(decompressed.read(), source.path, 0)
            elif source.kind == "jsonl":
                lines = io.BufferedReader(decompressed, _BUFFER_BYTES)
                stop = None if source.compression else piece.stop
                place = (source.path, piece.start, stop)
                yield from _json_lines(lines, *place, text_key, max_document_bytes)
            else:
                read = _parquet if source.kind == "parquet" else _arrow
                rows = read(stream, source.path, text_key)
                yield from _limited(rows, source.path, max_document_bytes)
        except errors as error:
            raise DataError(
                f"{source.path}: cannot be decompressed, near offset {stream.tell()}: {error}"
            ) from error
        except OSError as error:
            raise _unreadable(source, error) from error


def _open(source: Source) -> BinaryIO:
    try:
        stream: BinaryIO = (
            open(source.path, "rb")  # noqa: SIM115
            if source.is_local
            else fsspec.open(source.path, "rb").open()
        )
    except OSError as error:
        raise _unreadable(source, error) from error
    return stream


def _unreadable(source: Source, error: OSError) -> DataError:
    return DataError(f"{source.path}: cannot be read: {error.strerror or error}")


def decode_utf8(data: bytes, where: str, offset: int) -> str | DataError:
    """Text of bytes, without a byte order mark; an error is returned, not raised.

    `offset` is where `data` starts in its file, in bytes: for the mark and for the error's message.
    """
    if offset == 0 and data.startswith(codecs.BOM_UTF8):
        data, offset = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        return DataError(f"{where}: bad UTF-8 (byte 0x{byte:02x}) at offset {offset + error.start}")


def is_json_lines(text: str) -> bool:
    """Whether a text of several lines is a JSON object in each: as if its name were wrong."""
    lines = [line for line in text.splitlines()[:100] if line.strip()]
    return len(lines) > 1 and all(map(_is_object, lines))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(
    stream: io.BufferedReader, path: str, start: int, stop: int | None, text_key: str, limit: int
) -> Iterator[str | DataError]:
    """Lines that start in bytes [start, stop); None for the end of the file."""
    offset, number = start, 0
    if start:  # the line that holds the byte before belongs to the piece before
        stream.seek(start - 1)
        offset += _read_line(stream, 0)[1] - 1
    while stop is None or offset < stop:
        line, size = _read_line(stream, limit)
        if not size:
            return
        number += 1
        where = path if start else f"{path}:{number}"
        if line is None:
            yield DataError(f"{where}: longer than {limit:,} bytes, line at offset {offset}")
        else:
            yield json_line_text(line, where, offset, text_key)
        offset += size


def _read_line(stream: io.BufferedReader, limit: int) -> tuple[bytes | None, int]:
    """The next line and its size in bytes; None in place of one that is longer than `limit`."""
    line = stream.readline(limit + 2)
    size = len(line)
    if len(line.rstrip(b"\r\n")) <= limit and (size < limit + 2 or line.endswith(b"\n")):
        return line, size
    while line and not line.endswith(b"\n"):
        line = stream.readline(_BUFFER_BYTES)
        size += len(line)
    return None, size


def json_line_text(line: bytes, where: str, offset: int, text_key: str) -> str | DataError:
    """The text of one JSON line, empty for a blank line; an error is returned, not raised.

    `where` and `offset` (of the line in its file, in bytes) are for the error's message.
    """
    decoded = decode_utf8(line, where, offset)
    if isinstance(decoded, DataError):
        return decoded
    if not decoded.strip():
        return ""
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not a JSON object, line at offset {offset}: {error}")
    found = None
    if not isinstance(record, dict):
        found = f"expected a JSON object, got {type(record).__name__}, line at offset {offset}"
    elif text_key not in record:
        fields = ", ".join(sorted(record)[:8]) or "none"
        found = f"missing field '{text_key}', line at offset {offset}; fields found: {fields}"
    elif not isinstance(record[text_key], str):
        kind = type(record[text_key]).__name__
        found = f"field '{text_key}' is {kind}, expected a string, line at offset {offset}"
    if found is not None:
        return DataError(f"{where}: {found}")
    text: str = record[text_key]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return DataError(
            f"{where}: field '{text_key}' holds a lone surrogate at character {error.start}, "
            f"line at offset {offset}"
        )
    return text


def _parquet(stream: BinaryIO, path: str, text_key: str) -> Iterator[str | DataError]:
    pyarrow = require_package("pyarrow", f"reading {path}")
    parquet = require_package("pyarrow.parquet", f"reading {path}")
    try:
        file = parquet.ParquetFile(stream)
        _check_column(pyarrow, file.schema_arrow, path, text_key)
        first = 0
        for batch in file.iter_batches(_ROWS, columns=[text_key]):
            yield from _texts(pyarrow, batch.column(0), path, first)
            first += len(batch)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: damaged Parquet file: {error}") from error


def _arrow(stream: BinaryIO, path: str, text_key: str) -> Iterator[str | DataError]:
    pyarrow = require_package("pyarrow", f"reading {path}")
    try:
        with pyarrow.ipc.open_stream(stream) as batches:
            _check_column(pyarrow, batches.schema, path, text_key)
            first = 0
            for batch in batches:
                yield from _texts(pyarrow, batch.column(text_key), path, first)
                first += len(batch)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: damaged Arrow stream: {error}") from error


def _check_column(pyarrow: Any, schema: Any, path: str, text_key: str) -> None:
    if text_key not in schema.names:
        found = ", ".join(schema.names[:8]) or "none"
        raise DataError(f"{path}: missing column '{text_key}'; columns found: {found}")
    kind, types = schema.field(text_key).type, pyarrow.types
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise DataError(f"{path}: column '{text_key}' is {kind}, expected strings")


def _texts(pyarrow: Any, column: Any, path: str, first_row: int) -> Iterable[str | DataError]:
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values = column.cast(pyarrow.large_binary()).to_pylist()
    for number, value in enumerate(values, start=first_row):
        where = f"{path}: row {number}"
        yield DataError(f"{where}: has no text") if value is None else decode_utf8(value, where, 1)


def _limited(rows: Iterable[str | DataError], path: str, limit: int) -> Iterator[str | DataError]:
    for number, text in enumerate(rows):
        is_long = isinstance(text, str) and len(text) > limit // 4 and len(text.encode()) > limit
        yield DataError(f"{path}: row {number}: longer than {limit:,} bytes") if is_long else text
