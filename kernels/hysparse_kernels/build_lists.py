"""The lists of a selection, built by Triton's kernels or by plain torch; see block_lists.py."""

from __future__ import annotations

from torch import Tensor

from hysparse_kernels import block_lists
from hysparse_kernels.block_lists import BlockLists, max_work_items, segment_of, tile_of_two_parts
from hysparse_kernels.documents import block_table
from hysparse_kernels.query_range import QueryRange


def build_block_lists(
    block_indices: Tensor,
    heads: int,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    queries: QueryRange | None = None,
    *,
    with_triton: bool = True,
) -> BlockLists:
    """Lists of `block_indices` int32 [B, HKV, S, K] for `heads` query heads per KV group.

    `queries` says which positions the S tokens are; None for all of the row.
    `with_triton` needs a CUDA device or Triton's interpreter; without, plain torch builds the same.
    """
    batch, groups, sequence, selected = block_indices.shape
    keys = sequence if queries is None else queries.keys
    table = block_table(batch, keys, block_size, cu_seqlens, block_indices.device)
    if table.packed:
        # Of sequences of one token, reshape makes a view: not in the order that kernels read.
        rows = block_indices.transpose(0, 1).reshape(groups, batch * sequence, selected)
    else:
        rows = block_indices.reshape(batch * groups, sequence, selected)
    rows = rows.contiguous()
    tile, part = tile_of_two_parts(heads)
    if with_triton:
        from hysparse_kernels.triton import lists as builder
    else:
        from hysparse_kernels.reference import lists as builder  # type: ignore[no-redef]
    forward = builder.forward_index(rows, tile.tokens, block_size, table, queries)
    segment_tokens = segment_of(heads, tile.tokens)
    inverse = builder.inverse_index(
        forward, tile.tokens, block_size, table, selected, segment_tokens, queries
    )
    segments = -(-rows.shape[1] // segment_tokens)
    start = 0 if queries is None else queries.start
    most = max_work_items(rows.shape[0], table, block_size, segments, segment_tokens, start)
    return BlockLists(
        tile, part, block_size, table, forward.starts, forward.bits, forward.counts,
        inverse.part, inverse.bits, segments, segment_tokens,
        builder.work_items(inverse, table, segments, most, block_lists.WORK_ITEM_PARTS), queries,
    )  # fmt: skip
