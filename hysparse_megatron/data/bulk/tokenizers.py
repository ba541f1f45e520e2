"""The tokenizers a corpus can be prepared with: tokenizer.json, SentencePiece, bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hysparse_megatron.data.bulk.packages import require_package
from hysparse_megatron.data.card import SENTENCEPIECE_NAME, TOKENIZER_NAME
from hysparse_megatron.data.tokenizer import END_OF_DOCUMENT, MIN_VOCAB_SIZE, load_tokenizer
from hysparse_megatron.errors import DataError

BYTES = "bytes"
"""In place of a path: one id per byte of UTF-8, without a file."""


class Encoder(Protocol):
    """What a worker asks of a tokenizer; see `TextTokenizer`."""

    vocab_size: int
    end_of_document: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, integers [num_tokens], without end-of-document."""


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer by name: small enough to send to the workers, which load it themselves.

    Attributes:
        kind: tokenizers, sentencepiece or bytes.
        path: the file, or None for bytes.
        end_of_document: the token that closes a document, None to look for it.
    """

    kind: str
    path: str | None
    end_of_document: str | None = None

    @property
    def kept_name(self) -> str:
        """Name of its file in the prepared folder."""
        return SENTENCEPIECE_NAME if self.kind == "sentencepiece" else TOKENIZER_NAME

    @property
    def library(self) -> tuple[str, str]:
        """Name and version of the library whose version may change the ids."""
        if self.kind == "sentencepiece":
            package = require_package("sentencepiece", f"the tokenizer {self.path}")
            return "sentencepiece", package.__version__
        return "tokenizers", tokenizers.__version__

    def load(self) -> Encoder:
        """Raises DataError: the file is missing, no tokenizer, or cannot close a document."""
        if self.path is None:
            return ByteTokenizer()
        if self.kind == "sentencepiece":
            return SentencePieceTokenizer(self.path, self.end_of_document)
        return load_tokenizer(self.path, self.end_of_document)

    def contents(self) -> bytes:
        """The tokenizer's file; for bytes a `tokenizer.json` that gives the same ids."""
        if self.path is None:
            return bytes_tokenizer().to_str(pretty=True).encode()
        try:
            with open(self.path, "rb") as stream:
                return stream.read()
        except OSError as error:
            raise DataError(f"{self.path}: cannot read the tokenizer: {error.strerror}") from error

    def sha256(self) -> str:
        """Of `contents`."""
        return hashlib.sha256(self.contents()).hexdigest()


def choose_tokenizer(given: str, end_of_document: str | None = None) -> TokenizerChoice:
    """The tokenizer meant by `given`: a file, a folder of Hugging Face's, or `bytes`.

    Raises:
        DataError: a folder that holds neither tokenizer.json nor tokenizer.model.
    """
    if given == BYTES and not os.path.exists(given):
        return TokenizerChoice(BYTES, None)
    path = os.path.abspath(given)
    if os.path.isdir(path):
        held = [n for n in (TOKENIZER_NAME, SENTENCEPIECE_NAME) if os.path.isfile(f"{path}/{n}")]
        if not held:
            raise DataError(
                f"{path}: holds neither {TOKENIZER_NAME} nor {SENTENCEPIECE_NAME}; transformers "
                "writes the first: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        path = os.path.join(path, held[0])
    kind = "sentencepiece" if path.endswith(".model") else "tokenizers"
    return TokenizerChoice(kind, path, end_of_document)


class ByteTokenizer:
    """One id per byte of UTF-8, and 256 to close a document. Attributes as `TextTokenizer`."""

    def __init__(self) -> None:
        self.vocab_size = MIN_VOCAB_SIZE
        self.end_of_document = MIN_VOCAB_SIZE - 1

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint8 [num_bytes]."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


def bytes_tokenizer() -> Tokenizer:
    """`ByteTokenizer` as a tokenizer.json, for tools that know only that format."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def _byte_characters() -> list[str]:
    """The character by which byte-level BPE writes each byte, in the order of the bytes.

    Printable characters of Latin-1 stand for themselves, the others for those from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class SentencePieceTokenizer:
    """A SentencePiece model. Attributes as `TextTokenizer`.

    Control symbols in text (`</s>`) are ordinary characters to the library, as they must be.

    Raises:
        DataError: the file is missing or no model, or it has no end-of-document piece.
    """

    def __init__(self, path: str, end_of_document: str | None = None) -> None:
        sentencepiece = require_package("sentencepiece", f"the tokenizer {path}")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._model.get_piece_size()
        self.end_of_document = self._find_end(path, end_of_document)

    def _find_end(self, path: str, name: str | None) -> int:
        if name is None:
            token_id = int(self._model.eos_id())
            if token_id < 0:
                raise DataError(f"{path}: has no end-of-sentence piece; name another one to use")
            return token_id
        token_id = int(self._model.piece_to_id(name))
        if self._model.id_to_piece(token_id) != name:
            raise DataError(f"{path}: no end-of-document token; looked for {name}")
        return token_id

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [num_tokens], without end-of-document."""
        encoded = self._model.encode(list(texts), out_type=int, num_threads=1)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end-of-document."""
        return list(self._model.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control symbols give none."""
        return str(self._model.decode([int(i) for i in ids]))
