"""The specification of the attention operations of HySparse (P1 = arXiv 2602.03560).

Causal grouped-query attention in plain PyTorch on any device and in any float dtype, one chunk of
queries at a time, with a recomputing backward. Scores, softmax and accumulation are fp32, or fp64
when the inputs are fp64. Kept for the backward are query, key, value and lse, and nothing of size
S x S: a chunk's logits live only while that chunk is worked on, in the forward and again in the
backward. The backward is written out rather than left to a checkpoint of the forward: dK and dV are
accumulated in the compute dtype over all chunks and nothing that happens once (the selection of
blocks) can be run again by it.

Shapes: B batch, S queries of a row, Sk keys of a row, HQ query heads, HKV KV groups,
G = HQ // HKV heads per group, D query/key head dim, DV value head dim, N blocks, K selected,
C queries of a chunk, L keys that this chunk may see.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.call import AttentionCall, CausalKeys, OracleOutput, SelectedKeys, WindowKeys
from hysparse_kernels.documents import blocks_in_documents, document_starts_in_rows
from hysparse_kernels.reference.selection import BlockSelector


@dataclass(frozen=True)
class Visibility:
    """Which keys j a query at position t may see, beside the causal j <= t.

    ``window``: only the last ``window`` tokens, t - window < j <= t.
    ``block_size``: only tokens of the blocks that the block indices name, in tokens per block.
    At most one of the two is set; neither means plain causal attention.
    ``document_start``: int64 [B, Sk], the first token of every token's document within its batch
    row; only keys of the query's document are visible, and blocks count from its start.
    ``query_start``: the position of the first query.
    """

    window: int | None = None
    block_size: int | None = None
    document_start: Tensor | None = None
    query_start: int = 0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 inputs are computed in fp64, all others in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(call: AttentionCall) -> OracleOutput:
    """The attention of a call (P1 Eq. 2, 5-7) and, of causal keys, the selection (P1 Eq. 3)."""
    query, key = call.query, call.key
    batch, length = key.shape[:2]
    starts: Tensor | None = None
    block_indices: Tensor | None = None
    selector: BlockSelector | None = None
    if call.cu_seqlens is not None:
        starts = document_starts_in_rows(call.cu_seqlens, batch, length)
    start = call.query_start
    visibility = Visibility(document_start=starts, query_start=start)
    match call.keys:
        case CausalKeys(rule, select=True):
            selector = BlockSelector(
                rule, batch, key.shape[2], query.shape[1], query.device, starts, start
            )
        case SelectedKeys(indices, block_size):
            block_indices = indices
            visibility = replace(visibility, block_size=block_size)
        case WindowKeys(window):
            visibility = replace(visibility, window=window)
    output, lse = _ChunkedAttention.apply(  # type: ignore[no-untyped-call]
        query, key, call.value, call.sink, block_indices, visibility, call.scale, call.query_chunk,
        selector, call.accumulate,
    )  # fmt: skip
    return OracleOutput(output, lse, selector.block_indices if selector else None)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        block_indices: Tensor | None,
        visibility: Visibility,
        scale: float,
        query_chunk: int,
        selector: BlockSelector | None,
        accumulate: KeyValueGradients | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(query.dtype)
        batch, length, heads, _ = query.shape
        groups = key.shape[2]
        output = query.new_empty(batch, length, heads, value.shape[-1])
        lse = query.new_empty(batch, heads, length, dtype=dtype)
        # Autocast would otherwise turn the fp32 matmuls below into half precision.
        with torch.autocast(query.device.type, enabled=False):
            keys, values = _heads_first(key, dtype), _heads_first(value, dtype)
            sink_logit = sink_per_group(sink, groups, dtype)
            for start, stop in chunks(length, query_chunk):
                first, last, hidden = _visible_keys(visibility, start, stop, block_indices, query)
                rows = group_rows(query[:, start:stop], groups, dtype)
                logits = masked_logits(rows * scale, keys[:, :, first:last], hidden, heads)
                block_maxima = selector.block_maxima(logits) if selector else None

                mixed, chunk_lse = softmax_mix(logits, values[:, :, first:last], sink_logit)
                output[:, start:stop] = ungroup_rows(mixed, heads)
                lse[:, :, start:stop] = chunk_lse.flatten(1, 2)
                if selector is not None and block_maxima is not None:
                    selector.select(start, stop, block_maxima, chunk_lse)

        ctx.save_for_backward(query, key, value, sink, block_indices, lse)
        ctx.visibility, ctx.scale, ctx.query_chunk = visibility, scale, query_chunk
        ctx.accumulate = accumulate
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sink, block_indices, lse = ctx.saved_tensors
        dtype = compute_dtype(query.dtype)
        length, heads, groups = query.shape[1], query.shape[2], key.shape[2]
        grad_query = torch.empty_like(query)
        with torch.autocast(query.device.type, enabled=False):
            keys, values = _heads_first(key, dtype), _heads_first(value, dtype)
            grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
            sink_logit = sink_per_group(sink, groups, dtype)
            grad_sink = None if sink_logit is None else torch.zeros_like(sink_logit)
            for start, stop in chunks(length, ctx.query_chunk):
                first, last, hidden = _visible_keys(
                    ctx.visibility, start, stop, block_indices, query
                )
                rows = group_rows(query[:, start:stop], groups, dtype) * ctx.scale
                grad_rows = group_rows(grad_output[:, start:stop], groups, dtype)
                chunk_keys = keys[:, :, first:last]

                logits = masked_logits(rows, chunk_keys, hidden, heads)
                chunk_lse = _lse_per_group(lse[:, :, start:stop], groups)
                chunk_lse = chunk_lse.masked_fill(chunk_lse == -torch.inf, 0.0)
                probs = logits.sub_(chunk_lse).exp_().flatten(2, 3)
                grad_values[:, :, first:last] += probs.transpose(-1, -2) @ grad_rows

                # Softmax backward: dlogit = p * (dp - sum_j p_j dp_j), in place in dp.
                grad_logits = (grad_rows @ values[:, :, first:last].transpose(-1, -2)).mul_(probs)
                delta = grad_logits.sum(-1, keepdim=True)
                grad_logits.addcmul_(probs, delta, value=-1.0)
                grad_keys[:, :, first:last] += grad_logits.transpose(-1, -2) @ rows
                grad_rows_query = (grad_logits @ chunk_keys) * ctx.scale
                grad_query[:, start:stop] = ungroup_rows(grad_rows_query, heads)
                if sink_logit is not None and grad_sink is not None:
                    sink_probs = torch.exp(sink_logit - chunk_lse)
                    pull = sink_probs * delta.view_as(chunk_lse)
                    grad_sink -= pull.sum((0, 3), keepdim=True)
        grad_key, grad_value = grad_keys.transpose(1, 2), grad_values.transpose(1, 2)
        if ctx.accumulate is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            ctx.accumulate.add(grad_key, grad_value)
        return (
            grad_query,
            None if ctx.accumulate is not None else grad_key.to(key.dtype),
            None if ctx.accumulate is not None else grad_value.to(value.dtype),
            None if grad_sink is None else grad_sink.flatten().to(sink.dtype),
            *([None] * 6),
        )


def softmax_mix(logits: Tensor, values: Tensor, sink_logit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values weighted by the softmax of `logits` [B, HKV, G, C, L], which is overwritten.

    `values` [B, HKV, L, DV] and the sink [1, HKV, G, 1, 1] are of the logits' dtype. Returns the
    mixed rows [B, HKV, G * C, DV], 0 where nothing is visible, and lse [B, HKV, G, C].
    """
    pivot = logits.amax(-1, keepdim=True)
    if sink_logit is not None:
        pivot = torch.maximum(pivot, sink_logit)
    # A row that sees nothing has pivot -inf; any finite one makes its weights 0.
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    weights = logits.sub_(pivot).exp_()
    total = weights.sum(-1, keepdim=True)
    if sink_logit is not None:
        total = total + torch.exp(sink_logit - pivot)
    lse = (pivot + total.log()).squeeze(-1)
    mixed = weights.flatten(2, 3) @ values
    # total >= 1 wherever anything is visible (the pivot itself counts exp(0)).
    return mixed / total.flatten(2, 3).clamp_min(1.0), lse


