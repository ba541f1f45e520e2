"""Which tokenizer text is prepared with, named so that every process can load it itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass

import tokenizers

from hysparse_megatron.data.card import CARD_NAME, SENTENCEPIECE_NAME, TOKENIZER_NAME
from hysparse_megatron.data.sentencepiece_model import SentencePieceTokenizer
from hysparse_megatron.data.tokenizer import (
    BYTES,
    NO_TOKEN,
    PUBLISHED_WITH,
    ByteTokenizer,
    Encoder,
    bytes_tokenizer,
    load_tokenizer,
    read_tokenizer,
)
from hysparse_megatron.errors import DataError
from hysparse_megatron.packages import require_package


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer by name, which processes load themselves.

    Attributes:
        path: the file, or None for bytes.
        end_of_document: the token that closes a document, None to look for it.
        begin_of_document: the token that a document begins with, `NO_TOKEN` for none, None for what
            the tokenizer itself does.
    """

    path: str | None
    end_of_document: str | None = None
    begin_of_document: str | None = None

    @property
    def kind(self) -> str:
        """tokenizers, sentencepiece or bytes."""
        if self.path is None:
            return BYTES
        return "sentencepiece" if self.path.endswith(".model") else "tokenizers"

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
        """Raises DataError: the file is missing, no tokenizer, or has not what stands around a
        document."""
        if self.path is None:
            return ByteTokenizer()
        if self.kind == "sentencepiece":
            return SentencePieceTokenizer(self.path, self.end_of_document, self.begin_of_document)
        return load_tokenizer(self.path, self.end_of_document, self.begin_of_document)

    def around_document(self) -> dict[str, str | None]:
        """Options of a preparation: the tokens that close a document and that it begins with.

        Also where a file beside the tokenizer's says them, which may change. The first is None for
        bytes; without the second, as in all cards of earlier versions, documents begin with none.
        Raises DataError as `load` does.
        """
        if self.path is None:
            return {"end_of_document": None}
        loaded = self.load()
        begin = {} if loaded.begin_name is None else {"begin_of_document": loaded.begin_name}
        return {"end_of_document": loaded.end_name, **begin}

    def contents(self) -> bytes:
        """The tokenizer's file; for bytes a `tokenizer.json` that gives the same ids."""
        if self.path is None:
            return bytes_tokenizer().to_str(pretty=True).encode()
        return read_tokenizer(self.path)

    def published_with(self) -> dict[str, bytes]:
        """By name, what lies beside the file that a model's users need: see `PUBLISHED_WITH`."""
        folder, found = os.path.dirname(self.path or ""), {}
        for name in PUBLISHED_WITH if self.path else ():
            with contextlib.suppress(DataError):
                found[name] = read_tokenizer(f"{folder}/{name}")
        return found

    def sha256(self) -> str:
        """Of `contents`."""
        return hashlib.sha256(self.contents()).hexdigest()


def choose_tokenizer(
    given: str, end_of_document: str | None = None, begin_of_document: str | None = None
) -> TokenizerChoice:
    """The tokenizer meant by `given`: a file, a folder of Hugging Face's, or `bytes`.

    Where the tokens around a document are not named, those count with which a prepared folder that
    holds the file was made.

    Raises:
        DataError: a folder that holds neither tokenizer.json nor tokenizer.model.
    """
    if given == BYTES and not os.path.exists(given):
        return TokenizerChoice(None)
    path = os.path.abspath(given)
    if os.path.isdir(path):
        held = [n for n in (TOKENIZER_NAME, SENTENCEPIECE_NAME) if os.path.isfile(f"{path}/{n}")]
        if not held:
            raise DataError(
                f"{path}: holds neither {TOKENIZER_NAME} nor {SENTENCEPIECE_NAME}; transformers "
                "writes the first: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        path = os.path.join(path, held[0])
    end, begin = _recorded(path)
    return TokenizerChoice(path, end_of_document or end, begin_of_document or begin)


def _recorded(path: str) -> tuple[str | None, str | None]:
    """What closed documents and what they began with when the folder of the file was prepared."""
    try:
        with open(os.path.join(os.path.dirname(path), CARD_NAME), "rb") as stream:
            options = json.load(stream)["options"]
        found = options.get("end_of_document"), options.get("begin_of_document", NO_TOKEN)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None, None
    end, begin = (name if isinstance(name, str) else None for name in found)
    return end, begin
