"""The public operations: a call is checked, a backend chosen, and the call handed to it.

Shapes: B batch, S queries of a row, Sk keys of a row, HQ query heads, HKV KV groups, G = HQ // HKV
heads per group (head h belongs to group h // G), D query/key head dim, DV value head dim (may
differ from D), N = ceil((query_start + S) / block_size) blocks, K selected. P1 = HySparse,
arXiv 2602.03560.

What the three attentions share:
    query: [B, S, HQ, D], any strides; key, value and it share one float dtype and device.
    key: [B, Sk, HKV, D].
    value: [B, Sk, HKV, DV].
    query_start: position of a row's first query among its keys: query i stands at query_start + i
        and sees no key after that, so Sk must be at least query_start + S. Keys past the last query
        get gradients of exactly zero. Default 0, with Sk = S in most cases: all of the row. Ranges
        of queries that together are all of the row give what all of it gives, piece by piece, and
        their gradients of key and value add up to its.
    softmax_scale: factor on query . key, default D ** -0.5.
    sink: [HQ], one more logit per head that enters the denominator only. None: no sink.
    cu_seqlens: int32 [documents + 1] on the query's device, ascending offsets into the B * Sk
        key tokens in row-major order; see documents.py. Every batch row must start a document,
        empty documents are allowed. A query belongs to the document that its position lies in.
        Nothing crosses a document; causality and block ids count from its start, forced blocks too.
        None: every row is one document. The offsets are verified on CPU only.
    accumulate: gets the gradients of key and value, which must come from its ``attach``; autograd
        then gets none for them. Calls with several ranges of queries may share one, each with all
        keys. See ``KeyValueGradients``.
    query_chunk: C of the reference, queries worked on at a time; memory grows with C x Sk, for a
        window with C x (C + window).
    backend: see ``resolve_backend``.
They raise ValueError for shapes, dtypes or numbers that do not fit, for ``accumulate`` without
``attach``, and BackendUnavailable.
"""

import torch
from torch import Tensor

from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.arguments import check_at_least, check_cu_seqlens
from hysparse_kernels.backends import BackendUnavailable, resolve_backend
from hysparse_kernels.block_lists import BlockLists
from hysparse_kernels.build_lists import build_block_lists
from hysparse_kernels.call import (
    AttentionCall,
    CausalKeys,
    OracleOutput,
    ReduceScores,
    SelectedKeys,
    SelectionRule,
    WindowKeys,
)
from hysparse_kernels.query_range import QueryRange
from hysparse_kernels.reference import attention as reference
from hysparse_kernels.reference import selection as reference_selection


