"""Put the shards of a corpus together: Megatron's files of both splits, in document order.

Memory is bounded by a chunk of tokens, and some bytes for each document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from hysparse_megatron.data.card import SPLITS
from hysparse_megatron.data.prepare.shards import Folder, Record, WholeFile, Work, token_dtype
from hysparse_megatron.data.read.indexed import HEADER, MAGIC, TOKEN_DTYPES
from hysparse_megatron.data.tokenizer import Encoder

_TRAIN, _VALIDATION, _DROPPED = 0, 1, 2
_CHUNK_DOCUMENTS = 1 << 18
_PORTION_DOCUMENTS = 1 << 20
_BORDERS = ("\n\n", "\n", " ", "")
"""Between the two parts of a text that is cut, the best first: paragraphs, lines, words."""
_REACH, _LONGEST_CHARACTER = 4096, 4


@dataclass(frozen=True)
class Cut:
    """The only long document of a corpus too small for two splits, and where it is cut, in tokens:
    what follows is held out."""

    document: int
    place: int


@dataclass(frozen=True)
class Assembled:
    """What was written: numbers by split, SHA-256 and size by file."""

    documents: dict[str, int]
    tokens: dict[str, int]
    duplicates: int
    cut: Cut | None
    hashes: dict[str, str]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Splitting:
    """How documents are dealt to the splits; see `PrepareRequest`."""

    validation_fraction: float
    seed: int
    deduplicate: bool


def held_out(keys: np.ndarray, seed: int, validation_fraction: float) -> np.ndarray:
    """Which documents go to validation: bool [n], for keys uint64 [n, 2].

    It depends on the seed and the document's text alone, so copies of a text never lie in both
    splits, and adding documents moves none.
    """
    label = hashlib.sha256(f"hysparse-split-2\0{seed}".encode()).digest()
    salts = np.frombuffer(label[:16], "<u8")
    mixed = _mix(_mix(keys[:, 0] ^ salts[0]) ^ keys[:, 1] ^ salts[1])
    # 53 bits, which a float holds exactly.
    chance: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
    return chance < validation_fraction


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble the bits of uint64 [n]; every one of the result depends on all."""
    for shift, factor in ((32, 0x9E3779B97F4A7C15), (29, 0xD6E8FEB86659FD93)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    scrambled: np.ndarray = values ^ (values >> np.uint64(32))
    return scrambled


def assemble(
    work: Work,
    records: Sequence[Record],
    output: Folder,
    splitting: Splitting,
    encoder: Encoder,
    advance: Callable[[int], None],
) -> Assembled:
    """Write both splits to `output`.

    Args:
        work, records: with the shards of the whole corpus.
        advance: is told how many tokens were read since it was last called.

    Raises:
        DataError: a shard is damaged.
    """
    dtype = token_dtype(encoder.vocab_size)
    corpus = _Corpus(work, records, dtype)
    targets = corpus.targets(splitting)
    duplicates = int(np.count_nonzero(targets == _DROPPED))
    cut = corpus.find_cut(splitting.validation_fraction, targets, encoder)
    if cut is not None:
        targets[targets == _VALIDATION] = _TRAIN
    with _Split(output, "train", dtype) as train, _Split(output, "validation", dtype) as held:
        first = 0
        for unit, table in enumerate(corpus.tables()):
            ends = np.cumsum(table["num_tokens"], dtype=np.int64)
            layout = _Layout(ends, targets[first : first + len(table)])
            if cut is not None and first <= cut.document < first + len(table):
                layout.cut(cut.document - first, cut.place)
            first += len(table)
            for split, writer in enumerate((train, held)):
                writer.add_documents(layout.lengths(split))
            for start, tokens in work.tokens(unit, records[unit], dtype):
                for part, parts_start in layout.at_border(start, tokens):
                    of_token = layout.targets_of(parts_start, len(part))
                    for split, writer in enumerate((train, held)):
                        writer.add_tokens(part[of_token == split])
                    if parts_start + len(part) == layout.border:
                        train.add_tokens(np.array([encoder.end_of_document], dtype))
                advance(len(tokens))
    written = dict(zip(SPLITS, (train, held), strict=True))
    return Assembled(
        {name: split.num_documents for name, split in written.items()},
        {name: split.num_tokens for name, split in written.items()},
        duplicates,
        cut,
        {name: file.sha256() for split in written.values() for name, file in split.files.items()},
        {name: file.num_bytes for split in written.values() for name, file in split.files.items()},
    )


@dataclass
class _Layout:
    """Where the documents of a shard end, in tokens [n], and which split each goes to [n].

    `border` is where the one that is cut in two is cut: the part before gets an end of its own.
    """

    ends: np.ndarray
    targets: np.ndarray
    border: int = -1

    def cut(self, number: int, place: int) -> None:
        """Cut document `number` after `place` tokens."""
        self.border = int(self.ends[number - 1] if number else 0) + place
        self.ends = np.insert(self.ends, number, self.border)
        self.targets = np.insert(self.targets, number, _TRAIN)
        self.targets[number + 1] = _VALIDATION

    def lengths(self, split: int) -> np.ndarray:
        """Tokens of the documents of a split, int64 [n]."""
        lengths = np.diff(self.ends, prepend=0) + (self.ends == self.border)
        return lengths[self.targets == split]

    def at_border(self, start: int, tokens: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Tokens that begin at `start`, in two parts where the border is within."""
        inside = self.border - start
        if not 0 < inside < len(tokens):
            return [(tokens, start)]
        return [(tokens[:inside], start), (tokens[inside:], self.border)]

    def targets_of(self, start: int, count: int) -> np.ndarray:
        """The split of every token in [start, start + count)."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, start + count, side="left")) + 1
        inside = np.minimum(self.ends[first:last], start + count)
        return np.repeat(self.targets[first:last], np.diff(inside, prepend=start))


class _Corpus:
    """The documents of all shards, in order."""

    def __init__(self, work: Work, records: Sequence[Record], dtype: type[np.integer]) -> None:
        self._work, self._records, self._dtype = work, list(records), dtype
        self._num_documents = sum(record.num_documents for record in records)

    def tables(self) -> Iterator[np.ndarray]:
        """DOCUMENT [n] of every shard."""
        return self._work.tables(self._records, self._dtype)

    def targets(self, splitting: Splitting) -> np.ndarray:
        """Where every document goes: int8 [num_documents]."""
        found = np.zeros(self._num_documents, np.int8)
        first = 0
        for table in self.tables():
            held = held_out(table["key"], splitting.seed, splitting.validation_fraction)
            found[first : first + len(table)] = np.where(held, _VALIDATION, _TRAIN)
            first += len(table)
        if splitting.deduplicate:
            found[self._duplicates()] = _DROPPED
        return found

    def _duplicates(self) -> np.ndarray:
        """Numbers of all documents but the first of each text; keys are looked at in portions."""
        portions = self._num_documents // _PORTION_DOCUMENTS + 1
        found = [np.zeros(0, np.int64)]
        for portion in range(portions):
            keys, numbers, first = [], [], 0
            for table in self.tables():
                mine = np.flatnonzero(table["key"][:, 0] % np.uint64(portions) == portion)
                keys.append(table["key"][mine])
                numbers.append(first + mine)
                first += len(table)
            key, number = np.concatenate(keys), np.concatenate(numbers)
            order = np.lexsort((key[:, 1], key[:, 0]))  # stable: the first of a text stays first
            again = (key[order][1:] == key[order][:-1]).all(axis=1)
            found.append(number[order[1:][again]])
        return np.concatenate(found)

    def find_cut(
        self, validation_fraction: float, targets: np.ndarray, encoder: Encoder
    ) -> Cut | None:
        """Where to cut the longest document of a corpus of which one split would get nothing.

        Its end is held out, as much as makes `validation_fraction` of the corpus but no more than
        half of the document. None if both splits get documents, or none are to be held out.
        """
        used = targets[targets != _DROPPED]
        if not validation_fraction or len(np.unique(used)) != 1:
            return None
        lengths = np.concatenate([table["num_tokens"] for table in self.tables()]).astype(np.int64)
        lengths[targets == _DROPPED] = 0
        document = int(lengths.argmax())
        length = int(lengths[document]) - 1  # without the token that closes it
        if length < 2:
            return None
        share = min(validation_fraction * int(lengths.sum()) / length, 0.5)
        place = min(max(round(length * (1 - share)), 1), length - 1)
        reach = min(_REACH, (length - place) // 2)
        low = max(1, place - reach)
        nearby = self._tokens_of(document, low, place + reach + _LONGEST_CHARACTER)
        return Cut(document, low + _border_near(nearby, place - low, 2 * reach, encoder))

    def _tokens_of(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, and fewer at its end."""
        first = 0
        for unit, table in enumerate(self.tables()):
            if document < first + len(table):
                ends = np.cumsum(table["num_tokens"], dtype=np.int64)
                begin = int(ends[document - first - 1]) if document > first else 0
                place, stop = begin + start, min(begin + stop, int(ends[document - first]) - 1)
                chunks = self._work.tokens(unit, self._records[unit], self._dtype)
                parts = [tokens[max(0, place - at) : max(0, stop - at)] for at, tokens in chunks]
                return np.concatenate(parts)
            first += len(table)
        raise AssertionError("no such document")


def _border_near(tokens: np.ndarray, wanted: int, last: int, encoder: Encoder) -> int:
    """The number of tokens in [0, last] after which a paragraph, line or word ends, nearest to
    `wanted`; or a character, if nothing else ends there."""
    text, ends = "", [0]
    for token in tokens:
        text += encoder.decode([int(token)])
        ends.append(len(text))
    for border in _BORDERS:
        places = [
            i
            for i, end in enumerate(ends[1 : last + 1], start=1)
            if text.endswith(border, max(0, end - 2), end) or text.startswith(border, end)
        ]
        if not border:  # a character of several tokens stays whole
            rest = [encoder.decode(tokens[i : i + _LONGEST_CHARACTER].tolist()) for i in places]
            whole = [i for i, t in zip(places, rest, strict=True) if not t.startswith("\ufffd")]
            places = whole or places
        if places:
            return min(places, key=lambda place: abs(place - wanted))
    return wanted


class _Split:
    """The pair of files of one split, in Megatron's format."""

    def __init__(self, output: Folder, name: str, dtype: type[np.integer]) -> None:
        self._name, self._dtype = name, dtype
        self._lengths: list[np.ndarray] = []
        self._output, self._stack = output, ExitStack()
        self.num_documents = self.num_tokens = 0
        self.files: dict[str, WholeFile] = {}

    def __enter__(self) -> _Split:
        for name in (f"{self._name}.bin", f"{self._name}.idx"):
            self.files[name] = self._stack.enter_context(WholeFile(self._output, name))
        return self

    def add_tokens(self, tokens: np.ndarray) -> None:
        """Append tokens of the writer's type: [num_tokens]."""
        self.files[f"{self._name}.bin"].write(tokens)
        self.num_tokens += len(tokens)

    def add_documents(self, lengths: np.ndarray) -> None:
        """Note the lengths of the next documents: integers [num_documents], in tokens."""
        self._lengths.append(lengths.astype(np.int32))
        self.num_documents += len(lengths)

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            if error[0] is None:
                self._write_index(self.files[f"{self._name}.idx"])
            self._stack.pop_all().__exit__(*error)

    def _write_index(self, index: WholeFile) -> None:
        code = next(c for c, dtype in TOKEN_DTYPES.items() if dtype is self._dtype)
        count, start = self.num_documents, 0
        index.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
        for lengths in self._lengths:
            index.write(lengths)
        for lengths in self._lengths:
            ends = start + np.cumsum(lengths, dtype=np.int64) * self._dtype().itemsize
            index.write(ends - lengths.astype(np.int64) * self._dtype().itemsize)
            start = int(ends[-1]) if len(ends) else start
        for first in range(0, count + 1, _CHUNK_DOCUMENTS):
            last = min(first + _CHUNK_DOCUMENTS, count + 1)
            index.write(np.arange(first, last, dtype=np.int64))
