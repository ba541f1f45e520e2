"""Attention of new tokens to a cache: one operation per kind of layer, no gradients.

Each operation stores the new tokens' keys and values in the layer's cache, then attends: so a
token reads of its own chunk what later ones will read, and the cut into chunks changes no result
beyond rounding. A chunk of a prompt is a range of queries among the keys of its row: the operations
of `dispatch`, those of training, attend and select, one row after the other, on what the cache
holds, widened to the query's dtype. Steps of one token a row may run on the kernels of decode/.

Shapes: A rows of the step, C columns, S new tokens and Sk tokens in all of one row, HQ query heads,
HKV KV groups, D query/key head dim, DV value head dim, K selected. P1 = HySparse, arXiv 2602.03560.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hysparse_kernels.backends import BackendChoice, choose, resolve_backend
from hysparse_kernels.block_lists import BlockLists
from hysparse_kernels.call import ReduceScores, SelectionRule
from hysparse_kernels.dispatch import (
    block_sparse_attention,
    oracle_attention,
    prepare_selection,
    sliding_window_attention,
)
from hysparse_kernels.gating import gated_sum
from hysparse_kernels.key_value_cache import Chunk, TokenCache, WindowCache


class CachedFullOutput(NamedTuple):
    """`output` [A, C, HQ, DV] in the query's dtype; `block_indices` int32 [A, HKV, C, K], ascending
    with -1 last, or None when nothing was selected."""

    output: Tensor
    block_indices: Tensor | None


class CachedRow(NamedTuple):
    """What the sparse layers that read one oracle have in common in a row of a step.

    key: [1, Sk, HKV, D], a view where the cache has the query's dtype. value: [1, Sk, HKV, DV].
    block_indices: int32 [1, HKV, S, K] of the new tokens.
    lists: the same selection in the form that kernels walk; None where none is needed.
    """

    key: Tensor
    value: Tensor
    block_indices: Tensor
    lists: BlockLists | None


def resolve_cached_backend(
    backend: str,
    query: Tensor,
    chunk: Chunk,
    *caches: TokenCache | WindowCache,
    block_size: int | None = None,
) -> BackendChoice:
    """Which backend ``backend`` means for query [A, C, HQ, D], what it reads, and why.

    "auto" takes triton where it can run, else the reference: for steps of one token a row (C = 1)
    the decode kernels, for longer chunks those of training.

    Raises:
        ValueError: ``backend`` is none of `BACKENDS`.
        BackendUnavailable: ``backend`` is "triton", which cannot take the step.
    """

    def why_not() -> str | None:
        try:
            from hysparse_kernels.decode import launch
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        return launch.why_not(query, caches, block_size)

    if chunk.width == 1:
        return choose(backend, why_not, lambda: f"Triton decode kernels on {query.device.type}")
    head_dim = max(query.shape[-1], *(cache.value.shape[-1] for cache in caches))
    return resolve_backend(
        backend, query.device, dtype=query.dtype, head_dim=head_dim, block_size=block_size
    )


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
        query_chunk: queries of one row that the reference works on at a time.
        backend: see ``resolve_cached_backend``.

    Returns:
        Output and selection; columns without a token are 0 and hold any valid selection.

    Raises:
        ValueError: the cache has no room.
        BackendUnavailable: the backend cannot be used.
    """
    scale = _scale(query, softmax_scale)
    ranges = _backend_of_ranges(
        backend, query, chunk, cache, block_size=block_size if select else None
    )
    if ranges is None:
        from hysparse_kernels.decode import launch

        rule = SelectionRule(
            block_size, num_selected, forced_first_blocks, forced_recent_blocks, reduce_scores
        )
        result = launch.full_attention(
            query, key, value, cache, chunk, rule=rule if select else None, scale=scale
        )
        return CachedFullOutput(*result)
    cache.append(chunk, key, value)
    outputs, selected = [], []
    for i, row, past, new in chunk.spans:
        found = oracle_attention(
            query[i : i + 1, :new],
            *cache.read(row, past + new, query.dtype),
            block_size=block_size,
            num_selected=num_selected,
            softmax_scale=scale,
            reduce_scores=reduce_scores,
            forced_first_blocks=forced_first_blocks,
            forced_recent_blocks=forced_recent_blocks,
            select=select,
            query_start=past,
            query_chunk=query_chunk,
            backend=ranges,
        )
        outputs.append(found.output)
        if found.block_indices is not None:
            selected.append(found.block_indices)
    indices = _in_columns(selected, chunk.width, 2, -1) if select else None
    return CachedFullOutput(_in_columns(outputs, chunk.width, 1, 0), indices)


