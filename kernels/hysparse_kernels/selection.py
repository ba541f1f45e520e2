"""Numbers that describe a selection, for metrics and tests; none carries gradient.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, K selected,
P queries of a sample.
"""

import torch
from torch import Tensor

from hysparse_kernels.call import AttentionCall, SelectedKeys
from hysparse_kernels.documents import blocks_in_documents, document_starts_in_rows
from hysparse_kernels.reference.attention import attend, compute_dtype


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
    share = shared_blocks(block_indices[:, :, :-1], block_indices[:, :, 1:])
    if cu_seqlens is None:
        return share.mean()
    batch, groups, sequence, _ = block_indices.shape
    starts = document_starts_in_rows(cu_seqlens, batch, sequence)
    same = (starts[:, 1:] == starts[:, :-1]).unsqueeze(1).expand(-1, groups, -1)
    return (share * same).sum() / same.sum().clamp_min(1)


@torch.no_grad()
def shared_blocks(before: Tensor, after: Tensor) -> Tensor:
    """Share of the blocks of `after` that `before` holds too: int32 [..., K] twice to fp32 [...].

    Ids without duplicates, -1 padding; 0 where `after` has none.
    """
    also_before = torch.zeros_like(after, dtype=torch.bool)
    for slot in range(before.shape[-1]):
        also_before |= after == before[..., slot : slot + 1]
    counted = after >= 0
    share = (also_before & counted).sum(-1) / counted.sum(-1).clamp_min(1)
    return share.float()


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
    call = AttentionCall(
        query,
        key,
        key[..., :1],
        SelectedKeys(block_indices, block_size),
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        query_chunk=query_chunk,
    )
    return torch.exp(attend(call).lse - lse)


@torch.no_grad()
def selected_mass_of_sample(
    query: Tensor,
    key: Tensor,
    block_indices: Tensor,
    positions: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`selected_mass` of some queries, for which no lse is at hand: the full softmax is computed.

    Args:
        query: [B, P, HQ, D] of the oracle layer, at `positions`; key: [B, S, HKV, D] of all tokens.
        block_indices: int32 [B, HKV, P, K], at `positions`.
        positions: int64 [P], of the queries in their row.
        block_size: tokens per block.
        softmax_scale: the oracle's, default D ** -0.5.
        cu_seqlens: the oracle's.

    Returns:
        [B, HQ, P] in fp32 (fp64 for fp64 inputs), in [0, 1] up to rounding. The logits of one KV
        group, HQ / HKV * P * S numbers a row, live at a time.
    """
    batch, length, groups, width = key.shape
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    dtype = compute_dtype(query.dtype)
    starts = None
    tokens = torch.arange(length, device=key.device)
    hidden = (tokens > positions.unsqueeze(-1)).expand(batch, -1, -1)
    if cu_seqlens is not None:
        starts = document_starts_in_rows(cu_seqlens, batch, length)
        hidden = hidden | (tokens < starts[:, positions].unsqueeze(-1))
    block = blocks_in_documents(starts, length, block_size, key.device).expand(batch, -1)
    num_blocks = -(-length // block_size)
    rows = query.unflatten(2, (groups, -1)).to(dtype) * scale  # [B, P, HKV, G, D]
    shares = []
    for group in range(groups):
        ids = block_indices[:, group].long()
        chosen = ids.new_zeros((*ids.shape[:-1], num_blocks + 1), dtype=torch.bool)
        chosen.scatter_(-1, ids.masked_fill(ids < 0, num_blocks), True)
        read = chosen.gather(-1, block.unsqueeze(1).expand(-1, ids.shape[1], -1))  # [B, P, S]
        logits = torch.einsum("bpgd,bsd->bgps", rows[:, :, group], key[:, :, group].to(dtype))
        logits = logits.masked_fill(hidden.unsqueeze(1), -torch.inf)
        lse = logits.logsumexp(-1)
        selected = logits.masked_fill(~read.unsqueeze(1), -torch.inf).logsumexp(-1)
        shares.append(torch.exp(selected - lse))
    return torch.cat(shares, dim=1)


def has_a_choice(
    positions: Tensor,
    num_selected: int,
    *,
    block_size: int,
    batch: int,
    sequence: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Which queries see more blocks than they may select: bool [B, P] for positions int64 [P].

    The others read everything, so that their selection says nothing.
    """
    starts = None if cu_seqlens is None else document_starts_in_rows(cu_seqlens, batch, sequence)
    block = blocks_in_documents(starts, sequence, block_size, positions.device)
    return (block[:, positions] >= num_selected).expand(batch, -1)
