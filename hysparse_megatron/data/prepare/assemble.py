"""Put the shards of a corpus together: Megatron's files of both splits, in document order.

Memory is bounded by a chunk of tokens, and some bytes for each document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from hysparse_megatron.data.card import DATA_NAMES, SPLITS
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
    """What was written: numbers by split, and by file its size and SHA-256, as cards have them."""

    documents: dict[str, int]
    tokens: dict[str, int]
    duplicates: int
    cut: Cut | None
    files: dict[str, dict[str, int | str]]


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
    corpus = _Corpus(work, records, encoder)
    targets = corpus.targets(splitting)
    corpus.cut_if_needed(splitting.validation_fraction, targets)
    duplicates = int(np.count_nonzero(targets == _DROPPED))
    if corpus.cut is not None:
        targets[targets == _VALIDATION] = _TRAIN
        targets = np.insert(targets, corpus.cut.document + 1, _VALIDATION)
    of_split: list[list[np.ndarray]] = [[], []]
    with ExitStack() as stack:
        files = {name: stack.enter_context(WholeFile(output, name)) for name in DATA_NAMES}
        first = 0
        for unit, lengths in enumerate(corpus.lengths()):
            mine = targets[first : first + len(lengths)]
            first += len(lengths)
            ends, start = np.cumsum(lengths), 0
            for tokens in corpus.tokens(unit):
                of_token = _targets_of(ends, mine, start, len(tokens))
                for number, split in enumerate(SPLITS):
                    files[f"{split}.bin"].write(tokens[of_token == number])
                start += len(tokens)
                advance(len(tokens))
            for number, kept in enumerate(of_split):
                kept.append(lengths[mine == number].astype(np.int32))
        for split, kept in zip(SPLITS, of_split, strict=True):
            _write_index(files[f"{split}.idx"], kept, corpus.dtype)
    return Assembled(
        {split: sum(map(len, kept)) for split, kept in zip(SPLITS, of_split, strict=True)},
        {split: files[f"{split}.bin"].num_bytes // corpus.dtype().itemsize for split in SPLITS},
        duplicates,
        corpus.cut,
        {n: {"bytes": file.num_bytes, "sha256": file.sha256()} for n, file in files.items()},
    )


def _targets_of(ends: np.ndarray, targets: np.ndarray, start: int, count: int) -> np.ndarray:
    """The split of every token in [start, start + count), of documents that end at `ends` [n]."""
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, start + count, side="left")) + 1
    inside = np.minimum(ends[first:last], start + count)
    return np.repeat(targets[first:last], np.diff(inside, prepend=start))


def _write_index(index: WholeFile, lengths: list[np.ndarray], dtype: type[np.integer]) -> None:
    """Write Megatron's index of documents of these lengths: int32 [n], several times."""
    code = next(code for code, known in TOKEN_DTYPES.items() if known is dtype)
    count, start = sum(map(len, lengths)), 0
    index.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
    for some in lengths:
        index.write(some)
    for some in lengths:
        sizes = some.astype(np.int64) * dtype().itemsize
        index.write(start + np.cumsum(sizes) - sizes)
        start += int(sizes.sum())
    for first in range(0, count + 1, _CHUNK_DOCUMENTS):
        index.write(np.arange(first, min(first + _CHUNK_DOCUMENTS, count + 1), dtype=np.int64))


