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
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, BinaryIO

from hysparse_megatron.data.places import open_place
from hysparse_megatron.data.prepare.sources import Piece, Source
from hysparse_megatron.errors import DataError
from hysparse_megatron.files import naming
from hysparse_megatron.packages import require_package

_BUFFER_BYTES = 1 << 20
_ROWS = 1024


def read_piece(
    source: Source,
    piece: Piece,
    text_key: str,
    max_document_bytes: int,
    at: Callable[[int], None] = lambda offset: None,
) -> Iterator[str | DataError]:
    """Texts of a piece's documents, "" for an empty one, and what is wrong with bad ones.

    Args:
        text_key: field of a JSON line, or column, that holds the text.
        max_document_bytes: longer JSON lines and rows are bad.
        at: is told after each document up to which offset the file, as it is stored, was read.

    Raises:
        DataError: the file cannot be read, or not to its end (names file and offset).
    """
    errors: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if source.compression and not source.size_bytes:
        # What a failed download leaves; gzip would take it for an empty text.
        raise DataError(f"{source.path}: cannot be decompressed: it has 0 bytes; fetch it again")
    with naming(source.path), open_place(source.path) as stream:
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
                texts = iter([decode_utf8(decompressed.read(), source.path, 0)])
            elif source.kind == "jsonl":
                lines = io.BufferedReader(decompressed, _BUFFER_BYTES)
                stop = None if source.compression else piece.stop
                place = (source.path, piece.start, stop)
                texts = _json_lines(lines, *place, text_key, max_document_bytes)
            else:
                texts = _rows(stream, source, text_key, max_document_bytes)
            for text in texts:
                yield text
                at(stream.tell())
        except errors as error:
            raise DataError(
                f"{source.path}: cannot be decompressed, near offset {stream.tell()}: {error}"
            ) from error


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
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
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
            yield _json_line_text(line, where, offset, text_key)
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


def _json_line_text(line: bytes, where: str, offset: int, text_key: str) -> str | DataError:
    """The text of one JSON line, empty for a blank line, or what is wrong with it."""
    decoded = decode_utf8(line, where, offset)
    if isinstance(decoded, DataError) or not decoded.strip():
        return decoded.strip() if isinstance(decoded, str) else decoded
    place = f"line at offset {offset}"
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not a JSON object, {place}: {error}")
    if not isinstance(record, dict):
        kind = type(record).__name__
        return DataError(f"{where}: expected a JSON object, got {kind}, {place}")
    if text_key not in record:
        fields = ", ".join(sorted(record)[:8]) or "none"
        return DataError(f"{where}: missing field '{text_key}', {place}; fields found: {fields}")
    text = record[text_key]
    if not isinstance(text, str):
        kind = type(text).__name__
        return DataError(f"{where}: field '{text_key}' is {kind}, expected a string, {place}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"holds a lone surrogate at character {error.start}"
        return DataError(f"{where}: field '{text_key}' {found}, {place}")
    return text


def _rows(stream: BinaryIO, source: Source, text_key: str, limit: int) -> Iterator[str | DataError]:
    """The column of a Parquet file or an Arrow stream."""
    path, purpose = source.path, f"reading {source.path}"
    pyarrow = require_package("pyarrow", purpose)
    try:
        if source.kind == "parquet":
            file = require_package("pyarrow.parquet", purpose).ParquetFile(stream)
            _check_column(pyarrow, file.schema_arrow, path, text_key)
            # One group at a time: all together are read ahead to the end of the file.
            batches = chain.from_iterable(
                file.iter_batches(_ROWS, row_groups=[group], columns=[text_key])
                for group in range(file.num_row_groups)
            )
        else:
            batches = pyarrow.ipc.open_stream(stream)
            _check_column(pyarrow, batches.schema, path, text_key)
        row = 0
        for batch in batches:
            column = batch.column(text_key)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pyarrow.large_binary()).to_pylist():
                where, row = f"{path}: row {row}", row + 1
                if value is None:
                    yield DataError(f"{where}: has no text")
                elif len(value) > limit:
                    yield DataError(f"{where}: longer than {limit:,} bytes")
                else:
                    yield decode_utf8(value, where, 1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: damaged {source.kind} file: {error}") from error


def _check_column(pyarrow: Any, schema: Any, path: str, text_key: str) -> None:
    if text_key not in schema.names:
        found = ", ".join(schema.names[:8]) or "none"
        raise DataError(f"{path}: missing column '{text_key}'; columns found: {found}")
    kind, types = schema.field(text_key).type, pyarrow.types
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise DataError(f"{path}: column '{text_key}' is {kind}, expected strings")