def chunks(length: int, query_chunk: int) -> list[tuple[int, int]]:
    """First and one past the last query of each chunk."""
    return [(start, min(start + query_chunk, length)) for start in range(0, length, query_chunk)]


def _heads_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S, HKV, X] -> contiguous [B, HKV, S, X], so that slices over S feed a batched matmul."""
    return tensor.transpose(1, 2).to(dtype).contiguous()


def group_rows(tensor: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[B, C, HQ, X] -> [B, HKV, G * C, X]: all heads of a group in one matmul against its keys."""
    batch, queries, heads, width = tensor.shape
    grouped = tensor.view(batch, queries, groups, heads // groups, width)
    return grouped.permute(0, 2, 3, 1, 4).to(dtype).flatten(2, 3)


def ungroup_rows(rows: Tensor, heads: int) -> Tensor:
    """[B, HKV, G * C, X] -> [B, C, HQ, X]."""
    batch, groups, _, width = rows.shape
    grouped = rows.view(batch, groups, heads // groups, -1, width)
    return grouped.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _lse_per_group(lse: Tensor, groups: int) -> Tensor:
    """[B, HQ, C] -> [B, HKV, G, C, 1]."""
    batch, heads, queries = lse.shape
    return lse.view(batch, groups, heads // groups, queries, 1)


def sink_per_group(sink: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor | None:
    """[HQ] -> [1, HKV, G, 1, 1]."""
    return None if sink is None else sink.to(dtype).view(1, groups, -1, 1, 1)


def masked_logits(rows: Tensor, keys: Tensor, hidden: Tensor, heads: int) -> Tensor:
    """Logits [B, HKV, G, C, L] of scaled query rows; ``hidden`` covers the last keys of the L."""
    batch, groups, num_keys, _ = keys.shape
    logits = (rows @ keys.transpose(-1, -2)).view(batch, groups, heads // groups, -1, num_keys)
    logits[..., num_keys - hidden.shape[-1] :].masked_fill_(hidden, -torch.inf)
    return logits


def _visible_keys(
    visibility: Visibility, start: int, stop: int, block_indices: Tensor | None, like: Tensor
) -> tuple[int, int, Tensor]:
    """First key that queries [start, stop) touch and one past the last, and what they must hide.

    The mask is True where hidden, broadcasts to [B, HKV, G, C, M] and covers the last M of these
    keys: a causal chunk of a single document has nothing to hide before its own tokens.
    """
    chosen = None if block_indices is None else block_indices[:, :, start:stop]
    start, stop = start + visibility.query_start, stop + visibility.query_start
    queries = torch.arange(start, stop, device=like.device).unsqueeze(1)
    first = 0
    if visibility.window is not None:
        first = max(0, start - visibility.window + 1)
        keys = torch.arange(first, stop, device=like.device)
        hidden = (keys > queries) | (keys <= queries - visibility.window)
    elif chosen is not None:
        hidden = _hidden_by_selection(visibility, stop, chosen)
        hidden[..., start:] |= queries.transpose(0, 1) > queries
        hidden = hidden.unsqueeze(2)
    else:
        hidden = queries.transpose(0, 1) > queries
    starts = visibility.document_start
    if starts is None:
        return first, stop, hidden
    foreign = (starts[:, start:stop, None] != starts[:, None, first:stop])[:, None, None]
    hidden = torch.nn.functional.pad(hidden, (foreign.shape[-1] - hidden.shape[-1], 0))
    return first, stop, foreign | hidden


def _hidden_by_selection(visibility: Visibility, stop: int, block_indices: Tensor) -> Tensor:
    """[B, HKV, C, stop]: keys before `stop` of the blocks that C queries did not select."""
    size = cast(int, visibility.block_size)
    num_blocks = -(-stop // size)
    ids = block_indices.long()
    # One column more than there are blocks takes the -1 padding and blocks of the future, and is
    # dropped. Writing True twice is writing it once, so an id that stands twice in a row counts
    # once.
    chosen = ids.new_zeros((*ids.shape[:-1], num_blocks + 1), dtype=torch.bool)
    chosen.scatter_(-1, ids.masked_fill(ids < 0, num_blocks).clamp(max=num_blocks), True)
    block = blocks_in_documents(visibility.document_start, stop, size, ids.device)
    return ~chosen.gather(-1, block[:, None, None].expand(*ids.shape[:-1], stop))
