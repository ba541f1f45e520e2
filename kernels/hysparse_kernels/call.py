"""One call of an attention operation, checked once: what dispatch hands to a backend.

Shapes: B batch, S queries of a row, Sk keys of a row, HQ query heads, HKV KV groups, D query/key
head dim, DV value head dim, N blocks, K selected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.arguments import (
    check_at_least,
    check_block_indices,
    check_cu_seqlens,
    check_lists,
    check_qkv,
    check_sink,
)
from hysparse_kernels.block_lists import BlockLists
from hysparse_kernels.query_range import QueryRange

ReduceScores = Callable[[Tensor], Tensor]


class OracleOutput(NamedTuple):
    """What a full-attention layer computes.

    ``output`` [B, S, HQ, DV] in the query's dtype; ``lse`` [B, HQ, S] in fp32 (fp64 for fp64
    inputs), natural log, without gradient; ``block_indices`` int32 [B, HKV, S, K], ids ascending
    and -1 padding last, or None when nothing was selected.
    """

    output: Tensor
    lse: Tensor
    block_indices: Tensor | None


@dataclass(frozen=True)
class SelectionRule:
    """How blocks are selected; the fields are the arguments of ``oracle_attention``."""

    block_size: int
    num_selected: int
    forced_first_blocks: int = 0
    forced_recent_blocks: int = 0
    reduce_scores: ReduceScores | None = None

    def check(self) -> None:
        """Raises ValueError for numbers that do not fit."""
        first, recent = self.forced_first_blocks, self.forced_recent_blocks
        check_at_least(1, block_size=self.block_size, num_selected=self.num_selected)
        check_at_least(0, forced_first_blocks=first, forced_recent_blocks=recent)
        if first + recent > self.num_selected:
            raise ValueError(
                f"forced blocks: got {first} first and {recent} recent,"
                f" expected at most num_selected = {self.num_selected} together"
            )


@dataclass(frozen=True)
class CausalKeys:
    """All keys up to the query's; with ``select`` blocks are selected by ``rule``."""

    rule: SelectionRule
    select: bool = True


@dataclass(frozen=True)
class SelectedKeys:
    """Keys of the blocks that ``block_indices`` int32 [B, HKV, S, K] name, up to the query's."""

    block_indices: Tensor
    block_size: int
    lists: BlockLists | None = None
    """Made of these very indices; None where they are still to be built."""


@dataclass(frozen=True)
class WindowKeys:
    """The last ``window`` keys, the query's own included."""

    window: int


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one call. Raises ValueError where shapes, dtypes or numbers do not fit."""

    query: Tensor
    """[B, S, HQ, D], any strides; key, value and it share one float dtype and device."""
    key: Tensor
    """[B, Sk, HKV, D]."""
    value: Tensor
    """[B, Sk, HKV, DV]."""
    keys: CausalKeys | SelectedKeys | WindowKeys
    """Which keys a query sees; causality comes on top."""
    sink: Tensor | None = None
    """[HQ], one more logit per head that enters the denominator only."""
    softmax_scale: float | None = None
    cu_seqlens: Tensor | None = None
    """int32 [documents + 1] of packed documents; see documents.py."""
    accumulate: KeyValueGradients | None = None
    """Gets the gradients of key and value in place of autograd."""
    query_start: int = 0
    """Position of a row's first query among its keys."""
    query_chunk: int = 256
    """Queries that the reference works on at a time."""

    def __post_init__(self) -> None:
        check_at_least(1, query_chunk=self.query_chunk)
        check_at_least(0, query_start=self.query_start)
        check_qkv(self.query, self.key, self.value, self.query_start)
        check_cu_seqlens(self.cu_seqlens, self.query, *self.key.shape[:2])
        check_sink(self.sink, self.query)
        if self.accumulate is not None:
            self.accumulate.check_attached()
        match self.keys:
            case CausalKeys(rule):
                rule.check()
            case SelectedKeys(indices, block_size, lists):
                check_at_least(1, block_size=block_size)
                check_block_indices(indices, self.query, self.key, block_size)
                if lists is not None:
                    check_lists(
                        lists, indices, self.query, block_size, self.cu_seqlens, self.queries
                    )
            case WindowKeys(window):
                check_at_least(1, window=window)

    @cached_property
    def queries(self) -> QueryRange | None:
        """Which positions the queries are; None for all of the row."""
        return QueryRange.of(self.query_start, self.query.shape[1], self.key.shape[1])

    @property
    def scale(self) -> float:
        """Factor on query . key."""
        return self.query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def block_size(self) -> int | None:
        """Tokens per block, of a selection that is made or read."""
        match self.keys:
            case CausalKeys(rule, select=True):
                return rule.block_size
            case SelectedKeys(block_size=block_size):
                return block_size
        return None

    @property
    def head_dim(self) -> int:
        """The larger one of D and DV."""
        return max(self.query.shape[-1], self.value.shape[-1])
