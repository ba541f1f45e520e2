"""The card of a prepared corpus, `dataset.json`: what the folder holds and how to recognise it.

The card is written last, so a folder with a valid card is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hysparse_megatron.data import content
from hysparse_megatron.data.read.indexed import check_indexed, check_token_ids
from hysparse_megatron.errors import DataError
from hysparse_megatron.files import naming, sha256_of

FORMAT = 1
CARD_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer.json"
SENTENCEPIECE_NAME = "tokenizer.model"
SPLITS = ("train", "validation")
DATA_NAMES = tuple(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))
_COUNTS = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("documents", "tokens"))
_INTEGERS = ("vocab_size", "end_of_document", *_COUNTS, "empty_documents", "bad_documents")


@dataclass(frozen=True)
class PreparedCorpus:
    """A tokenized corpus on disk, ready for training.

    `directory` is absolute; the prefixes name Megatron's indexed files, without `.bin` / `.idx`.
    `fingerprint` is a hash of the token files' contents; equal fingerprints mean equal tokens.
    `end_of_document` is the token id that closes every document, `begin_of_document` the one that
    it begins with, None if none does. `num_ids` is the largest id that occurs + 1: a tokenizer may
    have more, that a model needs no rows for.
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
    begin_of_document: int | None = None

    def identity(self) -> dict[str, str | int]:
        """What makes these data these data, for a checkpoint to store and compare on resume.

        Without `begin_of_document`, as in all of earlier versions, documents begin with none.
        """
        names = ["fingerprint", "source", "tokenizer_sha256", "vocab_size", "end_of_document"]
        names += ["begin_of_document"] if self.begin_of_document is not None else []
        return {name: getattr(self, name) for name in (*names, *_COUNTS)}


def holds_tokens(directory: str, fingerprint: str) -> bool:
    """Whether it is a prepared folder, of the tokens with that fingerprint, by its card."""
    with contextlib.suppress(DataError):
        return bool(_read_card(directory)["fingerprint"] == fingerprint)
    return False


def sources_of_card(directory: str) -> tuple[dict[str, str], tuple[Any, Any]]:
    """Files that a folder was made of, name by SHA-256, as far as its card lists and hashes them;
    and what their split goes by. Raises DataError if there is no card."""
    card = _read_card(directory)
    listed, options = card.get("sources"), card.get("options")
    files = [file for file in listed if isinstance(file, dict)] if isinstance(listed, list) else []
    options = options if isinstance(options, dict) else {}
    names = {str(file["sha256"]): str(file.get("name")) for file in files if "sha256" in file}
    return names, (options.get("validation_fraction"), options.get("seed"))


def card_of(
    fields: Mapping[str, Any], files: Mapping[str, Mapping[str, int | str]]
) -> dict[str, Any]:
    """The card of a folder.

    Args:
        fields: those of `PreparedCorpus` without paths, hashes, and `fingerprint`; more are kept.
        files: `bytes` and `sha256` of all files by name, and `blocks_sha256` of large ones.
    """
    return {"format": FORMAT, **fields, "fingerprint": fingerprint_of(files), "files": files}


