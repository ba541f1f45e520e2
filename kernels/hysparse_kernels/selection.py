"""Numbers that describe a selection, for metrics and tests; none carries gradient.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, K selected.
"""

import torch
from torch import Tensor

from hysparse_kernels._reference_attention import Visibility, chunked_attention
from hysparse_kernels.documents import document_starts_in_rows


@torch.no_grad()
def neighbour_agreement(block_indices: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean share of a token's selected blocks that the token before it selected too.

    Args:
        block_indices: int32 [B, HKV, S, K] without duplicates, -1 padding; S at least 2.
        cu_seqlens: int32 [documents + 1] of packed documents, whose first tokens are left out.

    Returns:
        Scalar fp32 in [0, 1], 0 where no document has two tokens. High agreement is what lets a
        kernel share loads between tokens.
    """
    before, after = block_indices[:, :, :-1], block_indices[:, :, 1:]
    also_before = torch.zeros_like(after, dtype=torch.bool)
    for slot in range(before.shape[-1]):
        also_before |= after == before[..., slot : slot + 1]
    counted = after >= 0
    share = (also_before & counted).sum(-1) / counted.sum(-1).clamp_min(1)
    share = share.float()
    if cu_seqlens is None:
        return share.mean()
    batch, groups, sequence, _ = block_indices.shape
    starts = document_starts_in_rows(cu_seqlens, batch, sequence)
    same = (starts[:, 1:] == starts[:, :-1]).unsqueeze(1).expand(-1, groups, -1)
    return (share * same).sum() / same.sum().clamp_min(1)


@torch.no_grad()
def selected_mass(
    query: Tensor,
    key: Tensor,
    block_indices: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    query_chunk: int = 256,
) -> Tensor:
    """Share of the full softmax that falls on the selected blocks, per head and token.

    Args:
        query: [B, S, HQ, D] of the oracle layer; key: [B, S, HKV, D] of the same layer.
        block_indices: int32 [B, HKV, S, K].
        lse: [B, HQ, S] as ``oracle_attention`` returned it.
        block_size: tokens per block.
        softmax_scale: the oracle's, default D ** -0.5.
        cu_seqlens: the oracle's.
        query_chunk: queries worked on at a time.

    Returns:
        [B, HQ, S] in lse's dtype, in [0, 1] up to rounding.
    """
    starts = None
    if cu_seqlens is not None:
        starts = document_starts_in_rows(cu_seqlens, *query.shape[:2])
    selected = chunked_attention(
        query,
        key,
        key[..., :1],
        visibility=Visibility(block_size=block_size, document_start=starts),
        softmax_scale=softmax_scale,
        query_chunk=query_chunk,
        block_indices=block_indices,
    )
    return torch.exp(selected.lse - lse)
