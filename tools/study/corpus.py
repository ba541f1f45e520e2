"""The study's text: whole folders of source code and manuals, split by project.

Writes JSON lines, compressed, in parts of bounded size that travel by themselves:
`train-000.jsonl.zst` ..., and `validation-<domain>.jsonl.zst` for each domain, with `card.json`
that counts what was taken and left out. The same folders give the same bytes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.files import writing

CARD = "card.json"
_UNREAD_TAGS = frozenset({"script", "style", "nav", "head", "footer"})
_BREAKING_TAGS = frozenset(
    {"p", "div", "br", "li", "tr", "pre", "dt", "dd", "h1", "h2", "h3", "h4"}
)
_LEVEL = 15


@dataclass(frozen=True)
class Source:
    """Folders of one kind of text, as the recipe describes them."""

    name: str
    folder: str
    suffixes: tuple[str, ...]
    project_depth: int
    """Folder names below `folder` that make a project, which is never split."""
    domain: str
    licence: str
    exclude: tuple[str, ...] = ()
    """Patterns of paths below `folder`."""
    projects: tuple[str, ...] = ()
    """Folders below `folder` that must be there; others are not read. Empty: all are."""
    validation_share: float | None = None
    """Of its projects, where it is not the recipe's."""


def _source(name: str, given: Mapping[str, Any]) -> Source:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
    }
    return Source(name=name, **fields)


@dataclass(frozen=True)
class Recipe:
    """What becomes training and validation text."""

    sources: tuple[Source, ...]
    max_document_chars: int
    max_file_chars: int
    validation_share: float
    max_train_chars: int
    """Of all training documents together: a sample of them, the same for the same folders."""

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Raises ConfigError that names what is wrong."""
        try:
            return cls.parse(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: no recipe of a corpus: {error}") from error

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Recipe:
        """Of what stands in its file."""
        sources = tuple(_source(name, given) for name, given in content["sources"].items())
        return cls(**{**content, "sources": sources})


@dataclass
class _Counts:
    documents: int = 0
    characters: int = 0
    projects: set[str] = field(default_factory=set)


class _Text(HTMLParser):
    """The words of a page, without navigation, with a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._unread = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self._unread += tag in _UNREAD_TAGS
        if tag in _BREAKING_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNREAD_TAGS and self._unread:
            self._unread -= 1

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self.parts.append(data)


def page_text(page: str) -> str:
    """What a reader sees of an HTML page; runs of empty lines become one."""
    parser = _Text()
    parser.feed(page)
    lines = (line.rstrip() for line in "".join(parser.parts).splitlines())
    kept = [line for line, _ in itertools.groupby(lines)]
    return "\n".join(kept).strip() + "\n"


