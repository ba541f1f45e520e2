"""What `data.path` means: a prepared folder, or text that is prepared into a cache once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.card import CARD_NAME, PreparedCorpus, load_prepared
from hysparse_megatron.data.prepare.finished import contents_of
from hysparse_megatron.data.prepare.progress import Lines
from hysparse_megatron.data.prepare.request import SPLIT_SEED, PrepareRequest, hash_of, sources_of
from hysparse_megatron.data.prepare.run import prepare
from hysparse_megatron.data.prepare.sources import standard_library
from hysparse_megatron.data.tokenizer_choice import TokenizerChoice, choose_tokenizer
from hysparse_megatron.errors import DataError

_LOCK_TIMEOUT_SECONDS = 3600.0
"""Longest wait for another process that prepares the same and gets no further."""


def prepare_corpus(
    data: DataConfig,
    seed: int = SPLIT_SEED,
    progress: Callable[[str], None] | None = None,
    begin_of_document: str | None = None,
) -> PreparedCorpus:
    """Tokenize what `data.path` names into a training and a validation split, or find it done.

    Any number of processes may ask at once. The same files elsewhere are the same corpus. A folder
    prepared before (one with a card) is checked and returned as it is.

    Args:
        data: says what and how; the result goes to a folder of its own below its `cache_dir`.
        seed: of the split; runs of any `train.seed` have the same, so that none trains on what
            another is evaluated on.
        progress: is told what is being done. What it raises ends the preparation; the same call
            goes on with it.
        begin_of_document: what documents of text begin with, see `TokenizerChoice`.

    Raises:
        DataError: bad, missing or too little input (names file and line or offset), or the cache
            cannot be written.
        ConfigError: a package is missing, or the cache lies inside the corpus.
    """
    path, cache_dir = data.path, data.cache_dir
    tokenizer = None
    if data.tokenizer is not None:
        tokenizer = choose_tokenizer(data.tokenizer, begin_of_document=begin_of_document)
    if path is not None and os.path.isfile(os.path.join(path, CARD_NAME)):
        return _given(path, tokenizer)
    sources, description = standard_library() if path is None else sources_of([path], cache_dir)
    request = PrepareRequest(
        sources, "", tokenizer, data.tokenizer_vocab_size, data.text_key,
        data.validation_fraction, seed, description=description,
    )  # fmt: skip
    # A distribution may ship a file of the standard library that is no UTF-8.
    max_bad = None if path is None else 0
    key = hash_of([request.identity(), contents_of(sources), max_bad])[:20]
    output = os.path.join(os.path.abspath(cache_dir), key)
    if os.path.isdir(output):
        # What is damaged is looked at again below, when nobody else can be replacing it.
        with contextlib.suppress(DataError):
            return load_prepared(output, check_tokens=False)
    made = prepare(
        dataclasses.replace(request, output=output),
        max_bad=max_bad,
        repair=True,
        lock_timeout_seconds=_LOCK_TIMEOUT_SECONDS,
        progress=Lines(progress or (lambda line: None)),
    )
    assert made is not None  # as the cache is local
    return made


def _given(path: str, tokenizer: TokenizerChoice | None) -> PreparedCorpus:
    """A prepared folder. Raises DataError if it is damaged or of another tokenizer."""
    # Every rank would read every token, for hours: ids are looked at as samples are read.
    prepared = load_prepared(path, check_tokens=False)
    if tokenizer is not None and tokenizer.sha256() != prepared.tokenizer_sha256:
        raise DataError(
            f"{tokenizer.path}: is not the tokenizer that {path} was prepared with; "
            f"leave it out to use {prepared.tokenizer_path}"
        )
    return prepared
