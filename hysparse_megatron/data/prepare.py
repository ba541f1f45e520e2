"""From text to token files: tokenize a corpus, split it by document, and keep the result.

The result is cached under a key of all that shapes it, so asking again costs a look at the file
listing, and changing the source, the tokenizer, the split or a version prepares anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from hysparse_megatron.data.cache import LOCK_TIMEOUT_SECONDS, build_once
from hysparse_megatron.data.card import (
    CARD_NAME,
    FORMAT,
    SPLITS,
    TOKENIZER_NAME,
    PreparedCorpus,
    load_prepared,
    write_card,
)
from hysparse_megatron.data.corpus import Corpus, Document, ReadCounts, open_corpus
from hysparse_megatron.data.indexed import IndexedWriter
from hysparse_megatron.data.split import Cut, find_cut, is_validation
from hysparse_megatron.data.tokenizer import (
    END_OF_DOCUMENT,
    MIN_VOCAB_SIZE,
    TextTokenizer,
    load_tokenizer,
    sample_evenly,
    tokenizer_file,
    train_tokenizer,
)
from hysparse_megatron.errors import DataError

__all__ = ["PreparedCorpus", "is_validation", "load_prepared", "prepare_corpus"]

TOKENIZER_TRAINING_BYTES = 8_000_000
"""Text a tokenizer is trained on at most: merges hardly change beyond, the time does."""

_BATCH_BYTES = 4_000_000
_NOTE_EVERY_BYTES = 100_000_000


@dataclass(frozen=True)
class _Request:
    """What is asked for, as in `prepare_corpus`; `tokenizer_path` names a file."""

    corpus: Corpus
    tokenizer_path: str | None
    vocab_size: int
    validation_fraction: float
    seed: int


def prepare_corpus(
    *,
    path: str | None,
    cache_dir: str,
    tokenizer_path: str | None,
    vocab_size: int,
    validation_fraction: float,
    seed: int,
    text_key: str = "text",
    max_bytes: int | None = None,
    max_bad_documents: int = 0,
    progress: Callable[[str], None] | None = None,
    lock_timeout_seconds: float = LOCK_TIMEOUT_SECONDS,
) -> PreparedCorpus:
    """Tokenize a corpus into a training and a validation split, or find it done.

    Any number of processes may ask for the same corpus at once: one prepares it, all get it.

    Args:
        path: a file, a folder, or None for Python's standard library; see `open_corpus`. A folder
            prepared before (one with a card) is checked and returned as it is.
        cache_dir: the result goes to a folder of its own below it.
        tokenizer_path: a `tokenizer.json` or its folder, or None to train one on the corpus.
        vocab_size: of a tokenizer trained here, at most: a small corpus may give fewer ids. A
            given tokenizer has its own; the result's `vocab_size` says how many.
        validation_fraction: chance of a document to go to validation, < 1; 0 holds out none.
        seed: of the split. Which split a document goes to depends on this seed and its name alone.
            Where a split would get no document, the longest one is cut in two: see `Cut`.
        text_key, max_bytes, max_bad_documents: see `open_corpus`.
        progress: is told what is being done, one line at a time. What it raises ends the
            preparation and leaves nothing behind.
        lock_timeout_seconds: longest wait for another process that prepares the same.

    Raises:
        DataError: bad, missing or too little input (names file and line or offset), or the cache
            cannot be written.
    """
    note = progress or _say_nothing
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(f"validation_fraction {validation_fraction} is not between 0 and 1")
    if tokenizer_path is None and vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"vocab_size {vocab_size} is below {MIN_VOCAB_SIZE}")
    if tokenizer_path is not None:
        tokenizer_path = tokenizer_file(tokenizer_path)
    if path is not None and os.path.isfile(os.path.join(path, CARD_NAME)):
        return _load_given(path, tokenizer_path)
    _refuse_cache_inside_source(path, cache_dir)
    corpus = open_corpus(
        path, text_key=text_key, max_bytes=max_bytes, max_bad_documents=max_bad_documents
    )
    request = _Request(corpus, tokenizer_path, vocab_size, validation_fraction, seed)

    def build(directory: str) -> None:
        _build(directory, request, note)
        if open_corpus(path).identity != corpus.identity:
            raise DataError(f"{corpus.description}: files changed while they were read; try again")

    return build_once(
        os.path.join(os.path.abspath(cache_dir), _cache_key(request)),
        load=lambda directory: load_prepared(directory, check_tokens=False),
        build=build,
        note=note,
        lock_timeout_seconds=lock_timeout_seconds,
    )


def _load_given(path: str, tokenizer_path: str | None) -> PreparedCorpus:
    # Every rank would read every token, for hours: ids are looked at as samples are read.
    prepared = load_prepared(path, check_tokens=False)
    if tokenizer_path is not None and _hash_file(tokenizer_path) != prepared.tokenizer_sha256:
        raise DataError(
            f"{tokenizer_path}: is not the tokenizer that {path} was prepared with; "
            f"leave it out to use {prepared.tokenizer_path}"
        )
    return prepared


def _cache_key(request: _Request) -> str:
    """Twenty hexadecimal digits for everything that shapes the result."""
    tokenizer = request.tokenizer_path
    parts: dict[str, Any] = {
        "format": FORMAT,
        "tokenizers": tokenizers.__version__,
        "source": request.corpus.identity,
        "text_key": request.corpus.text_key,
        "max_bytes": request.corpus.max_bytes,
        "max_bad_documents": request.corpus.max_bad_documents,
        "tokenizer": None if tokenizer is None else _hash_file(tokenizer),
        "vocab_size": request.vocab_size if tokenizer is None else None,
        "validation_fraction": request.validation_fraction,
        "seed": request.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _hash_file(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from error


def _refuse_cache_inside_source(path: str | None, cache_dir: str) -> None:
    if path is None or not os.path.isdir(path):
        return
    source, cache = os.path.realpath(path), os.path.realpath(cache_dir)
    if os.path.commonpath([source, cache]) == source:
        raise DataError(f"{cache_dir}: the cache lies inside the corpus {path}; put it elsewhere")


def _say_nothing(line: str) -> None:
    del line


def _build(directory: str, request: _Request, note: Callable[[str], None]) -> None:
    tokenizer = _obtain_tokenizer(directory, request, note)
    cut = find_cut(
        request.corpus, seed=request.seed, validation_fraction=request.validation_fraction
    )
    if cut is not None:
        note(
            f"too few documents for two splits: {cut.name} is cut at character {cut.place:,}, "
            "and what follows is held out"
        )
    counts = ReadCounts()
    writers = {
        split: IndexedWriter(os.path.join(directory, split), tokenizer.vocab_size)
        for split in SPLITS
    }
    try:
        _write_tokens(request, cut, tokenizer, writers, counts, note)
    finally:
        for writer in writers.values():
            writer.close()
    for split, writer in writers.items():
        if writer.num_documents == 0 and (split == "train" or request.validation_fraction):
            raise DataError(
                f"{request.corpus.description}: none of {counts.documents} document(s) fell into "
                f"the {split} split; use more text, or train without evaluation by "
                "train.eval_batches=0 data.validation_fraction=0"
            )
        writer.finish()
    write_card(
        directory,
        {
            "source": request.corpus.description,
            "source_identity": request.corpus.identity,
            "text_key": request.corpus.text_key,
            "max_bytes": request.corpus.max_bytes,
            "max_bad_documents": request.corpus.max_bad_documents,
            "validation_fraction": request.validation_fraction,
            "seed": request.seed,
            "cut": None if cut is None else asdict(cut),
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "text_bytes": counts.text_bytes,
            "empty_documents": counts.empty_documents,
            "bad_documents": counts.bad_documents,
            "train_documents": writers["train"].num_documents,
            "validation_documents": writers["validation"].num_documents,
            "train_tokens": writers["train"].num_tokens,
            "validation_tokens": writers["validation"].num_tokens,
            "versions": {
                "python": platform.python_version(),
                "tokenizers": tokenizers.__version__,
            },
        },
    )
    note(
        f"prepared {writers['train'].num_tokens:,} training and "
        f"{writers['validation'].num_tokens:,} validation tokens of {counts.documents:,} documents "
        f"({counts.empty_documents:,} empty, {counts.bad_documents:,} bad left out)"
    )


def _obtain_tokenizer(
    directory: str, request: _Request, note: Callable[[str], None]
) -> TextTokenizer:
    """Load or train the tokenizer, and keep a copy in `directory`."""
    kept_path = os.path.join(directory, TOKENIZER_NAME)
    if request.tokenizer_path is not None:
        given = load_tokenizer(request.tokenizer_path)
        _copy(request.tokenizer_path, kept_path)
        return given
    corpus = request.corpus
    note(f"training a tokenizer of {request.vocab_size} ids on {corpus.description}")
    sample = sample_evenly(
        (document.text for document in corpus.read(ReadCounts())),
        total_bytes=corpus.size_bytes,
        max_bytes=TOKENIZER_TRAINING_BYTES,
    )
    trained: Tokenizer = train_tokenizer(sample, request.vocab_size)
    with open(kept_path, "w", encoding="utf-8") as stream:
        stream.write(trained.to_str(pretty=True))
    return TextTokenizer(trained, END_OF_DOCUMENT)


def _copy(source: str, target: str) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(reader.read())


def _write_tokens(
    request: _Request,
    cut: Cut | None,
    tokenizer: TextTokenizer,
    writers: dict[str, IndexedWriter],
    counts: ReadCounts,
    note: Callable[[str], None],
) -> None:
    noted_bytes = 0
    note(f"tokenizing about {request.corpus.size_bytes / 1e6:,.1f} MB")
    for batch in _batches(request.corpus.read(counts)):
        pieces = [piece for document in batch for piece in _pieces(document, request, cut)]
        tokens = tokenizer.encode_batch([text for _, text in pieces])
        for (split, _), ids in zip(pieces, tokens, strict=True):
            writers[split].add_document(np.append(ids, tokenizer.end_of_document))
        if counts.text_bytes - noted_bytes >= _NOTE_EVERY_BYTES:
            noted_bytes = counts.text_bytes
            note(f"tokenized {noted_bytes / 1e6:,.0f} MB, {counts.documents:,} documents")


def _pieces(document: Document, request: _Request, cut: Cut | None) -> list[tuple[str, str]]:
    """Splits and texts of a document: one, or two if this is the one that is cut."""
    if cut is not None and document.name == cut.name:
        return [("train", document.text[: cut.place]), ("validation", document.text[cut.place :])]
    is_held_out = is_validation(
        document.name, seed=request.seed, validation_fraction=request.validation_fraction
    )
    return [("validation" if is_held_out else "train", document.text)]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents to about `_BATCH_BYTES`, enough to keep all cores busy."""
    batch: list[Document] = []
    size_bytes = 0
    for document in documents:
        batch.append(document)
        size_bytes += document.size_bytes
        if size_bytes >= _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch
