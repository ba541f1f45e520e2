"""The files of a corpus, local or of any file system that fsspec knows, and how they are cut up.

The order of inputs is that of the request; below a folder it is that of the sorted names.
"""

from __future__ import annotations

import json
import os
import platform
import stat
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import fsspec

from hysparse_megatron.data.places import is_local, open_place
from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.files import naming
from hysparse_megatron.packages import require_package

KINDS = ("text", "jsonl", "parquet", "arrow")
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_SAVED_DATASET, _SAVED_SPLITS = {"state.json", "dataset_info.json"}, "dataset_dict.json"
_SAVED_CACHE = "cache-*.arrow"
"""Where datasets keeps results of `map` and `filter`, which it does not read as rows either."""
_STDLIB_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
)
# Files a distribution or a machine's configuration writes: they would make the order depend on it.
_STDLIB_EXCLUDED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")
_MOST_UNITS, _UNIT_BYTES = 256, (1 << 22, 1 << 28)


@dataclass(frozen=True)
class Source:
    """One file to read.

    Attributes:
        path: absolute, or a URL such as s3://bucket/name.
        name: its name below the input, which begins with the last part of the input's path.
        kind: text (one document), jsonl (one a line), parquet or arrow (one a row).
        compression: gz, zst, or None.
        size_bytes: of the file as it is stored.
        version: changes when the file does: its time of modification, or what its file system has.
    """

    path: str
    name: str
    kind: str
    compression: str | None
    size_bytes: int
    version: str

    @property
    def is_local(self) -> bool:
        """Whether the path is one of this machine's file system."""
        return is_local(self.path)


@dataclass(frozen=True)
class Piece:
    """Lines of a file that start in bytes [start, stop), or a whole file: stop is its size."""

    source: int
    start: int
    stop: int


def list_sources(inputs: Sequence[str], kind: str | None = None) -> tuple[Source, ...]:
    """List the files of all inputs without reading them.

    Args:
        inputs: files, folders, folders of `datasets.save_to_disk`, and URLs of them.
        kind: one of KINDS for all files; None goes by their names, text if they say nothing.

    Raises:
        DataError: an input is missing, holds no file, or something that is no file.
        ConfigError: a file is given twice, or needs a package that is not installed.
    """
    sources: list[Source] = []
    for given in inputs:
        found = _local(os.path.abspath(given)) if is_local(given) else _remote(given)
        files = _leave_out_descriptions(given, sorted(found, key=lambda file: file[1]))
        if not files:
            raise DataError(f"{given}: no files to read; give files or folders of text")
        sources += [_source(*file, kind) for file in files]
    seen: set[str] = set()
    for source in sources:
        path = os.path.realpath(source.path) if source.is_local else source.path
        if path in seen:
            raise ConfigError(f"{source.path}: is given twice; give every file once")
        seen.add(path)
        # Ask before hours of work, not in the middle.
        if source.kind in ("parquet", "arrow"):
            require_package("pyarrow", f"reading {source.path}")
        if source.compression == "zst":
            require_package("backports.zstd", f"reading {source.path}")
    return tuple(sources)


def standard_library() -> tuple[tuple[Source, ...], str]:
    """The sample text that is on every machine: Python's modules without tests, and their name."""
    root = sysconfig.get_path("stdlib")
    found: list[_File] = []
    for path, name, size, version in _local(root, _STDLIB_EXCLUDED_FOLDERS):
        file = PurePosixPath(name).name
        if file.endswith(".py") and not file.startswith(_STDLIB_EXCLUDED_PREFIXES):
            found.append((path, name.partition("/")[2], size, version))
    found.sort(key=lambda file: file[1])
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return tuple(_source(*file, None) for file in found), f"{version} standard library"


_File = tuple[str, str, int, str]
"""Path, name below the input, size in bytes, version."""


def _local(root: str, excluded: Collection[str] = ()) -> Iterator[_File]:
    """Files below a folder; links are followed, to every real folder once."""
    seen: set[str] = set()

    def visit(path: str, name: str) -> Iterator[_File]:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            real = os.path.realpath(path)
            if real in seen:
                return
            seen.add(real)
            for entry in sorted(os.listdir(path)):
                if not entry.startswith(".") and entry not in excluded:
                    yield from visit(os.path.join(path, entry), f"{name}/{entry}")
        elif stat.S_ISREG(status.st_mode):
            yield path, name, status.st_size, str(status.st_mtime_ns)
        else:
            raise DataError(f"{path}: is a pipe, a socket or a device; give files")

    with naming(root):
        yield from visit(root, os.path.basename(root))


