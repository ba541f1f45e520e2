"""Tokenizers of text: tokenizer.json, bytes; and training a byte-level BPE.

Text is never parsed for special tokens: a document that spells out `<|endoftext|>` is encoded as
ordinary characters, so it cannot forge the end of a document.
"""

from __future__ import annotations

import abc
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hysparse_megatron.data.places import open_place
from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.files import naming

BYTES = "bytes"
"""In place of a path: one id per byte of UTF-8, without a file."""
END_OF_DOCUMENT = "<|endoftext|>"
NO_TOKEN = "none"
"""In place of the token that begins a document: none does, whatever the tokenizer puts there."""
PUBLISHED_WITH = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files that a published tokenizer may have beside it: special tokens, and how chats are written.
They travel with it, and no id of a text depends on them."""
_MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end-of-document token."""
_MAX_VOCAB_SIZE = 1 << 24
"""The library sets memory aside for all ids it is asked for, and dies where there is none."""

# Names under which published tokenizers keep the same token, for those that do not say their own.
_END_OF_DOCUMENT_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
)
_LONG_RUN = re.compile(r"\S{256}")
_WINDOW = 1 << 20
"""Characters that are encoded at once: the library keeps about 100 bytes for each token."""
_OVERLAP = 1 << 14
_AGREEING_TOKENS = 64


class Encoder(abc.ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: highest token id + 1.
        end_of_document: the id that closes every document.
        end_name: the token of that id.
        begin_of_document: the id that every document begins with; None if none does. Never the one
            that closes them.
        begin_name: the token of that id.
    """

    vocab_size: int
    end_of_document: int
    end_name: str
    begin_of_document: int | None = None
    begin_name: str | None = None

    @property
    def holes(self) -> frozenset[int]:
        """Ids below `vocab_size` that are no token."""
        return frozenset()

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, integers [num_tokens], on all cores, with nothing around them."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids. Bytes that are no valid UTF-8 (a cut character) become U+FFFD."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing around them."""
        return [int(token_id) for token_id in self.encode_batch([text])[0]]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a document that begins with `text`, to be continued."""
        return [*self.begin, *self.encode(text)]

    @property
    def begin(self) -> list[int]:
        """What stands before the text of a document: one id, or none."""
        return [] if self.begin_of_document is None else [self.begin_of_document]

    def document(self, ids: np.ndarray) -> np.ndarray:
        """The document of a text's ids [num_tokens]: with what begins and closes it."""
        around = [np.array(some, dtype=np.int64) for some in (self.begin, [self.end_of_document])]
        return np.concatenate([around[0], ids, around[1]])


class TextTokenizer(Encoder):
    """A tokenizer of the tokenizers library.

    `begin_of_document` names what documents begin with; None takes what the post-processor puts
    before a text if that is one token, as transformers does, which ignores an `add_bos_token`
    beside a tokenizer.json; `NO_TOKEN` is none.

    Raises:
        DataError: a token that it does not have, or documents would begin with what closes them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_of_document: str = END_OF_DOCUMENT,
        begin_of_document: str | None = None,
    ) -> None:
        token_id = tokenizer.token_to_id(end_of_document)
        if token_id is None:
            raise DataError(f"the tokenizer has no end-of-document token {end_of_document!r}")
        tokenizer.encode_special_tokens = True
        tokenizer.add_special_tokens([end_of_document])  # its file may have it as an ordinary one
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.end_of_document: int = token_id
        self.end_name = end_of_document
        if begin_of_document is None:
            self.begin_of_document = self._own_begin()
        else:
            self.begin_of_document = named_begin(
                begin_of_document, tokenizer.token_to_id(begin_of_document), token_id
            )
        if self.begin_of_document is not None:
            self.begin_name = tokenizer.id_to_token(self.begin_of_document)
            tokenizer.add_special_tokens([self.begin_name])
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def added_around(self) -> tuple[list[int], list[int]]:
        """Ids that the post-processor puts before a text and after it. `encode` does not."""
        found = self._tokenizer.encode("a")
        is_added = [bool(mask) for mask in found.special_tokens_mask]
        if all(is_added):  # a vocabulary that has nothing for the letter
            return found.ids, []
        first = is_added.index(False)
        last = len(is_added) - is_added[::-1].index(False)
        return found.ids[:first], found.ids[last:]

    def _own_begin(self) -> int | None:
        """What the tokenizer itself begins a text with, if documents can begin with it."""
        before, _ = self.added_around()
        # One that also closes documents would be a document of its own before each of them: masks
        # and positions begin anew after it.
        if len(before) != 1 or before[0] == self.end_of_document:
            return None
        return None if self._tokenizer.id_to_token(before[0]) is None else before[0]

    @property
    def holes(self) -> frozenset[int]:
        """See `Encoder`."""
        known = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return frozenset(range(self.vocab_size)).difference(known)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Encoder`."""
        short = [text for text in texts if len(text) <= _WINDOW]
        encoded = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            np.asarray(next(encoded).ids, dtype=np.int64)
            if len(text) <= _WINDOW
            else self._encode_long(text)
            for text in texts
        ]

    def _encode_long(self, text: str) -> np.ndarray:
        """Windows that overlap are encoded on all cores, and joined where they agree.

        A token depends on characters near it alone, so the ids are those of the whole text; where
        two windows do not agree, as within one endless word, the whole text is encoded at once.
        """
        starts = range(0, len(text) - _OVERLAP, _WINDOW - _OVERLAP)
        windows = [text[start : start + _WINDOW] for start in starts]
        encodings = self._tokenizer.encode_batch(windows, add_special_tokens=False)
        parts, first = [], 0
        for number, encoding in enumerate(encodings):
            ids = np.asarray(encoding.ids, dtype=np.int64)
            stop, following = len(ids), 0
            if number + 1 < len(encodings):
                offset = starts[number + 1] - starts[number]
                joint = _joint(encoding, encodings[number + 1], offset)
                if joint is None:
                    whole = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
                    return np.asarray(whole[0].ids, dtype=np.int64)
                stop, following = joint
            parts.append(ids[first:stop])
            first = following
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Encoder`."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def named_begin(name: str, found: int | None, end: int) -> int | None:
    """The id of what was named to begin documents, `found` if the tokenizer has it."""
    if name == NO_TOKEN:
        return None
    if found is None:
        raise DataError(f"no begin-of-document token; looked for {name}")
    if found == end:
        raise DataError(
            f"documents would begin with {name}, which closes them; name another token, or "
            f"{NO_TOKEN}"
        )
    return found


def _joint(
    left: tokenizers.Encoding, right: tokenizers.Encoding, offset: int
) -> tuple[int, int] | None:
    """Numbers of one token in two encodings from which on both agree, in the middle of the overlap.

    `offset` is where `right` starts in the text of `left`, in characters.
    """
    places = [np.array(side.offsets)[:, 0] for side in (left, right)]
    places[1] += offset
    low = offset + _OVERLAP // 4
    inside = [np.flatnonzero((p >= low) & (p < low + _OVERLAP // 2)) for p in places]
    _, mine, others = np.intersect1d(
        places[0][inside[0]], places[1][inside[1]], return_indices=True
    )
    ids = [np.array(side.ids) for side in (left, right)]
    for i, j in zip(inside[0][mine], inside[1][others], strict=True):
        spans = slice(i, i + _AGREEING_TOKENS), slice(j, j + _AGREEING_TOKENS)
        if len(ids[0][spans[0]]) == _AGREEING_TOKENS and all(
            np.array_equal(found[0][spans[0]], found[1][spans[1]]) for found in (ids, places)
        ):
            return int(i), int(j)
    return None


class ByteTokenizer(Encoder):
    """One id per byte of UTF-8, and 256 to close a document."""

    vocab_size = _MIN_VOCAB_SIZE
    end_of_document = _MIN_VOCAB_SIZE - 1
    end_name = END_OF_DOCUMENT

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint8 [num_bytes]."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Encoder`."""
        return bytes(list(ids)).decode(errors="replace")


def bytes_tokenizer() -> Tokenizer:
    """`ByteTokenizer` as a tokenizer.json, for tools that know only that format."""
    # How byte-level BPE writes bytes: printable characters of Latin-1 stand for themselves, the
    # others for characters from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    """Raises ConfigError: a number of ids that no tokenizer is trained for."""
    if not _MIN_VOCAB_SIZE <= vocab_size <= _MAX_VOCAB_SIZE:
        raise ConfigError(
            f"a tokenizer of {vocab_size} ids: allowed are {_MIN_VOCAB_SIZE} (256 bytes and the "
            f"end of documents) to {_MAX_VOCAB_SIZE} (--vocab-size, data.tokenizer_vocab_size)"
        )


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same documents give the same tokenizer, in any process.

    Args:
        documents: texts; some megabytes are enough.
        vocab_size: at most this many ids: `<|endoftext|>` as 0, the 256 bytes, then merges. A small
            corpus may run out of pairs to merge and give fewer.

    Raises:
        ConfigError: a size that `check_vocab_size` does not allow.
    """
    check_vocab_size(vocab_size)
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


