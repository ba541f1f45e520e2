"""The specification of the attention operations of HySparse (P1 = arXiv 2602.03560).

Plain PyTorch on any device and in any float dtype. Scores, softmax and accumulation are fp32, or
fp64 when the inputs are fp64. Memory is linear in S for a fixed ``query_chunk``, in the forward and
in the backward. With ``cu_seqlens`` (see documents.py) nothing crosses a document. Arguments are
validated by the public functions in dispatch.py, not here.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, G = HQ // HKV heads per group (head h
belongs to group h // G), D query/key head dim, DV value head dim (may differ from D),
N = ceil(S / block_size) blocks, K selected.
"""

from typing import NamedTuple

from torch import Tensor

from hysparse_kernels._reference_attention import Visibility, chunked_attention
from hysparse_kernels._reference_selection import (
    BlockSelector,
    ReduceScores,
    SelectionRule,
    block_topk,
)
from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.documents import document_starts_in_rows

__all__ = [
    "OracleOutput",
    "ReduceScores",
    "block_sparse_attention",
    "block_topk",
    "oracle_attention",
    "sliding_window_attention",
]


class OracleOutput(NamedTuple):
    """What a full-attention layer computes.

    ``output`` [B, S, HQ, DV] in the query's dtype; ``lse`` [B, HQ, S] in fp32 (fp64 for fp64
    inputs), natural log, without gradient; ``block_indices`` int32 [B, HKV, S, K], ids ascending
    and -1 padding last, or None when nothing was selected.
    """

    output: Tensor
    lse: Tensor
    block_indices: Tensor | None


def oracle_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    num_selected: int,
    softmax_scale: float | None = None,
    reduce_scores: ReduceScores | None = None,
    forced_first_blocks: int = 0,
    forced_recent_blocks: int = 0,
    select: bool = True,
    cu_seqlens: Tensor | None = None,
    query_chunk: int = 256,
) -> OracleOutput:
    """Causal attention (P1 Eq. 2) that also selects K blocks per token and group (P1 Eq. 3)."""
    starts = _document_starts(cu_seqlens, query)
    selector = None
    if select:
        rule = SelectionRule(
            block_size, num_selected, forced_first_blocks, forced_recent_blocks, reduce_scores
        )
        batch, length = query.shape[:2]
        selector = BlockSelector(rule, batch, key.shape[2], length, query.device, starts)
    output, lse = chunked_attention(
        query,
        key,
        value,
        visibility=Visibility(document_start=starts),
        softmax_scale=softmax_scale,
        query_chunk=query_chunk,
        selector=selector,
    )
    return OracleOutput(output, lse, selector.block_indices if selector else None)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    accumulate: KeyValueGradients | None = None,
    query_chunk: int = 256,
) -> Tensor:
    """Causal attention to the tokens of the selected blocks (P1 Eq. 6-7): [B, S, HQ, DV]."""
    return chunked_attention(
        query,
        key,
        value,
        visibility=Visibility(
            block_size=block_size, document_start=_document_starts(cu_seqlens, query)
        ),
        softmax_scale=softmax_scale,
        query_chunk=query_chunk,
        sink=sink,
        block_indices=block_indices,
        accumulate=accumulate,
    ).output


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    query_chunk: int = 256,
) -> Tensor:
    """Causal attention to the last ``window`` tokens, the own one included (P1 Eq. 5)."""
    return chunked_attention(
        query,
        key,
        value,
        visibility=Visibility(window=window, document_start=_document_starts(cu_seqlens, query)),
        softmax_scale=softmax_scale,
        query_chunk=query_chunk,
        sink=sink,
    ).output


def _document_starts(cu_seqlens: Tensor | None, query: Tensor) -> Tensor | None:
    batch, length = query.shape[:2]
    return None if cu_seqlens is None else document_starts_in_rows(cu_seqlens, batch, length)
