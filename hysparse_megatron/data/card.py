"""The card of a prepared corpus, `dataset.json`: what the folder holds and how to recognise it.

The card is written last, so a folder with a valid card is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hysparse_megatron.data import content
from hysparse_megatron.data.read.indexed import check_indexed, check_token_ids
from hysparse_megatron.errors import DataError
from hysparse_megatron.files import sha256_of

FORMAT = 1
CARD_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer.json"
SENTENCEPIECE_NAME = "tokenizer.model"
SPLITS = ("train", "validation")
DATA_NAMES = tuple(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))


@dataclass(frozen=True)
class PreparedCorpus:
    """A tokenized corpus on disk, ready for training.

    `directory` is absolute; the prefixes name Megatron's indexed files, without `.bin` / `.idx`.
    `fingerprint` is a hash of the token files' contents; equal fingerprints mean equal tokens.
    `end_of_document` is the token id that closes every document. `num_ids` is the largest id that
    occurs + 1: a tokenizer may have more, that a model needs no rows for.
    """

    directory: str
    train_prefix: str
    validation_prefix: str
    tokenizer_path: str
    vocab_size: int
    num_ids: int
    end_of_document: int
    train_documents: int
    validation_documents: int
    train_tokens: int
    validation_tokens: int
    empty_documents: int
    bad_documents: int
    fingerprint: str
    tokenizer_sha256: str
    source: str

    def identity(self) -> dict[str, str | int]:
        """What makes these data these data, for a checkpoint to store and compare on resume."""
        names = (
            "fingerprint",
            "source",
            "tokenizer_sha256",
            "vocab_size",
            "train_documents",
            "validation_documents",
            "train_tokens",
            "validation_tokens",
        )
        values: dict[str, str | int] = asdict(self)
        return {name: values[name] for name in names}


def card_of(
    fields: Mapping[str, Any], files: Mapping[str, Mapping[str, int | str]]
) -> dict[str, Any]:
    """The card of a folder.

    Args:
        fields: those of `PreparedCorpus` without paths, hashes, and `fingerprint`; more are kept.
        files: `bytes` and `sha256` of all files by name, and `blocks_sha256` of large ones.
    """
    hashes = {name: str(files[name]["sha256"]) for name in DATA_NAMES}
    return {"format": FORMAT, **fields, "fingerprint": fingerprint_of(hashes), "files": files}


def fingerprint_of(hashes: Mapping[str, str]) -> str:
    """One hash for all token files, from the SHA-256 of each by name."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_prepared(
    directory: str, *, check_tokens: bool = True, check_hashes: bool = False
) -> PreparedCorpus:
    """Load a prepared corpus and check that it is whole.

    Always checked: the card, the presence and size of every file, the indices, the tokenizer's
    hash, and the content of the others: of small files all, of large ones blocks, see `content.py`.
    More is read only if asked for:

    Args:
        directory: as returned in `PreparedCorpus.directory`.
        check_tokens: read all tokens and refuse an id outside the vocabulary.
        check_hashes: read all files and compare them with the card's hashes.

    Raises:
        DataError: names the file, and the offset in bytes where there is one.
    """
    directory = os.path.abspath(directory)
    card = _read_card(os.path.join(directory, CARD_NAME))
    for name, entry in card.files.items():
        _check_file(directory, name, entry, check_hashes or name == card.tokenizer_name)
    prefixes = {split: os.path.join(directory, split) for split in SPLITS}
    for split, prefix in prefixes.items():
        summary = check_indexed(prefix, may_be_empty=split == "validation")
        found = (summary.num_documents, summary.num_tokens)
        expected = (card.integer(f"{split}_documents"), card.integer(f"{split}_tokens"))
        if found != expected:
            raise DataError(
                f"{prefix}.idx: holds {found[0]} documents and {found[1]} tokens, "
                f"{CARD_NAME} announces {expected[0]} and {expected[1]}"
            )
        if check_tokens and summary.num_tokens:
            check_token_ids(prefix, card.integer("vocab_size"))
    for split, prefix in prefixes.items():
        _check_size(f"{prefix}.bin", card.files[f"{split}.bin"].size_bytes)
    if not check_hashes:
        for name in DATA_NAMES:
            _check_content(os.path.join(directory, name), card.files[name])
    return PreparedCorpus(
        directory=directory,
        train_prefix=prefixes["train"],
        validation_prefix=prefixes["validation"],
        tokenizer_path=os.path.join(directory, card.tokenizer_name),
        vocab_size=card.integer("vocab_size"),
        # Cards of earlier versions do not say which ids occur.
        num_ids=card.values.get("largest_id", card.integer("vocab_size") - 1) + 1,
        end_of_document=card.integer("end_of_document"),
        train_documents=card.integer("train_documents"),
        validation_documents=card.integer("validation_documents"),
        train_tokens=card.integer("train_tokens"),
        validation_tokens=card.integer("validation_tokens"),
        empty_documents=card.integer("empty_documents"),
        bad_documents=card.integer("bad_documents"),
        fingerprint=card.string("fingerprint"),
        tokenizer_sha256=card.files[card.tokenizer_name].sha256,
        source=card.string("source"),
    )