def _remote(url: str) -> Iterator[_File]:
    try:
        fs, root = fsspec.core.url_to_fs(url)
        found = fs.find(root, detail=True) or {root: fs.info(root)}
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{url}: cannot be read: {error}") from error
    for path, info in found.items():
        if "::" in path:
            raise DataError(f"{url}: holds {path}, which fsspec reads as several files; rename it")
        below = path[len(root) :].strip("/")
        name = "/".join(filter(None, [root.rstrip("/").rpartition("/")[2], below]))
        if info["type"] == "file" and not any(part.startswith(".") for part in below.split("/")):
            version = next(
                (info[key] for key in ("ETag", "etag", "LastModified") if key in info), ""
            )
            place = _chained(fs.unstrip_protocol(path), url)
            yield place, name, int(info["size"]), str(version)


def _chained(place: str, url: str) -> str:
    """The URL of a file that was found under `url`: of a chain, with all its other links."""
    first, mark, others = url.partition("::")
    if not mark:
        return place
    # A link without an address wraps the next one, as a cache does: its files are those.
    return f"{place}::{others}" if "://" in first else f"{first}::{_chained(place, others)}"


def _source(path: str, name: str, size_bytes: int, version: str, kind: str | None) -> Source:
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = kind or _SUFFIXES.get(suffix, "text")
    if compression and kind in ("parquet", "arrow"):
        raise DataError(f"{path}: {kind} inside {compression} cannot be read; decompress it")
    return Source(path, name, kind, compression, size_bytes, version)


def _leave_out_descriptions(root: str, files: list[_File]) -> list[_File]:
    """Files of a saved dataset that hold no text; its Arrow files are in the order of its list."""
    by_name = {file[1]: file for file in files}
    for name in [name for name in by_name if PurePosixPath(name).name == _SAVED_SPLITS]:
        # A saved dictionary of splits usually has a test split, which must not be trained on.
        path = by_name.pop(name)[0]
        splits = _read_json(path).get("splits", [])
        if len(splits) > 1:
            place = path.rpartition("/")[0]
            raise DataError(
                f"{place}: holds the splits {', '.join(map(str, splits))}; give those to train on, "
                f"such as {place}/{splits[0]}"
            )
    for folder in sorted({name.rpartition("/")[0] for name in by_name}):
        if {n for n in _SAVED_DATASET if f"{folder}/{n}" in by_name} == _SAVED_DATASET:
            _order_saved(root, folder, by_name)
    return list(by_name.values())


def _order_saved(root: str, folder: str, by_name: dict[str, _File]) -> None:
    path = by_name[f"{folder}/state.json"][0]
    state = _read_json(path)
    if state.get("_indices_data_files"):
        raise DataError(f"{path}: rows are picked by an index; save dataset.flatten_indices()")
    try:
        listed = [f"{folder}/{entry['filename']}" for entry in state["_data_files"]]
    except (LookupError, TypeError) as error:
        raise DataError(f"{path}: lists no data files; save the dataset again") from error
    for name in listed:
        if name not in by_name:
            missing = f"{path.rpartition('/')[0]}/{name.rpartition('/')[2]}"
            raise DataError(f"{missing}: missing, {path} has it")
    files = {name: by_name[name] for name in listed}
    for name in [name for name in by_name if name.rpartition("/")[0] == folder]:
        last = name.rpartition("/")[2]
        if name in files or last in _SAVED_DATASET or fnmatch(last, _SAVED_CACHE):
            del by_name[name]
        elif last.lower().endswith(".arrow"):
            # Other numbers of files leave those of an earlier save: their rows may be there twice.
            raise DataError(
                f"{by_name[name][0]}: {path} does not list it; remove it if an earlier save left "
                "it, or move it out of the folder to read it too"
            )
    by_name.update(files)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with naming(path), open_place(path) as stream:
            values = json.load(stream)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def cut_units(sources: Sequence[Source], unit_bytes: int | None = None) -> list[list[Piece]]:
    """Neighbouring pieces of about `unit_bytes` together, in the order of the corpus.

    They depend on names and sizes alone, never on who works on them. JSON lines that are not
    compressed are cut; all other files stay whole. None gives every process several units,
    whatever the corpus' size.
    """
    if unit_bytes is None:
        low, high = _UNIT_BYTES
        total = sum(source.size_bytes for source in sources)
        unit_bytes = max(low, min(high, total // _MOST_UNITS))
    units: list[list[Piece]] = []
    room = 0
    for number, source in enumerate(sources):
        is_cut = source.kind == "jsonl" and source.compression is None
        step = unit_bytes if is_cut else max(1, source.size_bytes)
        for start in range(0, max(1, source.size_bytes), step):
            size = min(step, source.size_bytes - start)
            if size > room or not units:  # an empty file may be the first
                units.append([])
                room = unit_bytes
            units[-1].append(Piece(number, start, start + size))
            room -= size
    return units
