"""Attention of new tokens to a cache: one operation per kind of layer, no gradients.

Each operation stores the new tokens' keys and values in the layer's cache, then attends: so a
token reads of its own chunk what later ones will read, and the cut into chunks changes no result
beyond rounding. What follows is the specification, in plain PyTorch: scores, softmax and
accumulation are fp32 (fp64 for fp64 queries), and the selection is by the code that the training
operations use. Steps of one token a row may run on the kernels of decode/.

Shapes: A rows of the step, C columns, HQ query heads, HKV KV groups, G = HQ // HKV heads per
group, D query/key head dim, DV value head dim, N blocks of the longest row, K selected, L keys, M
keys of the selected blocks. P1 = HySparse, arXiv 2602.03560.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hysparse_kernels.backends import BackendChoice, choose
from hysparse_kernels.call import ReduceScores, SelectionRule
from hysparse_kernels.gating import gated_sum
from hysparse_kernels.key_value_cache import Chunk, TokenCache, WindowCache
from hysparse_kernels.reference.attention import (
    chunks,
    compute_dtype,
    group_rows,
    masked_logits,
    sink_per_group,
    softmax_mix,
    ungroup_rows,
)
from hysparse_kernels.reference.selection import dense_block_maxima, group_scores, select_blocks

_GATHERED_BYTES = 2**26
"""What the keys and values that some queries selected may take at a time."""


class CachedFullOutput(NamedTuple):
    """`output` [A, C, HQ, DV] in the query's dtype; `block_indices` int32 [A, HKV, C, K], ascending
    with -1 last, or None when nothing was selected."""

    output: Tensor
    block_indices: Tensor | None


def resolve_cached_backend(
    backend: str,
    query: Tensor,
    chunk: Chunk,
    *caches: TokenCache | WindowCache,
    block_size: int | None = None,
) -> BackendChoice:
    """Which backend ``backend`` means for query [A, C, HQ, D], what it reads, and why.

    "auto" takes triton for steps of one token a row (C = 1) where it can run, else the reference.
    "triton" takes it for the same steps. Chunks of more tokens always run on the reference: there
    is nothing else that could.

    Raises:
        ValueError: ``backend`` is none of `BACKENDS`.
        BackendUnavailable: ``backend`` is "triton", and C = 1, which it cannot take.
    """

    def why_not() -> str | None:
        try:
            from hysparse_kernels.decode import launch
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        return launch.why_not(query, caches, block_size)

    if chunk.width == 1 or backend not in ("auto", "triton"):
        return choose(backend, why_not, lambda: f"Triton decode kernels on {query.device.type}")
    reason = f"the Triton kernels take one new token a row, not {chunk.width}"
    return BackendChoice("reference", f"plain PyTorch: {reason}")


@torch.no_grad()
def cached_full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: TokenCache,
    chunk: Chunk,
    *,
    block_size: int,
    num_selected: int,
    softmax_scale: float | None = None,
    reduce_scores: ReduceScores | None = None,
    forced_first_blocks: int = 0,
    forced_recent_blocks: int = 0,
    select: bool = True,
    query_chunk: int = 256,
    backend: str = "auto",
) -> CachedFullOutput:
    """Causal attention to all tokens of a sequence (P1 Eq. 2), selecting K blocks (Eq. 3).

    Args:
        query: [A, C, HQ, D] of the new tokens.
        key, value: [A, C, HKV, D] and [A, C, HKV, DV], which are stored.
        cache: of this layer.
        chunk: which tokens of which sequences these are.
        block_size, num_selected, softmax_scale, reduce_scores, forced_first_blocks,
        forced_recent_blocks, select: as those of `oracle_attention`.
        query_chunk: queries of one row worked on at a time.
        backend: see ``resolve_cached_backend``.

    Returns:
        Output and selection; columns without a token are 0 and hold any valid selection.

    Raises:
        ValueError: the cache has no room.
        BackendUnavailable: the backend cannot be used.
    """
    rule = SelectionRule(
        block_size, num_selected, forced_first_blocks, forced_recent_blocks, reduce_scores
    )
    read = block_size if select else None
    if _uses_triton(backend, query, chunk, cache, block_size=read):
        from hysparse_kernels.decode import launch

        scale = _scale(query, softmax_scale)
        result = launch.full_attention(
            query, key, value, cache, chunk, rule=rule if select else None, scale=scale
        )
        return CachedFullOutput(*result)
    cache.append(chunk, key, value)
    dtype = compute_dtype(query.dtype)
    heads, groups = query.shape[2], key.shape[2]
    scale = _scale(query, softmax_scale)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    num_blocks = -(-max(past + new for _, _, past, new in chunk.spans) // block_size)
    scores = query.new_full(
        (len(chunk.rows), groups, chunk.width, num_blocks), -torch.inf, dtype=dtype
    )
    for i, row, past, new in chunk.spans:
        keys, values = cache.read(row, past + new, dtype)
        for start, stop in chunks(new, query_chunk):
            seen = past + stop
            rows = group_rows(query[i : i + 1, start:stop], groups, dtype) * scale
            hidden = _later(stop - start, query.device)
            logits = masked_logits(rows, keys[:, :, :seen], hidden, heads)
            maxima = dense_block_maxima(logits, block_size, num_blocks) if select else None
            mixed, lse = softmax_mix(logits, values[:, :, :seen], None)
            output[i, start:stop] = ungroup_rows(mixed, heads)[0]
            if maxima is not None:
                scores[i, :, start:stop] = group_scores(maxima, lse)[0]
    if not select:
        return CachedFullOutput(output, None)
    own = chunk.positions[:, None, :, None] // block_size
    return CachedFullOutput(output, select_blocks(rule, scores, own))


@torch.no_grad()
def cached_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_gate: Tensor,
    window_gate: Tensor,
    oracle: TokenCache,
    block_indices: Tensor,
    cache: WindowCache,
    chunk: Chunk,
    *,
    block_size: int,
    window: int,
    sparse_sink: Tensor | None = None,
    window_sink: Tensor | None = None,
    softmax_scale: float | None = None,
    query_chunk: int = 256,
    backend: str = "auto",
) -> Tensor:
    """The gated sum of attention to selected blocks and to a window (P1 Eq. 5-9): [A, C, HQ, DV].

    Args:
        query: [A, C, HQ, D] of the new tokens.
        key, value: [A, C, HKV, D] and [A, C, HKV, DV] of the window, which are stored.
        sparse_gate, window_gate: logits [A, C, HQ, 1 or DV].
        oracle: the cache of the full layer that selected; it holds the new tokens already.
        block_indices: int32 [A, HKV, C, K] as `cached_full_attention` returned them.
        cache: this layer's own window.
        chunk: which tokens of which sequences these are.
        block_size, window: in tokens.
        sparse_sink, window_sink: [HQ] or None.
        softmax_scale: default D ** -0.5.
        query_chunk: queries of one row worked on at a time.
        backend: see ``resolve_cached_backend``.

    Raises:
        BackendUnavailable: the backend cannot be used.
    """
    if _uses_triton(backend, query, chunk, oracle, cache, block_size=block_size):
        from hysparse_kernels.decode import launch

        return launch.sparse_attention(
            query,
            key,
            value,
            (sparse_gate, window_gate),
            oracle,
            block_indices,
            cache,
            chunk,
            block_size=block_size,
            window=window,
            sinks=(sparse_sink, window_sink),
            scale=_scale(query, softmax_scale),
        )
    sparse = _block_sparse(
        query, oracle, block_indices, chunk, block_size, sparse_sink, softmax_scale
    )
    near = cached_window_attention(
        query,
        key,
        value,
        cache,
        chunk,
        window=window,
        sink=window_sink,
        softmax_scale=softmax_scale,
        query_chunk=query_chunk,
        backend="reference",
    )
    return gated_sum(sparse, near, sparse_gate, window_gate, backend="reference").to(query.dtype)


@torch.no_grad()
def cached_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: WindowCache,
    chunk: Chunk,
    *,
    window: int,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    query_chunk: int = 256,
    backend: str = "auto",
) -> Tensor:
    """Causal attention to the last `window` tokens (P1 Eq. 5): [A, C, HQ, DV].

    Arguments as those of `cached_sparse_attention`. The ring may be shorter than the window if no
    sequence grows beyond it.
    """
    if _uses_triton(backend, query, chunk, cache):
        from hysparse_kernels.decode import launch

        return launch.window_attention(
            query,
            key,
            value,
            cache,
            chunk,
            window=window,
            sink=sink,
            scale=_scale(query, softmax_scale),
        )
    dtype = compute_dtype(query.dtype)
    heads, groups = query.shape[2], key.shape[2]
    scale = _scale(query, softmax_scale)
    sink_logit = sink_per_group(sink, groups, dtype)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for i, row, past, new in chunk.spans:
        older = min(past, window - 1)
        kept = cache.before(row, past, older, dtype)
        keys, values = (
            torch.cat([old, _heads_first(given[i, :new].to(cache.key.dtype), dtype)], dim=2)
            for old, given in zip(kept, (key, value), strict=True)
        )
        for start, stop in chunks(new, query_chunk):
            first = max(0, older + start - window + 1)
            seen = torch.arange(first, older + stop, device=query.device)
            place = torch.arange(older + start, older + stop, device=query.device).unsqueeze(1)
            hidden = (seen > place) | (seen <= place - window)
            rows = group_rows(query[i : i + 1, start:stop], groups, dtype) * scale
            logits = masked_logits(rows, keys[:, :, first : older + stop], hidden, heads)
            mixed, _ = softmax_mix(logits, values[:, :, first : older + stop], sink_logit)
            output[i, start:stop] = ungroup_rows(mixed, heads)[0]
    # Only now: in a long chunk the first queries still need what the last tokens push out.
    cache.append(chunk, key, value)
    return output


def _block_sparse(
    query: Tensor,
    cache: TokenCache,
    block_indices: Tensor,
    chunk: Chunk,
    block_size: int,
    sink: Tensor | None,
    softmax_scale: float | None,
) -> Tensor:
    """Attention to the tokens of the selected blocks alone (P1 Eq. 6-7): [A, C, HQ, DV]."""
    dtype = compute_dtype(query.dtype)
    heads, groups = query.shape[2], block_indices.shape[1]
    scale = _scale(query, softmax_scale)
    sink_logit = sink_per_group(sink, groups, dtype)
    value_dim = cache.value.shape[-1]
    output = query.new_zeros(*query.shape[:3], value_dim)
    in_block = torch.arange(block_size, device=query.device)
    num_keys = block_indices.shape[-1] * block_size
    per_query = groups * num_keys * (query.shape[-1] + value_dim) * dtype.itemsize
    for i, row, past, new in chunk.spans:
        for start, stop in chunks(new, max(1, _GATHERED_BYTES // per_query)):
            ids = block_indices[i, :, start:stop].transpose(0, 1).long()  # [queries, HKV, K]
            positions = (ids.unsqueeze(-1) * block_size + in_block).flatten(2)
            place = torch.arange(past + start, past + stop, device=query.device).view(-1, 1, 1)
            hidden = (positions < 0) | (positions > place)
            keys, values = cache.gather(row, positions.masked_fill(hidden, 0), dtype)
            # Every query has keys of its own: queries take the place of the batch.
            own_row = query[i, start:stop].unsqueeze(1)
            rows = group_rows(own_row, groups, dtype) * scale
            logits = masked_logits(rows, keys, hidden[:, :, None, None], heads)
            mixed, _ = softmax_mix(logits, values, sink_logit)
            output[i, start:stop] = ungroup_rows(mixed, heads)[:, 0]
    return output


def _uses_triton(
    backend: str,
    query: Tensor,
    chunk: Chunk,
    *caches: TokenCache | WindowCache,
    block_size: int | None = None,
) -> bool:
    choice = resolve_cached_backend(backend, query, chunk, *caches, block_size=block_size)
    return choice.name == "triton"


def _scale(query: Tensor, softmax_scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def _later(queries: int, device: torch.device) -> Tensor:
    """bool [queries, queries]: which of the last keys lie after each of as many last queries."""
    order = torch.arange(queries, device=device)
    return order > order.unsqueeze(1)


def _heads_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, HKV, X] -> [1, HKV, S, X]."""
    return tensor.to(dtype).transpose(0, 1).unsqueeze(0)
