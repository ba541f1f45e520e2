"""The tokenizer of a finished run: found by the hash its checkpoints remember, text and ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

from hysparse_megatron.config.schema import DataConfig
from hysparse_megatron.data.blend import parse_blend
from hysparse_megatron.data.bulk.tokenizers import choose_tokenizer
from hysparse_megatron.data.card import CARD_NAME, SENTENCEPIECE_NAME, TOKENIZER_NAME
from hysparse_megatron.errors import DataError


class Tokenizer(Protocol):
    """Text to ids and back; see `TextTokenizer`."""

    vocab_size: int
    end_of_document: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end-of-document."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""


def load_run_tokenizer(data: DataConfig, sha256: str, given: str | None = None) -> Tokenizer:
    """The tokenizer whose file has this hash.

    Args:
        data: the run's settings, which say where its data lie; they need not be there any more.
        sha256: of the tokenizer's file, as manifests of checkpoints name it.
        given: the file or its folder, instead of looking for it.

    Raises:
        DataError: it is not found, `given` is another one, or the file is no tokenizer.
    """
    paths = list(_candidates(data)) if given is None else [str(choose_tokenizer(given).path)]
    for path in paths:
        if os.path.isfile(path) and _digest(path) == sha256:
            return _load(path)
    if given is not None:
        raise DataError(
            f"{given} is not the tokenizer that this run was trained with: its file has another "
            f"SHA-256 than {sha256[:12]}..."
        )
    folders = sorted({os.path.dirname(path) for path in paths})
    raise DataError(
        f"the tokenizer of this run (SHA-256 {sha256[:12]}...) is in none of "
        f"{', '.join(folders) or 'the places its settings name'}; name its file with --tokenizer"
    )


def _candidates(data: DataConfig) -> Iterator[str]:
    """Where a run's tokenizer may lie: as it was given, in prepared folders, in the cache."""
    folders = []
    if data.tokenizer is not None:
        yield data.tokenizer
        folders.append(data.tokenizer)
    if data.blend is not None:
        folders += [path for _, path in parse_blend(data.blend)]
    if data.path is not None:
        folders.append(data.path)
    if os.path.isdir(data.cache_dir):
        folders += [os.path.join(data.cache_dir, name) for name in os.listdir(data.cache_dir)]
    for folder in folders:
        for name in (TOKENIZER_NAME, SENTENCEPIECE_NAME):
            yield os.path.join(folder, name)


def _load(path: str) -> Tokenizer:
    tokenizer = cast(Tokenizer, choose_tokenizer(path).load())
    # Beside prepared data a card knows what closed the documents, whatever it is called.
    try:
        with open(os.path.join(os.path.dirname(path), CARD_NAME), "rb") as stream:
            tokenizer.end_of_document = int(json.load(stream)["end_of_document"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return tokenizer


def _digest(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
