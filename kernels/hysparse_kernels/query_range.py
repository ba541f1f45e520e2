"""Queries that are a range of a row's positions: what context parallelism and chunked prefill ask.

A call has Sq queries and Sk keys in each of B rows; query i of a row stands at position start + i
of it and sees no key after that. Packed documents (see documents.py) are counted in the B * Sk
keys; kernels see the queries of all rows as one row of B * Sq of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryRange:
    """Where the queries of a row stand among its keys."""

    start: int
    """Position of a row's first query."""
    queries: int
    """Sq, of a row."""
    keys: int
    """Sk, of a row."""

    @classmethod
    def of(cls, start: int, queries: int, keys: int) -> QueryRange | None:
        """The range, or None if it is all of the row, which needs no shifting."""
        return None if start == 0 and queries == keys else cls(start, queries, keys)

    @property
    def stop(self) -> int:
        """One past the position of a row's last query."""
        return self.start + self.queries

    @property
    def gap(self) -> int:
        """Keys of a row beyond its queries: how much further behind every next row's stand."""
        return self.keys - self.queries

    @staticmethod
    def arguments(queries: QueryRange | None) -> tuple[int, int, int]:
        """query_start, queries and gap for Triton's kernels, which read none of them of None."""
        return (0, 0, 0) if queries is None else (queries.start, queries.queries, queries.gap)

    def positions(self, queries: int, device: torch.device) -> Tensor:
        """int32 [queries]: where each of the rows' queries stands in the rows' keys."""
        query = torch.arange(queries, dtype=torch.int32, device=device)
        return query + self.start + query // self.queries * self.gap

    def queries_from(self, keys: Tensor) -> Tensor:
        """Of places in the rows' keys, 0 up to B * Sk: the first query at or after each in its row,
        or where the next row's queries begin."""
        row = keys // self.keys
        inside = (keys - row * self.keys - self.start).clamp(0, self.queries)
        return row * self.queries + inside
