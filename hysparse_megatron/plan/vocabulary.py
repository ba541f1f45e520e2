"""How many token ids a run will have, before anything is prepared. Imports no torch."""

from __future__ import annotations

import dataclasses
import os

from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.schema import Config, DataConfig
from hysparse_megatron.data.card import CARD_NAME, load_prepared
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer
from hysparse_megatron.errors import DataError


def with_run_vocabulary(config: Config) -> tuple[Config, str]:
    """`config` with `model.vocab_size` as its run would find it, and what says so.

    Where the data or the tokenizer cannot be read, which others report, that of one made here.
    """
    if config.model.vocab_size is not None:
        return config, "model.vocab_size"
    try:
        size, told = _of_data(config.data)
    except DataError as error:
        size, told = config.data.tokenizer_vocab_size, f"assumed: {error}"
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model), told


def _of_data(data: DataConfig) -> tuple[int, str]:
    """Raises DataError if what the settings name cannot be read."""
    folders = [path for _, path in parse_blend(data.blend)] if data.blend else [data.path]
    if folders[0] is not None and os.path.exists(os.path.join(folders[0], CARD_NAME)):
        return load_prepared(folders[0], check_tokens=False).vocab_size, f"that of {folders[0]}"
    if data.tokenizer is not None:
        return choose_tokenizer(data.tokenizer).load().vocab_size, f"that of {data.tokenizer}"
    return data.tokenizer_vocab_size, "assumed: a tokenizer of data.tokenizer_vocab_size is made"