def fingerprint_of(files: Mapping[str, Mapping[str, int | str]]) -> str:
    """One hash for all token files, from those of a card."""
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(DATA_NAMES))
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
    card = _read_card(directory)
    tokenizer_name = _tokenizer_name(card["files"])
    paths = {name: os.path.join(directory, name) for name in (*DATA_NAMES, tokenizer_name)}
    for name, path in paths.items():
        if not name.endswith(".bin"):  # first compared with its index, which says more
            _check_size(path, card["files"][name])
        if check_hashes or name == tokenizer_name:
            _check_content(path, card["files"][name], is_whole=True)
    prefixes = {split: os.path.join(directory, split) for split in SPLITS}
    for split, prefix in prefixes.items():
        summary = check_indexed(prefix, may_be_empty=True)
        found = (summary.num_documents, summary.num_tokens)
        expected = (card[f"{split}_documents"], card[f"{split}_tokens"])
        if found != expected:
            raise DataError(
                f"{prefix}.idx: holds {found[0]} documents and {found[1]} tokens, "
                f"{CARD_NAME} announces {expected[0]} and {expected[1]}"
            )
        if check_tokens and summary.num_tokens:
            check_token_ids(prefix, card["vocab_size"])
    for name in DATA_NAMES:
        _check_size(paths[name], card["files"][name])
        if not check_hashes:
            _check_content(paths[name], card["files"][name], is_whole=False)
    return PreparedCorpus(
        directory=directory,
        train_prefix=prefixes["train"],
        validation_prefix=prefixes["validation"],
        tokenizer_path=paths[tokenizer_name],
        # Cards of earlier versions do not say which ids occur.
        num_ids=card.get("largest_id", card["vocab_size"] - 1) + 1,
        tokenizer_sha256=card["files"][tokenizer_name]["sha256"],
        begin_of_document=card.get("begin_of_document"),  # earlier versions had none
        **{name: card[name] for name in (*_INTEGERS, "fingerprint", "source")},
    )


def large_files(directory: str) -> dict[str, str]:
    """SHA-256, by path, of the files of a prepared folder of which `load_prepared` reads a part.

    Raises:
        DataError: as `load_prepared`.
    """
    directory = os.path.abspath(directory)
    files = _read_card(directory)["files"]
    return {
        os.path.join(directory, name): files[name]["sha256"]
        for name in DATA_NAMES
        if files[name]["bytes"] > content.SMALL_BYTES
    }


def _tokenizer_name(files: Mapping[str, Any]) -> str:
    return SENTENCEPIECE_NAME if SENTENCEPIECE_NAME in files else TOKENIZER_NAME


def _read_card(directory: str) -> dict[str, Any]:
    """The card, of which everything has the type it should have."""
    path = os.path.join(directory, CARD_NAME)
    try:
        with open(path, "rb") as stream:
            card = json.load(stream)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; prepare the data") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a dataset card: {error}") from error
    if not isinstance(card, dict):
        raise DataError(f"{path}: not a dataset card: expected a JSON object")
    if card.get("format") != FORMAT:
        raise DataError(f"{path}: format {card.get('format')!r}, expected {FORMAT}")
    for name in _INTEGERS:
        if type(value := card.get(name)) is not int or value < 0:
            raise DataError(f"{path}: '{name}' is {value!r}, expected an integer >= 0")
    begin = card.get("begin_of_document")
    if begin is not None and (type(begin) is not int or begin < 0):
        raise DataError(
            f"{path}: 'begin_of_document' is {begin!r}, expected an integer >= 0, or null"
        )
    files: dict[str, Any] = card["files"] if isinstance(card.get("files"), dict) else {}
    for name in (*DATA_NAMES, _tokenizer_name(files)):
        entry = files.get(name)
        entry = entry if isinstance(entry, dict) else {}
        if not (isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)):
            raise DataError(f"{path}: no size and hash for {name}")
    if card.get("fingerprint") != fingerprint_of(files):
        raise DataError(f"{path}: the fingerprint does not belong to the files' hashes")
    if not isinstance(card.get("source"), str):
        raise DataError(f"{path}: does not say its source")
    return card


def _check_size(path: str, entry: Mapping[str, Any]) -> None:
    with naming(path):
        found = os.path.getsize(path)
    if found != entry["bytes"]:
        raise DataError(f"{path}: ends at offset {found}, {CARD_NAME} announces {entry['bytes']}")


def _check_content(path: str, entry: Mapping[str, Any], is_whole: bool) -> None:
    """Compare all of a file, or what can be compared at once."""
    with naming(path):
        if is_whole or content.is_small(path):
            is_equal = sha256_of(path) == entry["sha256"]
        else:  # cards of earlier versions have no hash of blocks
            is_equal = entry.get("blocks_sha256") in (None, content.hash_blocks(path))
    if not is_equal:
        raise content.changed(path)