class _Corpus:
    """The documents of all shards, in order; where it has a `cut`, one of them counts as two."""

    def __init__(self, work: Work, records: Sequence[Record], encoder: Encoder) -> None:
        self._work, self._records, self._encoder = work, list(records), encoder
        self.dtype = token_dtype(encoder.vocab_size)
        self.cut: Cut | None = None
        self._cut_unit = self._cut_at = -1

    def _tables(self) -> Iterator[np.ndarray]:
        """DOCUMENT [n] of every shard."""
        return self._work.tables(self._records, self.dtype)

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of the documents of every shard: int64 [n]."""
        first = 0
        for unit, table in enumerate(self._tables()):
            lengths = table["num_tokens"].astype(np.int64)
            if self.cut is not None and unit == self._cut_unit:
                number = self.cut.document - first
                lengths[number] += len(self._encoder.begin) - self.cut.place
                lengths = np.insert(lengths, number, self.cut.place + 1)
            first += len(table)
            yield lengths

    def tokens(self, unit: int) -> Iterator[np.ndarray]:
        """Tokens of a shard in chunks [n]; what is cut gets an end, and begins anew, in between."""
        for start, tokens in self._work.tokens(unit, self._records[unit], self.dtype):
            inside = self._cut_at - start
            if unit == self._cut_unit and 0 <= inside < len(tokens):
                between = [self._encoder.end_of_document, *self._encoder.begin]
                tokens = np.insert(tokens, inside, between)
            yield tokens

    def targets(self, splitting: Splitting) -> np.ndarray:
        """Where every document goes: int8 [num_documents]."""
        found = [
            np.where(
                held_out(table["key"], splitting.seed, splitting.validation_fraction),
                np.int8(_VALIDATION),
                np.int8(_TRAIN),
            )
            for table in self._tables()
        ]
        targets = np.concatenate([np.zeros(0, np.int8), *found])
        if splitting.deduplicate:
            targets[self._duplicates(len(targets))] = _DROPPED
        return targets

    def _duplicates(self, num_documents: int) -> np.ndarray:
        """Numbers of all documents but the first of each text; keys are looked at in portions."""
        portions = num_documents // _PORTION_DOCUMENTS + 1
        found = [np.zeros(0, np.int64)]
        for portion in range(portions):
            keys, numbers, first = [], [], 0
            for table in self._tables():
                mine = np.flatnonzero(table["key"][:, 0] % np.uint64(portions) == portion)
                keys.append(table["key"][mine])
                numbers.append(first + mine)
                first += len(table)
            key, number = np.concatenate(keys), np.concatenate(numbers)
            order = np.lexsort((key[:, 1], key[:, 0]))  # stable: the first of a text stays first
            again = (key[order][1:] == key[order][:-1]).all(axis=1)
            found.append(number[order[1:][again]])
        return np.concatenate(found)

    def cut_if_needed(self, validation_fraction: float, targets: np.ndarray) -> None:
        """Cut the longest document of a corpus of which one split would get nothing.

        Its end is held out, as much as makes `validation_fraction` of the corpus but no more than
        half of the document. Copies of it are dropped: they hold that end too.
        """
        used = targets[targets != _DROPPED]
        if validation_fraction in (0, 1) or len(np.unique(used)) != 1:
            return
        lengths = np.concatenate(list(self.lengths()))
        kept = np.where(targets == _DROPPED, 0, lengths)
        document = int(kept.argmax())
        length = int(kept[document]) - 1  # without the token that closes it
        least = len(self._encoder.begin) + 1
        if length < least + 1:
            return
        keys = np.concatenate([table["key"] for table in self._tables()])
        copies = np.flatnonzero((keys == keys[document]).all(axis=1))
        copies = copies[copies != document]
        targets[copies], kept[copies] = _DROPPED, 0
        share = min(validation_fraction * int(kept.sum()) / length, 0.5)
        place = min(max(round(length * (1 - share)), least), length - 1)
        reach = min(_REACH, (length - place) // 2)
        low, high = max(least, place - reach), min(length, place + reach + _LONGEST_CHARACTER)
        after = np.cumsum([record.num_documents for record in self._records])
        unit = int(np.searchsorted(after, document, side="right"))
        first = int(after[unit]) - self._records[unit].num_documents
        begin = int(lengths[first:document].sum())
        chunks = self._work.tokens(unit, self._records[unit], self.dtype)
        nearby = np.concatenate(
            [t[max(0, begin + low - at) : max(0, begin + high - at)] for at, t in chunks]
        )
        place = low + _border_near(nearby, place - low, 2 * reach, self._encoder)
        self.cut, self._cut_unit, self._cut_at = Cut(document, place), unit, begin + place


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