@dataclass(frozen=True)
class _FileEntry:
    size_bytes: int
    sha256: str
    blocks_sha256: str | None
    """Of a large file, in cards that have it: see `content.hash_blocks`."""


@dataclass(frozen=True)
class _Card:
    path: str
    values: dict[str, Any]
    files: dict[str, _FileEntry]
    tokenizer_name: str

    def integer(self, key: str) -> int:
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(f"{self.path}: '{key}' is {value!r}, expected an integer >= 0")
        return value

    def string(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise DataError(f"{self.path}: '{key}' is {value!r}, expected a string")
        return value


def _read_card(path: str) -> _Card:
    try:
        with open(path, "rb") as stream:
            values = json.load(stream)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; prepare the data") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a dataset card: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a dataset card: expected a JSON object")
    if values.get("format") != FORMAT:
        raise DataError(f"{path}: format {values.get('format')!r}, expected {FORMAT}")
    entries = values.get("files")
    has_model = isinstance(entries, dict) and SENTENCEPIECE_NAME in entries
    tokenizer_name = SENTENCEPIECE_NAME if has_model else TOKENIZER_NAME
    files = {}
    for name in (*DATA_NAMES, tokenizer_name):
        entry = entries.get(name) if isinstance(entries, dict) else None
        entry = entry if isinstance(entry, dict) else {}
        size, sha256 = entry.get("bytes"), entry.get("sha256")
        if not isinstance(size, int) or not isinstance(sha256, str):
            raise DataError(f"{path}: no size and hash for {name}")
        files[name] = _FileEntry(size, sha256, entry.get("blocks_sha256"))
    card = _Card(path, values, files, tokenizer_name)
    if card.string("fingerprint") != fingerprint_of({n: files[n].sha256 for n in DATA_NAMES}):
        raise DataError(f"{path}: the fingerprint does not belong to the files' hashes")
    return card


def _check_file(directory: str, name: str, entry: _FileEntry, is_hashed: bool) -> None:
    path = os.path.join(directory, name)
    if not name.endswith(".bin"):  # a token file is first compared with its index, which says more
        _check_size(path, entry.size_bytes)
    if is_hashed and _hash_file(path) != entry.sha256:
        raise content.changed(path)


def _check_content(path: str, entry: _FileEntry) -> None:
    """What of a file can be compared at once."""
    try:
        if content.is_small(path):
            is_equal = sha256_of(path) == entry.sha256
        else:  # cards of earlier versions have no hash of blocks
            is_equal = entry.blocks_sha256 in (None, content.hash_blocks(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not is_equal:
        raise content.changed(path)


def large_files(directory: str) -> dict[str, str]:
    """SHA-256, by path, of the files of a prepared folder of which `load_prepared` reads a part.

    Raises:
        DataError: as `load_prepared`.
    """
    directory = os.path.abspath(directory)
    files = _read_card(os.path.join(directory, CARD_NAME)).files
    return {
        os.path.join(directory, name): files[name].sha256
        for name in DATA_NAMES
        if files[name].size_bytes > content.SMALL_BYTES
    }


def _check_size(path: str, expected_bytes: int) -> None:
    try:
        found = os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if found != expected_bytes:
        raise DataError(f"{path}: ends at offset {found}, {CARD_NAME} announces {expected_bytes}")


def _hash_file(path: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
