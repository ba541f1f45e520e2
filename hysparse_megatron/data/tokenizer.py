"""Byte-level BPE: train one on a corpus, load one from a tokenizer.json, encode and decode text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hysparse_megatron.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end-of-document token."""
ENCODE_CHARACTERS = 1024 * 1024
"""Longest text that is encoded at once; `cut_text` cuts longer ones."""

# Names under which published tokenizers keep the same token, in the order they are looked for.
_END_OF_DOCUMENT_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
)
_SAMPLE_CHARACTERS = 64 * 1024
_LONG_RUN = re.compile(r"\S{256}")


class TextTokenizer:
    """Text to token ids and back.

    Text is never parsed for special tokens: a document that spells out `<|endoftext|>` is encoded
    as ordinary characters, so it cannot forge the end of a document.

    Attributes:
        vocab_size: highest token id + 1.
        end_of_document: the id that closes every document.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_document: str = END_OF_DOCUMENT) -> None:
        token_id = tokenizer.token_to_id(end_of_document)
        if token_id is None:
            raise DataError(f"the tokenizer has no end-of-document token {end_of_document!r}")
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.end_of_document: int = token_id
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 [num_tokens], on all cores, without end-of-document.

        Text above 2**20 characters is encoded in pieces, cut after a line end where there is one:
        it bounds the memory and spreads one huge document over the cores.
        """
        pieces = [list(cut_text(text)) for text in texts]
        encodings = iter(
            self._tokenizer.encode_batch_fast(
                [piece for of_text in pieces for piece in of_text], add_special_tokens=False
            )
        )
        return [
            _join([np.asarray(next(encodings).ids, dtype=np.int64) for _ in of_text])
            for of_text in pieces
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids. Bytes that are no valid UTF-8 (a cut character) become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """One array of several; a text of one piece, nearly every one, is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same documents give the same tokenizer, in any process.

    Args:
        documents: texts; see `sample_evenly` to bound their size.
        vocab_size: at most this many ids: `<|endoftext|>` as 0, the 256 bytes, then merges. A small
            corpus may run out of pairs to merge and give fewer.

    Raises:
        DataError: `vocab_size` below 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size {vocab_size} is too small: {MIN_VOCAB_SIZE} ids are needed for the 256 "
            f"bytes and {END_OF_DOCUMENT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Training rescans a whole word for each merge in it, so a megabyte without a space (base64, a
    # minified file) would take hours: break such runs. Encoding is not affected.
    texts = (_LONG_RUN.sub("\\g<0>\n", text) for text in documents)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def tokenizer_file(path: str) -> str:
    """The `tokenizer.json` meant by the path of a file or of a folder."""
    return os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path


def load_tokenizer(path: str, end_of_document: str | None = None) -> TextTokenizer:
    """Load a `tokenizer.json` of the tokenizers library, given the file or its folder.

    Args:
        path: the file or its folder.
        end_of_document: the token that closes a document; None looks for the names that published
            tokenizers use, then for the `eos_token` of a `tokenizer_config.json` beside it.

    Raises:
        DataError: the file is missing or no tokenizer, or it has no end-of-document token.
    """
    path = tokenizer_file(path)
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a tokenizer.json: bad UTF-8 at offset {error.start}"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizer.json: {error}") from error
    names = (end_of_document,) if end_of_document else _end_of_document_names(path)
    for name in names:
        if tokenizer.token_to_id(name) is not None:
            return TextTokenizer(tokenizer, name)
    raise DataError(f"{path}: no end-of-document token; looked for {', '.join(names)}")


def _end_of_document_names(path: str) -> tuple[str, ...]:
    """Names to look for, those of the folder's configuration last."""
    try:
        with open(os.path.join(os.path.dirname(path), "tokenizer_config.json"), "rb") as stream:
            token = json.load(stream)["eos_token"]
    except (OSError, ValueError, LookupError, TypeError):
        return _END_OF_DOCUMENT_NAMES
    content = token.get("content") if isinstance(token, dict) else token
    return (*_END_OF_DOCUMENT_NAMES, content) if content else _END_OF_DOCUMENT_NAMES


def sample_evenly(texts: Iterable[str], *, total_bytes: int, max_bytes: int) -> Iterator[str]:
    """Yield about `max_bytes` of text spread evenly over `texts` of about `total_bytes`.

    Takes pieces of at most 64 Ki characters whenever the share of text passed so far has earned
    one, so a single huge document is sampled as evenly as many small ones.
    """
    share = min(1.0, max_bytes / max(1, total_bytes))
    earned = 0.0
    for text in texts:
        for piece in cut_text(text, _SAMPLE_CHARACTERS):
            earned += share * len(piece)
            if share == 1.0 or earned >= len(piece):
                earned -= len(piece)
                yield piece


def cut_text(text: str, max_characters: int = ENCODE_CHARACTERS) -> Iterator[str]:
    """Cut text into pieces, each ending with the last line end that fits, if there is one."""
    start = 0
    while len(text) - start > max_characters:
        line_end = text.rfind("\n", start, start + max_characters)
        end = line_end + 1 if line_end >= 0 else start + max_characters
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
