"""The tokenizer of a finished run: found by the hash its checkpoints remember, text and ids."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.card import CARD_NAME, SENTENCEPIECE_NAME, TOKENIZER_NAME
from hysparse_megatron.data.tokenizer import Encoder, tokenizer_file
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer
from hysparse_megatron.errors import DataError
from hysparse_megatron.files import sha256_of


def with_own_tokenizer(data: DataConfig, run_dir: Path) -> DataConfig:
    """The settings of a run, or of weights to start from: these have their tokenizer beside them.

    Their settings name it where it lay when it was made.
    """
    own = run_dir / TOKENIZER_NAME
    return dataclasses.replace(data, tokenizer=str(own)) if own.is_file() else data


def find_run_tokenizer(data: DataConfig, sha256: str | None) -> Path | None:
    """The tokenizer's file with this hash, where the run's settings say, or in its cache.

    Without a hash the first there is.
    """
    for path in tokenizer_places(data):
        if path.is_file() and sha256 in (None, sha256_of(path)):
            return path
    return None


def load_run_tokenizer(
    data: DataConfig,
    sha256: str | None,
    given: str | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Encoder:
    """The tokenizer whose file has this hash.

    Args:
        data: the run's settings, which say where its data lie; they need not be there any more.
        sha256: of the tokenizer's file, as manifests of checkpoints name it; None if they do not:
            then the one that the settings name is taken.
        given: the file or its folder, instead of looking for it.
        identity: of the data in training, as manifests have it, which says what documents began
            and ended with; empty or None if they do not: then what lies beside the file says it.

    Raises:
        DataError: it is not found, `given` is another one, or the file is no tokenizer.
    """
    return load_file(_run_tokenizer(data, sha256, given), identity)


def _run_tokenizer(data: DataConfig, sha256: str | None, given: str | None) -> Path:
    if sha256 is None:
        named = given or data.tokenizer
        if named is None:
            raise DataError(
                "the checkpoint does not say its tokenizer; name its file with --tokenizer"
            )
        return _file_of(named)
    path = find_run_tokenizer(data, sha256) if given is None else _file_of(given)
    if path is not None and path.is_file() and sha256_of(path) == sha256:
        return path
    if given is not None:
        raise DataError(
            f"{given} is not the tokenizer that this run was trained with: its file has another "
            f"SHA-256 than {sha256[:12]}..."
        )
    folders = sorted({str(path.parent) for path in tokenizer_places(data)})
    raise DataError(
        f"the tokenizer of this run (SHA-256 {sha256[:12]}...) is in none of "
        f"{', '.join(folders) or 'the places its settings name'}; name its file with --tokenizer"
    )


def tokenizer_places(data: DataConfig) -> Iterator[Path]:
    """Files that may be a run's tokenizer: as it was given, in prepared folders, in the cache."""
    if data.tokenizer is not None:
        yield Path(tokenizer_file(data.tokenizer))
    folders = [path for _, path in parse_blend(data.blend)] if data.blend else []
    if data.path is not None:
        folders.append(data.path)
    if os.path.isdir(data.cache_dir):
        folders += sorted(entry.path for entry in os.scandir(data.cache_dir))
    for folder in folders:
        for name in (TOKENIZER_NAME, SENTENCEPIECE_NAME):
            yield Path(folder, name)


def _file_of(given: str) -> Path:
    path = choose_tokenizer(given).path
    if path is None:
        raise DataError(f"{given}: name the {TOKENIZER_NAME} beside the prepared data instead")
    return Path(path)


def load_file(path: Path, identity: Mapping[str, Any] | None = None) -> Encoder:
    """The tokenizer of a file; `identity` as for `load_run_tokenizer`.

    Raises DataError if it is none, or cannot close documents.
    """
    tokenizer = choose_tokenizer(str(path)).load()
    # Beside prepared data a card knows the ids around the documents, whatever they are called.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        card = json.loads((path.parent / CARD_NAME).read_bytes())
        _take_around(tokenizer, card if isinstance(card, dict) else {})
    _take_around(tokenizer, identity or {})
    return tokenizer


def _take_around(tokenizer: Encoder, recorded: Mapping[str, Any]) -> None:
    """Give a tokenizer the ids around documents that a card or a manifest has, if it has any facts:
    those of earlier versions do not say what began a document, as nothing did."""
    if recorded:
        end, begin = (recorded.get(f"{side}_of_document") for side in ("end", "begin"))
        tokenizer.end_of_document = tokenizer.end_of_document if end is None else int(end)
        tokenizer.begin_of_document = None if begin is None else int(begin)