def prepare_selection(
    block_indices: Tensor,
    query_heads: int,
    *,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    query_start: int = 0,
    key_length: int | None = None,
    backend: str = "auto",
) -> BlockLists | None:
    """What the sparse layers that read one selection can share, built once; None if nothing.

    Args:
        block_indices: int32 [B, HKV, S, K] of an oracle.
        query_heads: HQ of the sparse layers.
        block_size: tokens per block.
        cu_seqlens: the oracle's, int32 [documents + 1]; see documents.py.
        query_start: the oracle's.
        key_length: Sk of the sparse layers; None is query_start + S.
        backend: see ``resolve_backend``.

    Raises:
        ValueError: offsets that do not fit, or fewer keys than queries need.
        BackendUnavailable: the backend cannot be used.
    """
    batch, groups, queries, _ = block_indices.shape
    check_at_least(0, query_start=query_start)
    if key_length is None:
        key_length = query_start + queries
    check_at_least(query_start + queries, key_length=key_length)
    check_cu_seqlens(cu_seqlens, block_indices, batch, key_length)
    choice = resolve_backend(backend, block_indices.device, block_size=block_size)
    place = QueryRange.of(query_start, queries, key_length)
    if choice.name == "reference":
        return None
    return build_block_lists(block_indices, query_heads // groups, block_size, cu_seqlens, place)


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
    query_start: int = 0,
    accumulate: KeyValueGradients | None = None,
    query_chunk: int = 256,
    backend: str = "auto",
) -> OracleOutput:
    """Causal attention (P1 Eq. 2) that also selects K blocks per token and KV group (P1 Eq. 3).

    A block's score is the largest softmax probability among its visible keys, then the max over
    the G heads of the group, which therefore share the selection. It is ranked as the logarithm:
    max over heads of (largest scaled logit of the block - lse of the head). Line 16 of P1's
    Algorithm 1 lacks the exp of Eq. 3 and would rank differently between heads; Eq. 3 is followed.

    A block that starts after the query is never selected; the query's own partial block competes
    like any other; the lowest id wins a tie. The selection carries no gradient, and backward never
    repeats it.

    Args: beside those of the module
        block_size: tokens per block.
        num_selected: K, blocks selected per token and group; may exceed N.
        reduce_scores: gets the log scores [B, HKV, C, N] of each chunk of C queries (-inf where a
            block is invisible; of one base, natural or 2) and returns as many: a MAX all-reduce
            over the ranks that hold different query heads of the same group. Called once per
            chunk in increasing order; the backend chooses C.
        forced_first_blocks: this many first blocks are always selected when visible. P1: none.
        forced_recent_blocks: likewise the most recent ones, the own block counting as the first.
        select: False computes the attention alone (a recompute of what was selected before);
            block_indices is then None and reduce_scores is not called.

    Returns:
        ``OracleOutput(output [B, S, HQ, DV], lse [B, HQ, S], block_indices int32 [B, HKV, S, K])``.

    Raises:
        ValueError: see the module; or more forced blocks than K.
    """
    rule = SelectionRule(
        block_size, num_selected, forced_first_blocks, forced_recent_blocks, reduce_scores
    )
    call = AttentionCall(
        query,
        key,
        value,
        CausalKeys(rule, select),
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        accumulate=accumulate,
        query_start=query_start,
        query_chunk=query_chunk,
    )
    return _run(call, backend)


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
    query_start: int = 0,
    lists: BlockLists | None = None,
    accumulate: KeyValueGradients | None = None,
    query_chunk: int = 256,
    backend: str = "auto",
) -> Tensor:
    """Causal attention to the tokens of the selected blocks only (P1 Eq. 6-7).

    Args: beside those of the module; key and value are the oracle layer's
        block_indices: int32 [B, HKV, S, K] in any order; -1 is no block, an id that stands twice
            counts once, and tokens after the query stay hidden in whatever block.
        block_size: tokens per block, the one the selection was made with.
        lists: ``prepare_selection`` of these very indices, to build them once for several layers.

    Returns:
        [B, S, HQ, DV] in the query's dtype; 0 where a row sees no key. Keys and values of blocks
        that no row selected get a gradient of exactly zero.

    Raises:
        ValueError: see the module; or lists of another selection's shape or range.
    """
    call = AttentionCall(
        query,
        key,
        value,
        SelectedKeys(block_indices, block_size, lists),
        sink=sink,
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        accumulate=accumulate,
        query_start=query_start,
        query_chunk=query_chunk,
    )
    return _run(call, backend).output


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    query_start: int = 0,
    query_chunk: int = 256,
    backend: str = "auto",
) -> Tensor:
    """Causal attention to the last ``window`` tokens, the own one included (P1 Eq. 5).

    The query at position t sees keys j with t - window < j <= t.

    Args: beside those of the module
        window: in tokens; may exceed Sk.

    Returns:
        [B, S, HQ, DV] in the query's dtype.
    """
    call = AttentionCall(
        query,
        key,
        value,
        WindowKeys(window),
        sink=sink,
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        query_start=query_start,
        query_chunk=query_chunk,
    )
    return _run(call, backend).output


def block_topk(scores: Tensor, num_selected: int, *, backend: str = "auto") -> Tensor:
    """The ``num_selected`` best blocks of every row of scores, exact and bitwise repeatable.

    Args:
        scores: [..., N], any float dtype; -inf marks a block that may not be selected.
        num_selected: K, in blocks; may exceed N.
        backend: see ``resolve_backend``.

    Returns:
        int32 [..., K]: ids ascending, -1 padding last. The lowest id wins a tie.

    Raises:
        ValueError: scores are not float or have no N, or K < 1.
        BackendUnavailable: the backend cannot be used.
    """
    if scores.dim() < 1 or scores.shape[-1] < 1 or not scores.is_floating_point():
        raise ValueError(
            f"scores: got {scores.dtype} {list(scores.shape)}, expected a float [..., blocks]"
        )
    check_at_least(1, num_selected=num_selected)
    if resolve_backend(backend, scores.device).name == "reference":
        return reference_selection.block_topk(scores, num_selected)
    if scores.dtype == torch.float64:
        if backend == "triton":
            raise BackendUnavailable("the Triton top-k takes fp32, bf16 and fp16, not fp64")
        return reference_selection.block_topk(scores, num_selected)
    from hysparse_kernels.triton import topk

    return topk.block_topk(scores, num_selected)


def _run(call: AttentionCall, backend: str) -> OracleOutput:
    choice = resolve_backend(
        backend,
        call.query.device,
        dtype=call.query.dtype,
        head_dim=call.head_dim,
        block_size=call.block_size,
    )
    if choice.name == "reference":
        return reference.attend(call)
    from hysparse_kernels import autograd

    return autograd.attend(call)
