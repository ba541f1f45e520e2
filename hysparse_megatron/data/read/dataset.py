"""Fixed-length samples of the token stream of one split.

S is the sequence length; a sample has S + 1 tokens, so that inputs and next-token labels are both S
long. Sample i starts at token i * S: samples cross document borders and leave no token out of the
loss but the last few of the split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hysparse_megatron.data.read.blend import Blend
from hysparse_megatron.data.read.indexed import (
    TokenFile,
    check_indexed,
    open_indexed,
    refuse_bad_ids,
)
from hysparse_megatron.data.read.order import sample_ids as ordered_sample_ids
from hysparse_megatron.errors import DataError


class TokenSamples:
    """Map-style samples over the memory-mapped tokens of `<prefix>.bin`.

    Args:
        prefix: of Megatron's indexed files.
        seq_length: S, in tokens.
        vocab_size: with it, every sample that is read is checked for ids outside the vocabulary,
            which would otherwise end as an unreadable error in the embedding.

    Raises:
        DataError: the files are damaged, or hold fewer than S + 1 tokens.
    """

    def __init__(self, prefix: str, seq_length: int, vocab_size: int | None = None) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {seq_length}")
        summary = check_indexed(prefix)
        if summary.num_tokens < seq_length + 1:
            raise DataError(
                f"{prefix}.bin: {summary.num_tokens} tokens are fewer than one sample of "
                f"{seq_length} + 1; use more data, a larger split or a shorter seq_length"
            )
        self.seq_length = seq_length
        self.num_tokens = summary.num_tokens
        self.num_samples = (summary.num_tokens - 1) // seq_length
        self._path = f"{prefix}.bin"
        self._vocab_size = vocab_size
        self._dtype = summary.dtype
        self._indexed = open_indexed(prefix)
        self._tokens = TokenFile(prefix)

    def __len__(self) -> int:
        return self.num_samples

    def sample_ids(self, positions: np.ndarray, *, seed: int, fingerprint: str) -> np.ndarray:
        """Which samples come at positions int64 [n] of the training order; see order.py."""
        return ordered_sample_ids(
            positions, seed=seed, fingerprint=fingerprint, num_samples=self.num_samples
        )

    @property
    def num_held_out(self) -> int:
        """How many samples an evaluation may read without seeing one twice."""
        return self.num_samples

    def held_out_ids(self, count: int) -> np.ndarray:
        """Which samples an evaluation reads that may read `count`: int64 [n], ascending.

        They are spread evenly over the split, so that no part of it stands for the whole; all of
        them where there are no more.
        """
        found = min(count, self.num_held_out)
        return np.arange(found, dtype=np.int64) * self.num_samples // found

    def __getitem__(self, sample_id: int) -> np.ndarray:
        """Tokens of one sample, int64 [S + 1].

        Raises:
            IndexError: `sample_id` outside 0 .. num_samples - 1.
            DataError: a token id outside the vocabulary, or the file has become shorter.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} is outside 0 .. {self.num_samples - 1}")
        first = int(sample_id) * self.seq_length
        tokens = self._tokens.read(self._dtype, first, self.seq_length + 1)
        if self._vocab_size is not None:
            refuse_bad_ids(tokens, self._path, first, self._vocab_size)
        return tokens.astype(np.int64)

    def document_starts(self, sample_id: int) -> np.ndarray:
        """Places in a sample at which a document starts, int64 in 0 .. S, ascending.

        The last place, S, is that of the last label. Empty documents start nowhere.

        Raises:
            DataError: the index has become shorter.
        """
        self._tokens.require_index()
        first = int(sample_id) * self.seq_length
        index = self._indexed.index
        itemsize = self._dtype().itemsize
        # Sequences that start here; a document is one or several of them.
        low, high = np.searchsorted(
            index.sequence_pointers,
            [first * itemsize, (first + self.seq_length + 1) * itemsize],
            side="left",
        )
        borders = index.document_indices
        starts = borders[slice(*np.searchsorted(borders, [low, high], side="left"))]
        places = index.sequence_pointers[starts] // itemsize - first
        return np.unique(places)

    def read(self, sample_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens of several samples, int64 [len(sample_ids), S + 1]."""
        return np.stack([self[int(sample_id)] for sample_id in sample_ids])


class BlendedSamples:
    """Samples of several datasets by weights; ids of one dataset follow those of the one before.

    Every dataset has epochs of its own: a small one with a large weight is repeated, each time in
    another order, while the others are still in their first epoch.

    Args:
        parts: the datasets, with one sequence length and tokenizer.
        fingerprints: of each, which fix its order.
        weights: of each, in samples; see blend.py.
    """

    def __init__(
        self, parts: Sequence[TokenSamples], fingerprints: Sequence[str], weights: Sequence[float]
    ) -> None:
        if not len(parts) == len(fingerprints) == len(weights):
            raise ValueError("expected as many fingerprints and weights as datasets")
        self.blend = Blend(weights)
        self._parts, self._fingerprints = list(parts), list(fingerprints)
        self._first_ids = np.cumsum([0, *(part.num_samples for part in parts)])
        self.seq_length = parts[0].seq_length
        self.num_samples = int(self._first_ids[-1])
        self.num_tokens = sum(part.num_tokens for part in parts)

    def __len__(self) -> int:
        return self.num_samples

    def sample_ids(self, positions: np.ndarray, *, seed: int, fingerprint: str) -> np.ndarray:
        """As `TokenSamples.sample_ids`; `fingerprint`, of the whole, fixes nothing here."""
        del fingerprint
        which, own = self.blend.locate(positions)
        ids = np.empty(len(which), dtype=np.int64)
        for number, (part, known) in enumerate(zip(self._parts, self._fingerprints, strict=True)):
            chosen = which == number
            found = part.sample_ids(own[chosen], seed=seed, fingerprint=known)
            ids[chosen] = self._first_ids[number] + found
        return ids

    @property
    def num_held_out(self) -> int:
        """As `TokenSamples.num_held_out`: until the first dataset is used up."""
        return min(
            math.floor(part.num_samples / share)
            for part, share in zip(self._parts, self.blend.shares, strict=True)
        )

    def held_out_ids(self, count: int) -> np.ndarray:
        """As `TokenSamples.held_out_ids`: of each dataset by its weight, spread over its split."""
        which, _ = self.blend.locate(np.arange(min(count, self.num_held_out)))
        ids = np.empty(len(which), dtype=np.int64)
        for number, part in enumerate(self._parts):
            chosen = which == number
            ids[chosen] = self._first_ids[number] + part.held_out_ids(int(chosen.sum()))
        return ids

    def _locate(self, sample_id: int) -> tuple[TokenSamples, int]:
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} is outside 0 .. {self.num_samples - 1}")
        number = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        return self._parts[number], int(sample_id) - int(self._first_ids[number])

    def __getitem__(self, sample_id: int) -> np.ndarray:
        """As `TokenSamples`."""
        part, own = self._locate(sample_id)
        return part[own]

    def document_starts(self, sample_id: int) -> np.ndarray:
        """As `TokenSamples.document_starts`."""
        part, own = self._locate(sample_id)
        return part.document_starts(own)

    def read(self, sample_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """As `TokenSamples.read`."""
        return np.stack([self[int(sample_id)] for sample_id in sample_ids])


Samples = TokenSamples | BlendedSamples
