"""SentencePiece models as tokenizers of text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hysparse_megatron.data.tokenizer import (
    NO_TOKEN,
    Encoder,
    named_begin,
    read_beside,
    read_tokenizer,
    token_content,
)
from hysparse_megatron.errors import DataError
from hysparse_megatron.packages import require_package


class SentencePieceTokenizer(Encoder):
    """A SentencePiece model.

    Documents begin with `begin_of_document`; None goes by the `add_bos_token` and `bos_token` of a
    `tokenizer_config.json` beside it, `NO_TOKEN` is none.

    Raises:
        DataError: the file is missing or no model, it has no end-of-document piece or not the one
            to begin with, or documents would begin with what closes them.
    """

    def __init__(
        self,
        path: str,
        end_of_document: str | None = None,
        begin_of_document: str | None = None,
    ) -> None:
        sentencepiece = require_package("sentencepiece", f"the tokenizer {path}")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=read_tokenizer(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._model.get_piece_size()
        token_id = int(self._model.eos_id())
        if end_of_document is not None:
            token_id = int(self._model.piece_to_id(end_of_document))
            if self._model.id_to_piece(token_id) != end_of_document:
                raise DataError(f"{path}: no end-of-document token; looked for {end_of_document}")
        elif token_id < 0:
            raise DataError(f"{path}: has no end-of-sentence piece; name another one to use")
        self.end_of_document = token_id
        self.end_name: str = self._model.id_to_piece(token_id)
        begin = begin_of_document or self._begin_beside(path)
        found = int(self._model.piece_to_id(begin))
        has_it = self._model.id_to_piece(found) == begin
        try:
            self.begin_of_document = named_begin(begin, found if has_it else None, token_id)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        self.begin_name = None if self.begin_of_document is None else begin

    def _begin_beside(self, path: str) -> str:
        """What the tokenizer_config.json beside it says: the model itself says nothing."""
        described = read_beside(path, "tokenizer_config.json")
        if described.get("add_bos_token") is not True:
            return NO_TOKEN
        own = int(self._model.bos_id())
        name = token_content(described.get("bos_token"))
        name = name or (self._model.id_to_piece(own) if own >= 0 else NO_TOKEN)
        # As for a tokenizer.json: see `TextTokenizer`.
        return NO_TOKEN if name == self.end_name else name

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Encoder`."""
        encoded = self._model.encode(list(texts), out_type=int, num_threads=1)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; control symbols give none."""
        return str(self._model.decode([int(i) for i in ids]))