def load_tokenizer(
    path: str, end_of_document: str | None = None, begin_of_document: str | None = None
) -> TextTokenizer:
    """Load a `tokenizer.json` of the tokenizers library, given the file or its folder.

    Args:
        path: the file or its folder.
        end_of_document: the token that closes a document; None takes the `eos_token` of a
            `tokenizer_config.json` beside it, or looks for names that published tokenizers use.
        begin_of_document: see `TextTokenizer`.

    Raises:
        DataError: the file is missing or no tokenizer, it has no end-of-document token or not the
            one to begin with, or documents would begin with what closes them.
    """
    path = tokenizer_file(path)
    content = read_tokenizer(path)
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizer.json: {error}") from error
    names = (end_of_document,) if end_of_document else _end_of_document_names(path)
    for name in names:
        if tokenizer.token_to_id(name) is not None:
            try:
                return TextTokenizer(tokenizer, name, begin_of_document)
            except DataError as error:
                raise DataError(f"{path}: {error}") from error
    raise DataError(f"{path}: no end-of-document token; looked for {', '.join(names)}")


def _end_of_document_names(path: str) -> tuple[str, ...]:
    """Names to look for, the tokenizer's own first: what lies beside it says it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if own := token_content(read_beside(path, name).get("eos_token")):
            return (own, *_END_OF_DOCUMENT_NAMES)
    return _END_OF_DOCUMENT_NAMES


def read_beside(path: str, name: str) -> dict[str, Any]:
    """The object in a JSON file beside a tokenizer's; empty where there is none."""
    try:
        with open(os.path.join(os.path.dirname(path), name), "rb") as stream:
            found = json.load(stream)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def token_content(token: Any) -> str | None:
    """A token as files of transformers write it: as text, or as an object."""
    own = token.get("content") if isinstance(token, dict) else token
    return str(own) if own else None


def read_tokenizer(path: str) -> bytes:
    """A tokenizer's file, wherever it lies. Raises DataError: it cannot be read."""
    with naming(path, "cannot read the tokenizer"), open_place(path) as stream:
        return stream.read()
