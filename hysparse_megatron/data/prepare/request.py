"""What is asked for, and the tokenizer that it means."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from hysparse_megatron.data.card import TOKENIZER_NAME
from hysparse_megatron.data.places import is_local
from hysparse_megatron.data.prepare.assemble import Splitting
from hysparse_megatron.data.prepare.readers import read_piece
from hysparse_megatron.data.prepare.shards import Folder
from hysparse_megatron.data.prepare.sources import Source, cut_units, list_sources
from hysparse_megatron.data.tokenizer import NO_TOKEN, check_vocab_size, train_tokenizer
from hysparse_megatron.data.tokenizer_choice import TokenizerChoice
from hysparse_megatron.errors import ConfigError

FORMAT = 2
"""Changes when the same request would give other files."""
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
"""A longer JSON line or row is bad: a process holds a document, and copies of it, in memory."""
VALIDATION_FRACTION = 0.01
SPLIT_SEED = 1234
"""Of all runs that read text themselves: what one holds out no other one has trained on."""

_TRAINING_BYTES = 8_000_000
"""Text a tokenizer is trained on at most: merges hardly change beyond, the time does."""
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class PrepareRequest:
    """What decides the prepared files.

    Attributes:
        sources: see `list_sources`.
        output: the folder to make, or its URL. Beside it lie `OUTPUT.work`, until it is done, and
            a lock.
        tokenizer: see `choose_tokenizer`; None trains one of `vocab_size` ids on the corpus.
        text_key: field of a JSON line, or column, that holds the text.
        validation_fraction: chance of a text to be held out; 0 holds out none, 1 all. Where a split
            would get no document, the longest one is cut in two.
        seed: of the split. Where a document goes depends on this seed and its text alone.
        deduplicate: leave out documents whose text came before.
        max_document_bytes: longer lines and rows are bad; text files may have any length.
        description: of the sources, for people.
        unit_bytes: see `cut_units`; None goes by the size of the corpus.
    """

    sources: tuple[Source, ...]
    output: str
    tokenizer: TokenizerChoice | None
    vocab_size: int = 0
    text_key: str = "text"
    validation_fraction: float = VALIDATION_FRACTION
    seed: int = SPLIT_SEED
    deduplicate: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    description: str = ""
    unit_bytes: int | None = None

    def check(self) -> None:
        """Raises ConfigError: numbers that nothing can be prepared with."""
        if not 0.0 <= self.validation_fraction <= 1.0:
            raise ConfigError(
                f"validation fraction {self.validation_fraction} is not between 0 and 1"
            )
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)

    def shard_options(self) -> dict[str, Any]:
        """What shapes the shards, apart from the files; the rest may change before the end."""
        tokenizer: dict[str, Any] = {"vocab_size": self.vocab_size}
        if self.tokenizer is not None:
            library, version = self.tokenizer.library
            sha256 = self.tokenizer.sha256()
            tokenizer = {"tokenizer_sha256": sha256, library: version}
            tokenizer |= self.tokenizer.around_document()
        return {
            "format": FORMAT,
            "text_key": self.text_key,
            "max_document_bytes": self.max_document_bytes,
            "unit_bytes": self.unit_bytes,
            **tokenizer,
        }

    def splitting(self) -> Splitting:
        """What the assembly goes by."""
        return Splitting(self.validation_fraction, self.seed, self.deduplicate)

    def identity(self) -> str:
        """Hash of all that shapes the result and can be known without reading the files."""
        listing = [[s.name, s.kind, s.size_bytes] for s in self.sources]
        return hash_of([self.shard_options(), asdict(self.splitting()), listing])


def place_tokenizer(
    request: PrepareRequest, folder: Folder, note: Callable[[str], None]
) -> TokenizerChoice:
    """Put the tokenizer to use where all processes find it: the given one, or one trained here."""
    given = request.tokenizer or TokenizerChoice(f"{folder.path}/{TOKENIZER_NAME}")
    name = given.kept_name
    if request.tokenizer is not None:
        folder.write(name, given.contents())
        for beside, contents in given.published_with().items():
            folder.write(beside, contents)
    elif name not in folder.names():
        note(f"training a tokenizer of {request.vocab_size} ids")
        trained = train_tokenizer(_sample(request), request.vocab_size)
        folder.write(name, trained.to_str(pretty=True).encode())
    loaded = given.load()
    begin = ""
    if loaded.begin_name is not None:
        begin = f"begin with {loaded.begin_name} (id {loaded.begin_of_document}) and "
    note(f"documents {begin}end with {loaded.end_name} (id {loaded.end_of_document})")
    path = given.path and f"{folder.path}/{name}"
    return TokenizerChoice(path, loaded.end_name, loaded.begin_name or NO_TOKEN)


def _sample(request: PrepareRequest) -> Iterator[str]:
    """Text from all over the corpus, about `_TRAINING_BYTES`."""
    total = sum(source.size_bytes for source in request.sources)
    share, earned = min(1.0, _TRAINING_BYTES / max(1, total)), 0.0
    for unit in cut_units(request.sources, _SAMPLE_BYTES):
        size = sum(piece.stop - piece.start for piece in unit)
        earned += share * size
        if earned < min(size, _SAMPLE_BYTES) and share < 1:
            continue
        options = request.text_key, request.max_document_bytes
        found = (read_piece(request.sources[piece.source], piece, *options) for piece in unit)
        for text in chain.from_iterable(found):
            if not isinstance(text, str):
                continue
            if share == 1 or len(text) <= earned:
                yield text
            else:  # parts of it, spread evenly
                count = max(1, int(earned) // _SAMPLE_BYTES)
                places = (number * len(text) // count for number in range(count))
                yield from (text[place : place + _SAMPLE_BYTES] for place in places)
            earned -= len(text)
            if earned <= 0 and share < 1:
                break
        earned = max(earned, 0.0)


def sources_of(
    inputs: Sequence[str], output: str, kind: str | None = None
) -> tuple[tuple[Source, ...], str]:
    """The files of some inputs, and their description.

    Raises:
        ConfigError: the output lies inside an input; see `list_sources`.
    """
    if is_local(output):
        for given in filter(is_local, inputs):
            source, target = os.path.realpath(given), os.path.realpath(output)
            if os.path.commonpath([source, target]) == source:
                raise ConfigError(f"{output}: lies inside the input {given}; name another")
    names = [os.path.abspath(given) if is_local(given) else given for given in inputs]
    return list_sources(inputs, kind), ", ".join(names)


def hash_of(values: Any) -> str:
    """SHA-256 of what JSON can write."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