def is_held_out(project: str, share: float) -> bool:
    """Whether a project is for validation: decided by its name alone, for a `share` of them."""
    digest = hashlib.sha256(project.encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


def documents(
    source: Source, recipe: Recipe, root: Path, seen: set[bytes], left_out: Counter[str]
) -> Iterator[tuple[str, str]]:
    """(project, text) of each document of a source; `seen` holds digests of files so far."""
    folder = root / source.folder
    if not folder.is_dir():
        raise DataError(f"{folder}: the recipe's source {source.name} is not there")
    if missing := [name for name in source.projects if not (folder / name).is_dir()]:
        raise DataError(f"{folder}: the recipe's source {source.name} lacks {', '.join(missing)}")
    for parent, files in _folders(folder, source):
        relative = parent.relative_to(folder)
        project = f"{source.name}/" + "/".join(relative.parts[: source.project_depth])
        pieces: list[str] = []
        size = 0
        for path in files:
            text = _read(path, recipe, seen, left_out)
            if text is None:
                continue
            if pieces and size + len(text) > recipe.max_document_chars:
                yield project, "".join(pieces)
                pieces, size = [], 0
            pieces.append(text)
            size += len(text)
        if pieces:
            yield project, "".join(pieces)


def _folders(folder: Path, source: Source) -> Iterator[tuple[Path, list[Path]]]:
    wanted = [
        path
        for root in (folder / name for name in sorted(source.projects) or [""])
        for path in sorted(root.rglob("*"))
        if path.suffix in source.suffixes
        and path.is_file()
        and not path.is_symlink()
        and not _is_excluded(path.relative_to(folder), source.exclude)
    ]
    for parent, files in itertools.groupby(wanted, key=lambda path: path.parent):
        yield parent, list(files)


def _is_excluded(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatch.fnmatch(str(parent), pattern) for parent in path.parents for pattern in patterns
    )


def _read(path: Path, recipe: Recipe, seen: set[bytes], left_out: Counter[str]) -> str | None:
    """The text of a file, None if it is left out; why is counted."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        left_out["not UTF-8"] += 1
        return None
    if path.suffix == ".html":
        text = page_text(text)
    if not text.strip() or len(text) > recipe.max_file_chars:
        left_out["empty" if not text.strip() else "too long"] += 1
        return None
    digest = hashlib.sha256(text.encode()).digest()
    if digest in seen:
        left_out["came before"] += 1
        return None
    seen.add(digest)
    return text


class _Parts:
    """JSON lines, compressed into files that are ended once they hold `part_bytes`."""

    def __init__(self, folder: Path, stem: str, part_bytes: int | None) -> None:
        self._folder, self._stem, self._part_bytes = folder, stem, part_bytes
        self._file: BinaryIO | None = None
        self._writer: Any = None
        self.paths: list[Path] = []

    def add(self, text: str) -> None:
        from backports import zstd

        if self._writer is None:
            number = "" if self._part_bytes is None else f"-{len(self.paths):03d}"
            path = self._folder / f"{self._stem}{number}.jsonl.zst"
            with writing(path, "--output"):
                self._file = path.open("wb")
            names = zstd.CompressionParameter
            options: dict[int, int] = {names.compression_level: _LEVEL, names.window_log: 27}
            options[names.enable_long_distance_matching] = 1
            self._writer = zstd.ZstdFile(self._file, "wb", options=options)
            self.paths.append(path)
        with writing(self.paths[-1], "--output"):
            self._writer.write(json.dumps({"text": text}).encode() + b"\n")
        assert self._file is not None
        if self._part_bytes is not None and self._file.tell() > self._part_bytes:
            self.close()

    def close(self) -> None:
        if self._writer is not None and self._file is not None:
            with writing(self.paths[-1], "--output"):
                self._writer.close()
                self._file.close()
        self._writer = None


def write_corpus(
    recipe: Recipe, root: Path, output: Path, part_bytes: int, log: Any = print
) -> dict[str, Any]:
    """Write all parts and `card.json` into `output`, a new folder; returns the card.

    Documents of the training split are dealt out over the parts in an order that mixes sources.
    """
    with writing(output, "--output"):
        output.mkdir(parents=True)
    seen: set[bytes] = set()
    left_out: Counter[str] = Counter()
    counts: dict[tuple[str, str], _Counts] = {}
    held_out: dict[str, _Parts] = {}
    training: list[tuple[bytes, str]] = []
    for source in recipe.sources:
        own_share = source.validation_share
        share = recipe.validation_share if own_share is None else own_share
        for project, text in documents(source, recipe, root, seen, left_out):
            kept = is_held_out(project, share)
            counted = counts.setdefault((source.name, "validation" if kept else "train"), _Counts())
            counted.documents += 1
            counted.characters += len(text)
            counted.projects.add(project)
            if kept:
                stem = f"validation-{source.domain}"
                held_out.setdefault(source.domain, _Parts(output, stem, None)).add(text)
            else:
                training.append((hashlib.sha256(text.encode()).digest(), text))
        log(f"{source.name}: {len(seen):,} files so far")
    parts = _Parts(output, "train", part_bytes)
    written = 0
    for _, text in sorted(training, key=lambda entry: entry[0]):
        if written + len(text) <= recipe.max_train_chars:
            parts.add(text)
            written += len(text)
    for writer in (parts, *held_out.values()):
        writer.close()
    card = {"train_characters": written} | _card(
        recipe, counts, left_out, _paths(parts, held_out.values())
    )
    with writing(output / CARD, "--output"):
        (output / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def _paths(training: _Parts, held_out: Iterable[_Parts]) -> list[Path]:
    return [path for writer in (training, *held_out) for path in writer.paths]


def _card(
    recipe: Recipe,
    counts: dict[tuple[str, str], _Counts],
    left_out: Counter[str],
    paths: list[Path],
) -> dict[str, Any]:
    licences = {source.name: source.licence for source in recipe.sources}
    return {
        "sources": [
            {
                "source": name,
                "split": split,
                "licence": licences[name],
                "projects": len(counted.projects),
                "documents": counted.documents,
                "characters": counted.characters,
            }
            for (name, split), counted in sorted(counts.items())
        ],
        "files_left_out": dict(sorted(left_out.items())),
        "parts": {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in paths
        },
    }
