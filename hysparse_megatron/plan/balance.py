"""How evenly documents spread a full layer's attention over context-parallel ranks."""

from __future__ import annotations

import numpy as np

from hysparse_megatron.config.schema import Config

SEQUENCES = 64
"""Drawn for an estimate, always the same ones."""
SHARES = (4, 32, 256)
"""Documents to a sequence, in the lengths that a plan names."""


def balance_by_document(config: Config) -> dict[int, float]:
    """`slowest_over_mean` by mean document length in tokens; empty where nothing is uneven.

    Without document masks every rank has the same work: chunk r from the front of a sequence goes
    together with chunk r from its end.
    """
    cp, sequence = config.parallel.cp, config.train.seq_length
    if cp == 1 or not config.data.document_mask:
        return {}
    lengths = (max(1, sequence // share) for share in SHARES)
    return {length: slowest_over_mean(sequence, cp, length) for length in lengths}


def slowest_over_mean(sequence: int, cp: int, document: float) -> float:
    """Attention of the rank with most of it, in that of the mean rank.

    Of sequences of `sequence` tokens packed with documents of geometric lengths, `document` tokens
    on average, that do not see each other. Work is counted in pairs of a query and a key it sees,
    and compared sequence by sequence: ranks wait for one another in each.
    """
    random = np.random.default_rng(0)
    edges = np.linspace(0, sequence, 2 * cp + 1, dtype=np.int64)
    found = []
    for _ in range(SEQUENCES):
        ends = [0]
        while ends[-1] < sequence:
            ends.extend(ends[-1] + random.geometric(1 / document, size=1024).cumsum())
        starts = np.array(ends)
        chunks = np.diff(_pairs_before(edges, starts[starts < sequence]))
        ranks = chunks[:cp] + chunks[cp:][::-1]
        found.append(ranks.max() / ranks.mean())
    return float(np.mean(found))


def _pairs_before(edges: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Pairs of all queries before every edge, with documents from `starts` on."""
    lengths = np.diff(starts)
    whole = np.concatenate([[0], np.cumsum(lengths * (lengths + 1) // 2)])
    document = np.searchsorted(starts, edges, side="right") - 1
    inside = edges - starts[document]
    return whole[document] + inside * (inside + 1) // 2
