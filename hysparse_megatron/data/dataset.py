"""Fixed-length samples of the token stream of one split.

S is the sequence length; a sample has S + 1 tokens, so that inputs and next-token labels are both S
long. Sample i starts at token i * S: samples cross document borders and leave no token out of the
loss but the last few of the split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hysparse_megatron.data.indexed import check_indexed, open_indexed, refuse_bad_ids
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

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample_id: int) -> np.ndarray:
        """Tokens of one sample, int64 [S + 1].

        Raises:
            IndexError: `sample_id` outside 0 .. num_samples - 1.
            DataError: a token id outside the vocabulary.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} is outside 0 .. {self.num_samples - 1}")
        first = int(sample_id) * self.seq_length
        tokens: np.ndarray = self._indexed.bin_reader.read(
            dtype=self._dtype,
            count=self.seq_length + 1,
            offset=first * self._dtype().itemsize,
        )
        if self._vocab_size is not None:
            refuse_bad_ids(tokens, self._path, first, self._vocab_size)
        return tokens.astype(np.int64)

    def document_starts(self, sample_id: int) -> np.ndarray:
        """Places in a sample at which a document starts, int64 in 0 .. S, ascending.

        The last place, S, is that of the last label. Empty documents start nowhere.
        """
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