@torch.no_grad()
def prepare_cached_selection(
    oracle: TokenCache,
    block_indices: Tensor,
    chunk: Chunk,
    *,
    query_heads: int,
    dtype: torch.dtype,
    block_size: int,
    backend: str = "auto",
) -> tuple[CachedRow, ...]:
    """What the sparse layers that read one selection can share in a chunk, read and built once.

    Args:
        oracle: the cache of the full layer that selected; it holds the new tokens already.
        block_indices: int32 [A, HKV, C, K] as `cached_full_attention` returned them.
        chunk: which tokens of which sequences these are.
        query_heads: HQ of the sparse layers.
        dtype: of their queries.
        block_size: tokens per block.
        backend: see ``resolve_cached_backend``.

    Returns:
        One for each row of the step. The decode kernels read none of it.

    Raises:
        BackendUnavailable: the backend cannot be used.
    """
    rows = []
    for i, row, past, new in chunk.spans:
        key, value = oracle.read(row, past + new, dtype)
        indices = block_indices[i : i + 1, :, :new]
        lists = prepare_selection(
            indices, query_heads, block_size=block_size, query_start=past, backend=backend
        )
        rows.append(CachedRow(key, value, indices, lists))
    return tuple(rows)


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
    prepared: Sequence[CachedRow] | None = None,
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
        prepared: ``prepare_cached_selection`` of these very arguments, to share it among layers.
        query_chunk: queries of one row that the reference works on at a time.
        backend: see ``resolve_cached_backend``.

    Raises:
        BackendUnavailable: the backend cannot be used.
    """
    scale = _scale(query, softmax_scale)
    ranges = _backend_of_ranges(backend, query, chunk, oracle, cache, block_size=block_size)
    if ranges is None:
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
            scale=scale,
        )
    if prepared is None:
        prepared = prepare_cached_selection(
            oracle, block_indices, chunk, query_heads=query.shape[2], dtype=query.dtype,
            block_size=block_size, backend=ranges,
        )  # fmt: skip
    outputs = [
        block_sparse_attention(
            query[i : i + 1, :new],
            of_row.key,
            of_row.value,
            of_row.block_indices,
            block_size=block_size,
            sink=sparse_sink,
            softmax_scale=scale,
            query_start=past,
            lists=of_row.lists,
            query_chunk=query_chunk,
            backend=ranges,
        )
        for (i, _, past, new), of_row in zip(chunk.spans, prepared, strict=True)
    ]
    sparse = _in_columns(outputs, chunk.width, 1, 0)
    near = cached_window_attention(
        query, key, value, cache, chunk, window=window, sink=window_sink, softmax_scale=scale,
        query_chunk=query_chunk, backend=ranges,
    )  # fmt: skip
    return gated_sum(sparse, near, sparse_gate, window_gate, backend=ranges)


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
    scale = _scale(query, softmax_scale)
    ranges = _backend_of_ranges(backend, query, chunk, cache)
    if ranges is None:
        from hysparse_kernels.decode import launch

        return launch.window_attention(
            query, key, value, cache, chunk, window=window, sink=sink, scale=scale
        )
    # Each row among the keys that its new tokens can see.
    outputs = []
    for i, row, past, new in chunk.spans:
        older = min(past, window - 1)
        kept = cache.before(row, past, older, query.dtype)
        keys, values = (
            # As the ring will hold them.
            torch.cat([old, given[i : i + 1, :new].to(cache.key.dtype).to(query.dtype)], dim=1)
            for old, given in zip(kept, (key, value), strict=True)
        )
        part = sliding_window_attention(
            query[i : i + 1, :new],
            keys,
            values,
            window=window,
            sink=sink,
            softmax_scale=scale,
            query_start=older,
            query_chunk=query_chunk,
            backend=ranges,
        )
        outputs.append(part)
    # Only now: in a long chunk the first queries still need what the last tokens push out.
    cache.append(chunk, key, value)
    return _in_columns(outputs, chunk.width, 1, 0)


def _backend_of_ranges(
    backend: str,
    query: Tensor,
    chunk: Chunk,
    *caches: TokenCache | WindowCache,
    block_size: int | None = None,
) -> str | None:
    """The backend of a step's ranges of queries, or None if it runs on the decode kernels."""
    if chunk.width > 1:
        return backend
    choice = resolve_cached_backend(backend, query, chunk, *caches, block_size=block_size)
    return None if choice.name == "triton" else choice.name


def _scale(query: Tensor, softmax_scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def _in_columns(parts: Sequence[Tensor], width: int, dim: int, unused: int) -> Tensor:
    """One row [1, .., S, ..] after the other as [A, .., C, ..], with `unused` after their tokens.

    No copy of a row alone, which is as long as the step.
    """
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[0], shape[dim] = len(parts), width
    joined = parts[0].new_full(shape, unused)
    for i, part in enumerate(parts):
        joined[i : i + 1].narrow(dim, 0, part.shape[dim]).copy_(part)
    return joined
