"""Checks of what callers pass in: each raises ValueError with what, got and expected.

Shapes: B batch, S queries of a row, Sk keys of a row, HQ query heads, HKV KV groups, D query/key
head dim, DV value head dim, N blocks, K selected.
"""

import torch
from torch import Tensor

from hysparse_kernels.block_lists import BlockLists
from hysparse_kernels.query_range import QueryRange

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""As limits.py writes them."""


def check_qkv(query: Tensor, key: Tensor, value: Tensor, query_start: int = 0) -> None:
    """query [B,S,HQ,D], key [B,Sk,HKV,D], value [B,Sk,HKV,DV]: one float dtype, one device, and
    keys up to the last query, which stands at query_start + S - 1."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name}: got shape {_shape(tensor)}, expected [batch, sequence, heads, head dim]"
                " with every size at least 1"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected a float dtype")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name}: got {tensor.dtype} on {tensor.device}, expected the query's"
                f" {query.dtype} on {query.device}"
            )
    batch, length, heads, head_dim = query.shape
    keys, groups = key.shape[1:3]
    if key.shape != (batch, keys, groups, head_dim):
        raise ValueError(
            f"key: got shape {_shape(key)}, expected [{batch}, keys, groups, {head_dim}]"
            f" to match the query {_shape(query)}"
        )
    if keys < query_start + length:
        raise ValueError(
            f"key: got {keys} keys a row, expected at least {query_start + length}: the {length}"
            f" queries stand at positions {query_start} to {query_start + length - 1} (query_start"
            f" = {query_start})"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: got shape {_shape(value)}, expected [{batch}, {keys}, {groups}, any]"
            f" to match the key {_shape(key)}"
        )
    if heads % groups:
        raise ValueError(
            f"query heads: got {heads} for {groups} KV groups, expected a multiple of {groups}"
        )


def check_at_least(minimum: int, **numbers: int) -> None:
    """Every keyword's number must be an integer >= ``minimum``."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < minimum:
            raise ValueError(f"{name}: got {number!r}, expected an integer of at least {minimum}")


def check_sink(sink: Tensor | None, query: Tensor) -> None:
    """One logit per query head, [HQ], any float dtype, on the query's device."""
    if sink is None:
        return
    heads = query.shape[2]
    if sink.shape != (heads,):
        raise ValueError(f"sink: got shape {_shape(sink)}, expected [{heads}], one per query head")
    if not sink.is_floating_point() or sink.device != query.device:
        raise ValueError(
            f"sink: got {sink.dtype} on {sink.device}, expected a float dtype on {query.device}"
        )


def check_block_indices(block_indices: Tensor, query: Tensor, key: Tensor, block_size: int) -> None:
    """int32 [B, HKV, S, K] with ids below N; the ids are read only where that is free (on CPU)."""
    batch, length, groups, queries = *key.shape[:3], query.shape[1]
    if block_indices.dtype != torch.int32:
        raise ValueError(f"block_indices: got dtype {block_indices.dtype}, expected torch.int32")
    if block_indices.dim() != 4 or block_indices.shape[:3] != (batch, groups, queries):
        raise ValueError(
            f"block_indices: got shape {_shape(block_indices)}, expected"
            f" [{batch}, {groups}, {queries}, selected] = [batch, KV groups, queries, selected]"
        )
    if block_indices.device != key.device:
        raise ValueError(f"block_indices: got {block_indices.device}, expected {key.device}")
    num_blocks = -(-length // block_size)
    if block_indices.device.type == "cpu" and block_indices.numel():
        largest = int(block_indices.max())
        if largest >= num_blocks:
            raise ValueError(
                f"block_indices: got block {largest}, expected ids below {num_blocks}"
                f" ({length} tokens in blocks of {block_size}); was the block size another one"
                " when they were selected?"
            )


def check_cu_seqlens(cu_seqlens: Tensor | None, like: Tensor, batch: int, sequence: int) -> None:
    """int32 [documents + 1] of B rows of `sequence` keys, on the device of ``like``; the offsets
    are read on CPU only."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != like.device:
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} on {cu_seqlens.device}, expected torch.int32 on"
            f" {like.device}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens: got shape {_shape(cu_seqlens)}, expected [documents + 1] with at least"
            " one document"
        )
    if cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != batch * sequence or offsets != sorted(offsets):
        raise ValueError(
            f"cu_seqlens: got {_short(offsets)}, expected ascending offsets from 0 to"
            f" {batch * sequence} = batch * sequence"
        )
    missing = sorted({row * sequence for row in range(batch)} - set(offsets))
    if missing:
        raise ValueError(
            f"cu_seqlens: got {_short(offsets)}, expected a document to start at token {missing[0]}"
            " too, where a batch row does"
        )


def check_lists(
    lists: BlockLists,
    block_indices: Tensor,
    query: Tensor,
    block_size: int,
    cu_seqlens: Tensor | None,
    queries: QueryRange | None,
) -> None:
    """The shapes and the range that ``prepare_selection`` saw must be those of the call."""
    batch, groups, sequence, _ = block_indices.shape
    packed = cu_seqlens is not None
    rows, tokens = (groups, batch * sequence) if packed else (batch * groups, sequence)
    got = (lists.packed, lists.block_size, lists.part.heads, *lists.counts.shape, lists.queries)
    tiles = -(-tokens // lists.tile.tokens)
    expected = (packed, block_size, query.shape[2] // groups, rows, tiles, queries)
    if got != expected:
        raise ValueError(
            f"lists: got (packed, block size, heads per group, rows, tiles, range) = {got},"
            f" expected {expected}; were they prepared for this selection?"
        )


def _short(offsets: list[int]) -> str:
    return str(offsets) if len(offsets) <= 8 else f"{str(offsets[:8])[:-1]}, ...]"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
