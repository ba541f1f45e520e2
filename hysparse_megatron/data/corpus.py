"""Enumerate the documents of a corpus: text files, JSON lines, or Python's standard library.

Order and names are those of the sorted relative paths, so two machines with the same files see the
same documents under the same names in the same order.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

from hysparse_megatron.errors import DataError

_STDLIB_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
)
# Files a distribution or a machine's configuration writes: they would make the order depend on it.
_STDLIB_EXCLUDED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus; `name` is its path below the corpus root, with forward slashes."""

    path: str
    name: str
    size_bytes: int
    modified_nanoseconds: int


@dataclass(frozen=True)
class Document:
    """One document; `name` is unique in the corpus: a file's name, or `file:line` in JSON lines."""

    name: str
    text: str
    size_bytes: int


@dataclass
class ReadCounts:
    """What one pass over a corpus met so far; filled by `Corpus.read`."""

    documents: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    bad_documents: int = 0


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus and the rules for reading them. Made by `open_corpus`."""

    description: str
    files: tuple[SourceFile, ...]
    identity: str
    text_key: str
    max_bytes: int | None
    max_bad_documents: int | None

    @property
    def size_bytes(self) -> int:
        """Upper estimate of the text in bytes, from file sizes alone."""
        total = sum(file.size_bytes for file in self.files)
        return total if self.max_bytes is None else min(total, self.max_bytes)

    def read(self, counts: ReadCounts) -> Iterator[Document]:
        """Yield every document with text, in order, and count what was met in `counts`.

        Empty documents are counted and left out. Bad documents (bad UTF-8, bad JSON, missing
        field) are counted and left out up to `max_bad_documents` (None: any number).

        Raises:
            DataError: more bad documents than allowed (names file, line and offset of the last
                one), or no document at all.
        """
        for item in self._items():
            if isinstance(item, DataError):
                counts.bad_documents += 1
                limit = self.max_bad_documents
                if limit is not None and counts.bad_documents > limit:
                    raise DataError(
                        f"{item} (bad document number {counts.bad_documents}, {limit} allowed)"
                    )
            elif not item.text:
                counts.empty_documents += 1
            else:
                total_bytes = counts.text_bytes + item.size_bytes
                if self.max_bytes is not None and total_bytes > self.max_bytes:
                    break
                counts.documents += 1
                counts.text_bytes = total_bytes
                yield item
        if counts.documents == 0:
            raise DataError(
                f"{self.description}: no document with text in {len(self.files)} file(s) "
                f"(empty: {counts.empty_documents}, bad: {counts.bad_documents}"
                + (f", limit: {self.max_bytes} bytes)" if self.max_bytes is not None else ")")
            )

    def _items(self) -> Iterator[Document | DataError]:
        for file in self.files:
            if file.name.endswith(".jsonl"):
                yield from _read_json_lines(file, self.text_key)
            else:
                yield _read_text(file)


def open_corpus(
    path: str | None,
    *,
    text_key: str = "text",
    max_bytes: int | None = None,
    max_bad_documents: int = 0,
) -> Corpus:
    """List the files of a corpus without reading them.

    Args:
        path: a file or a folder (read recursively; names starting with a dot are left out), or
            None for the `.py` files of this Python's standard library. A `.jsonl` file holds one
            document per line, any other file is one document of UTF-8 text.
        text_key: the field of a JSON line that holds the text.
        max_bytes: stop before the document that would exceed this much text; None: no limit.
        max_bad_documents: how many unreadable documents to leave out before refusing the corpus.
            The standard library has no such limit: it is the same for everyone who runs this
            Python, and a distribution may ship a file that is not UTF-8.

    Raises:
        DataError: the path is missing, or holds no file.
    """
    if path is None:
        root = sysconfig.get_path("stdlib")
        version = f"{platform.python_implementation()} {platform.python_version()}"
        files = _list_standard_library(root)
        listing = [version, *(f"{file.name}\0{file.size_bytes}" for file in files)]
        description = f"{version} standard library"
    else:
        root = os.path.abspath(path)
        files = list_files(root)
        listing = [
            "path",
            *(f"{file.name}\0{file.size_bytes}\0{file.modified_nanoseconds}" for file in files),
        ]
        description = root
    if not files:
        raise DataError(f"{root}: no files to read; give a text or .jsonl file, or a folder")
    return Corpus(
        description=description,
        files=files,
        identity=hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest(),
        text_key=text_key,
        max_bytes=max_bytes,
        max_bad_documents=None if path is None else max_bad_documents,
    )


def _list_standard_library(root: str) -> tuple[SourceFile, ...]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _STDLIB_EXCLUDED_FOLDERS and not name.startswith("config-")
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(_STDLIB_EXCLUDED_PREFIXES):
                try:
                    files.append(_source_file(os.path.join(folder, name), root))
                except OSError:  # a dangling link of the distribution
                    continue
    return tuple(sorted(files, key=lambda file: file.name))


def list_files(root: str) -> tuple[SourceFile, ...]:
    """A file, or all files below a folder, by sorted name; names that start with a dot left out.

    Raises:
        DataError: the path is missing, or a folder cannot be read.
    """
    try:
        if not os.path.isdir(root):
            return (_source_file(root, os.path.dirname(root)),)
        files = []
        for folder, subfolders, names in os.walk(root, onerror=_raise):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            files += [
                _source_file(os.path.join(folder, name), root)
                for name in names
                if not name.startswith(".")
            ]
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read: {error.strerror}") from error
    return tuple(sorted(files, key=lambda file: file.name))


def _raise(error: OSError) -> None:
    raise error


def _source_file(path: str, root: str) -> SourceFile:
    status = os.stat(path)
    name = os.path.relpath(path, root).replace(os.sep, "/")
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


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


def _read_text(file: SourceFile) -> Document | DataError:
    try:
        with open(file.path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        return DataError(f"{file.path}: cannot be read: {error.strerror}")
    text = decode_utf8(data, file.path, 0)
    return text if isinstance(text, DataError) else Document(file.name, text, len(data))


def _read_json_lines(file: SourceFile, text_key: str) -> Iterator[Document | DataError]:
    offset = 0
    try:
        with open(file.path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = json_line_text(line, f"{file.path}:{number}", offset, text_key)
                offset += len(line)
                if isinstance(text, DataError):
                    yield text
                else:
                    yield Document(f"{file.name}:{number}", text, len(text.encode("utf-8")))
    except OSError as error:
        yield DataError(f"{file.path}: cannot be read at offset {offset}: {error.strerror}")


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
    if not isinstance(record, dict):
        return DataError(
            f"{where}: expected a JSON object, got {type(record).__name__}, line at offset {offset}"
        )
    if text_key not in record:
        found = ", ".join(sorted(record)[:8]) or "none"
        return DataError(
            f"{where}: missing field '{text_key}', line at offset {offset}; fields found: {found}"
        )
    text = record[text_key]
    if not isinstance(text, str):
        return DataError(
            f"{where}: field '{text_key}' is {type(text).__name__}, expected a string, "
            f"line at offset {offset}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return DataError(
            f"{where}: field '{text_key}' holds a lone surrogate at character {error.start}, "
            f"line at offset {offset}"
        )
    return text
