"""The files of a large corpus: text, JSON lines, Parquet and saved Hugging Face datasets.

The order of inputs is that of the request; below a folder it is that of the sorted names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from hysparse_megatron.data.bulk.packages import require_package
from hysparse_megatron.data.corpus import SourceFile, list_files
from hysparse_megatron.errors import ConfigError, DataError

_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
KINDS = ("text", "jsonl", "parquet", "arrow")
_SAVED_DATASET, _SAVED_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class Source:
    """One file to read.

    Attributes:
        file: where it is; its name begins with the last part of the input's path.
        kind: text (one document), jsonl (one a line), parquet or arrow (one a row).
        compression: gz, zst, or None.
    """

    file: SourceFile
    kind: str
    compression: str | None = None

    @property
    def path(self) -> str:
        """Where the file is."""
        return self.file.path


def list_sources(inputs: Sequence[str], kind: str | None = None) -> tuple[Source, ...]:
    """List the files of all inputs without reading them.

    Args:
        inputs: files, folders, and folders of `datasets.save_to_disk`.
        kind: one of KINDS for all files; None goes by their names, text if they say nothing.

    Raises:
        DataError: an input is missing or holds no file.
        ConfigError: a file is given twice, or needs a package that is not installed.
    """
    sources = [
        _source(file, kind) for given in inputs for file in _list_input(os.path.abspath(given))
    ]
    seen: set[str] = set()
    for source in sources:
        path = os.path.realpath(source.path)
        if path in seen:
            raise ConfigError(f"{source.path}: is given twice; give every file once")
        seen.add(path)
    _require_packages(sources)
    return tuple(sources)


def _source(file: SourceFile, kind: str | None) -> Source:
    stem, suffix = os.path.splitext(file.name.lower())
    compression = _COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = kind or _KINDS.get(suffix, "text")
    if compression and kind in ("parquet", "arrow"):
        raise DataError(f"{file.path}: {kind} inside {compression} cannot be read; decompress it")
    return Source(file, kind, compression)


def _require_packages(sources: Sequence[Source]) -> None:
    """Ask before hours of work, not in the middle."""
    for source in sources:
        if source.kind in ("parquet", "arrow"):
            require_package("pyarrow", f"reading {source.path}")
        if source.compression == "zst":
            require_package("zstandard", f"reading {source.path}")


def _list_input(root: str) -> list[SourceFile]:
    """The files of one input; a saved dataset keeps the order of its own listing."""
    files = list_files(root)
    prefix = f"{os.path.basename(root)}/" if os.path.isdir(root) else ""
    folders = {os.path.dirname(file.name) for file in files}
    by_name = {file.name: file for file in files}
    listed: dict[str, list[str]] = {}
    for folder in sorted(folders):
        _refuse_several_splits(root, folder, by_name)
        names = _saved_dataset(root, folder, by_name)
        if names is not None:
            listed[folder] = names
    chosen: list[SourceFile] = []
    for file in files:
        folder = os.path.dirname(file.name)
        if folder not in listed:
            if os.path.basename(file.name) != _SAVED_SPLITS:
                chosen.append(file)
        elif os.path.basename(file.name) == _SAVED_DATASET:  # once, for the whole folder
            chosen += [by_name[name] for name in listed[folder]]
    if not chosen:
        raise DataError(f"{root}: no files to read; give files or folders of text")
    return [
        SourceFile(f.path, prefix + f.name, f.size_bytes, f.modified_nanoseconds) for f in chosen
    ]


def _refuse_several_splits(root: str, folder: str, by_name: dict[str, SourceFile]) -> None:
    """A saved dictionary of splits usually has a test split, which must not be trained on."""
    name = _join(folder, _SAVED_SPLITS)
    if name not in by_name:
        return
    splits = _read_json(by_name[name].path).get("splits", [])
    if len(splits) > 1:
        place = os.path.join(root, folder)
        raise DataError(
            f"{place}: holds the splits {', '.join(map(str, splits))}; give those to train on, "
            f"such as {os.path.join(place, str(splits[0]))}"
        )


def _saved_dataset(root: str, folder: str, by_name: dict[str, SourceFile]) -> list[str] | None:
    """Names of a saved dataset's Arrow files, in its order; None for any other folder."""
    name = _join(folder, _SAVED_DATASET)
    if name not in by_name or _join(folder, "dataset_info.json") not in by_name:
        return None
    state = _read_json(by_name[name].path)
    place = os.path.join(root, folder)
    if state.get("_indices_data_files"):
        raise DataError(f"{place}: rows are picked by an index; save dataset.flatten_indices()")
    try:
        names = [_join(folder, entry["filename"]) for entry in state["_data_files"]]
    except (LookupError, TypeError) as error:
        raise DataError(f"{by_name[name].path}: lists no data files; save the dataset") from error
    for data_name in names:
        if data_name not in by_name:
            raise DataError(
                f"{os.path.join(root, data_name)}: missing, {by_name[name].path} has it"
            )
    return names


def _read_json(path: str) -> dict:
    try:
        with open(path, "rb") as stream:
            values = json.load(stream)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
