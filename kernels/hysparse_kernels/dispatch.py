"""The public operations: arguments checked, backend chosen, work handed to it.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, G = HQ // HKV heads per group (head h
belongs to group h // G), D query/key head dim, DV value head dim (may differ from D),
N = ceil(S / block_size) blocks, K selected. P1 = HySparse, arXiv 2602.03560.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hysparse_kernels import reference
from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.arguments import (
    check_at_least,
    check_block_indices,
    check_cu_seqlens,
    check_lists,
    check_qkv,
    check_sink,
)
from hysparse_kernels.block_lists import BlockLists, build_block_lists
from hysparse_kernels.reference import OracleOutput, ReduceScores

BACKENDS = ("auto", "reference", "triton")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot be used here; the message says why."""


class BackendChoice(NamedTuple):
    """``name`` of the backend that will run and, for the log, the ``reason`` it was picked."""

    name: Literal["reference", "triton"]
    reason: str


def resolve_backend(
    backend: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    block_size: int | None = None,
    hopper_shape: tuple[int, int, int] | None = None,
) -> BackendChoice:
    """Which backend ``backend`` (auto, reference or triton) means for such inputs.

    "auto" takes triton where it can run, else the reference. ``dtype``, ``head_dim`` (the larger
    one of query/key and value) and ``block_size`` are those of the call; None leaves them open.
    ``hopper_shape``, query heads per KV group and head dims of query and value, lets the reason say
    on a Hopper GPU whether its own kernels take them.

    Raises:
        ValueError: ``backend`` is none of the three.
        BackendUnavailable: ``backend`` is "triton", which cannot take such inputs.
    """
    device = torch.device(device)
    return choose(
        backend,
        lambda: _why_no_triton(device, dtype, head_dim, block_size),
        lambda: f"Triton kernels on {device.type}{_on_hopper(device, hopper_shape)}",
    )


def choose(
    backend: str, why_no_triton: Callable[[], str | None], kernels: Callable[[], str]
) -> BackendChoice:
    """The choice, given why Triton cannot take a call, or None, and what its kernels are called.

    Raises as ``resolve_backend``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return BackendChoice("reference", "asked for by name")
    reason = why_no_triton()
    if backend == "triton":
        if reason is not None:
            raise BackendUnavailable(
                f"backend 'triton' was asked for, but {reason}; use 'auto' or 'reference'"
            )
        return BackendChoice("triton", "asked for by name")
    if reason is None:
        return BackendChoice("triton", kernels())
    return BackendChoice("reference", f"plain PyTorch: {reason}")


def _why_no_triton(
    device: torch.device, dtype: torch.dtype | None, head_dim: int | None, block_size: int | None
) -> str | None:
    try:
        from hysparse_kernels import triton_attention
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton_attention.why_not(device, dtype, head_dim, block_size)


def _on_hopper(device: torch.device, shape: tuple[int, int, int] | None) -> str:
    from hysparse_kernels import hopper

    if not hopper.is_hopper(device):
        return ""
    refusal = None if shape is None else hopper.why_not_shape(*shape)
    if refusal is not None:
        return f", not those for Hopper: {refusal}"
    return ", those for Hopper where they take the call"


def _uses_triton(
    backend: str, query: Tensor, value: Tensor | None = None, block_size: int | None = None
) -> bool:
    head_dim = max(query.shape[-1], 0 if value is None else value.shape[-1])
    choice = resolve_backend(
        backend, query.device, dtype=query.dtype, head_dim=head_dim, block_size=block_size
    )
    return choice.name == "triton"


def prepare_selection(
    block_indices: Tensor,
    query_heads: int,
    *,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> BlockLists | None:
    """What the sparse layers that read one selection can share, built once; None if nothing.

    Args:
        block_indices: int32 [B, HKV, S, K] of an oracle.
        query_heads: HQ of the sparse layers.
        block_size: tokens per block.
        cu_seqlens: the oracle's, int32 [documents + 1]; see documents.py.
        backend: see ``resolve_backend``.
    """
    batch, groups, sequence, _ = block_indices.shape
    check_cu_seqlens(cu_seqlens, block_indices, batch, sequence)
    choice = resolve_backend(backend, block_indices.device, block_size=block_size)
    if choice.name == "reference":
        return None
    return build_block_lists(block_indices, query_heads // groups, block_size, cu_seqlens)


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

    Args:
        query: [B, S, HQ, D], any strides; key, value and it share one float dtype and device.
        key: [B, S, HKV, D].
        value: [B, S, HKV, DV].
        block_size: tokens per block.
        num_selected: K, blocks selected per token and group; may exceed N.
        softmax_scale: factor on query . key, default D ** -0.5.
        reduce_scores: gets the log scores [B, HKV, C, N] of each chunk of C queries (-inf where a
            block is invisible; of one base, natural or 2) and returns as many: a MAX all-reduce
            over the ranks that hold different query heads of the same group. Called once per
            chunk in increasing order; the backend chooses C.
        forced_first_blocks: this many first blocks are always selected when visible. P1: none.
        forced_recent_blocks: likewise the most recent ones, the own block counting as the first.
        select: False computes the attention alone (a recompute of what was selected before);
            block_indices is then None and reduce_scores is not called.
        cu_seqlens: int32 [documents + 1] on the query's device, ascending offsets into the B * S
            tokens in row-major order; see documents.py. Every batch row must start a document,
            empty documents are allowed. Nothing crosses a document; causality and block ids
            count from its start, forced blocks too. None: every row
            is one document. The offsets are verified on CPU only.
        query_chunk: C of the reference, queries worked on at a time; memory grows with C x S.
        backend: see ``resolve_backend``.

    Returns:
        ``OracleOutput(output [B, S, HQ, DV], lse [B, HQ, S], block_indices int32 [B, HKV, S, K])``.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, or more forced blocks than K.
        BackendUnavailable: the backend cannot be used.
    """
    check_qkv(query, key, value)
    check_cu_seqlens(cu_seqlens, query, *query.shape[:2])
    check_at_least(1, block_size=block_size, num_selected=num_selected, query_chunk=query_chunk)
    check_at_least(
        0, forced_first_blocks=forced_first_blocks, forced_recent_blocks=forced_recent_blocks
    )
    if forced_first_blocks + forced_recent_blocks > num_selected:
        raise ValueError(
            f"forced blocks: got {forced_first_blocks} first and {forced_recent_blocks} recent,"
            f" expected at most num_selected = {num_selected} together"
        )
    if _uses_triton(backend, query, value, block_size):
        from hysparse_kernels import triton_attention

        return triton_attention.oracle_attention(
            query,
            key,
            value,
            block_size=block_size,
            num_selected=num_selected,
            softmax_scale=softmax_scale,
            reduce_scores=reduce_scores,
            forced_first_blocks=forced_first_blocks,
            forced_recent_blocks=forced_recent_blocks,
            select=select,
            cu_seqlens=cu_seqlens,
        )
    return reference.oracle_attention(
        query,
        key,
        value,
        block_size=block_size,
        num_selected=num_selected,
        softmax_scale=softmax_scale,
        reduce_scores=reduce_scores,
        forced_first_blocks=forced_first_blocks,
        forced_recent_blocks=forced_recent_blocks,
        select=select,
        cu_seqlens=cu_seqlens,
        query_chunk=query_chunk,
    )


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
        return reference.block_topk(scores, num_selected)
    if scores.dtype == torch.float64:
        if backend == "triton":
            raise BackendUnavailable("the Triton top-k takes fp32, bf16 and fp16, not fp64")
        return reference.block_topk(scores, num_selected)
    from hysparse_kernels import triton_topk

    return triton_topk.block_topk(scores, num_selected)


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
    lists: BlockLists | None = None,
    accumulate: KeyValueGradients | None = None,
    query_chunk: int = 256,
    backend: str = "auto",
) -> Tensor:
    """Causal attention to the tokens of the selected blocks only (P1 Eq. 6-7).

    Args:
        query: [B, S, HQ, D], any strides; key, value and it share one float dtype and device.
        key: [B, S, HKV, D], the oracle layer's.
        value: [B, S, HKV, DV], the oracle layer's.
        block_indices: int32 [B, HKV, S, K] in any order; -1 is no block, an id that stands twice
            counts once, and tokens after the query stay hidden in whatever block.
        block_size: tokens per block, the one the selection was made with.
        sink: [HQ], one more logit per head that enters the denominator only. None: no sink.
        softmax_scale: factor on query . key, default D ** -0.5.
        cu_seqlens: int32 [documents + 1] on the query's device, ascending offsets into the B * S
            tokens in row-major order; see documents.py. Every batch row must start a document,
            empty documents are allowed. Nothing crosses a document, block ids count from its
            start. None: every row
            is one document. The offsets are verified on CPU only.
        lists: ``prepare_selection`` of these very indices, to build them once for several layers.
        accumulate: gets the gradients of key and value, which must come from its ``attach``;
            autograd then gets none for them. See ``KeyValueGradients``.
        query_chunk: C of the reference, queries worked on at a time; memory grows with C x S.
        backend: see ``resolve_backend``.

    Returns:
        [B, S, HQ, DV] in the query's dtype; 0 where a row sees no key. Keys and values of blocks
        that no row selected get a gradient of exactly zero.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, lists of another selection's shape,
            or ``accumulate`` without ``attach``.
        BackendUnavailable: the backend cannot be used.
    """
    check_qkv(query, key, value)
    check_cu_seqlens(cu_seqlens, query, *query.shape[:2])
    check_at_least(1, block_size=block_size, query_chunk=query_chunk)
    check_block_indices(block_indices, key, block_size)
    check_sink(sink, query)
    if lists is not None:
        check_lists(lists, block_indices, query, block_size, cu_seqlens)
    if accumulate is not None:
        accumulate.check_attached()
    if _uses_triton(backend, query, value, block_size):
        from hysparse_kernels import triton_attention

        return triton_attention.block_sparse_attention(
            query,
            key,
            value,
            block_indices,
            block_size=block_size,
            sink=sink,
            softmax_scale=softmax_scale,
            cu_seqlens=cu_seqlens,
            lists=lists,
            accumulate=accumulate,
        )
    return reference.block_sparse_attention(
        query,
        key,
        value,
        block_indices,
        block_size=block_size,
        sink=sink,
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        accumulate=accumulate,
        query_chunk=query_chunk,
    )


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
    backend: str = "auto",
) -> Tensor:
    """Causal attention to the last ``window`` tokens, the own one included (P1 Eq. 5).

    Query t sees keys j with t - window < j <= t.

    Args:
        query: [B, S, HQ, D], any strides; key, value and it share one float dtype and device.
        key: [B, S, HKV, D].
        value: [B, S, HKV, DV].
        window: in tokens; may exceed S.
        sink: [HQ], one more logit per head that enters the denominator only. None: no sink.
        softmax_scale: factor on query . key, default D ** -0.5.
        cu_seqlens: int32 [documents + 1] on the query's device, ascending offsets into the B * S
            tokens in row-major order; see documents.py. Every batch row must start a document,
            empty documents are allowed. Nothing crosses a document. None: every row
            is one document. The offsets are verified on CPU only.
        query_chunk: C, queries worked on at a time; memory grows with C x (C + window).
        backend: see ``resolve_backend``.

    Returns:
        [B, S, HQ, DV] in the query's dtype.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.
        BackendUnavailable: the backend cannot be used.
    """
    check_qkv(query, key, value)
    check_cu_seqlens(cu_seqlens, query, *query.shape[:2])
    check_at_least(1, window=window, query_chunk=query_chunk)
    check_sink(sink, query)
    if _uses_triton(backend, query, value):
        from hysparse_kernels import triton_attention

        return triton_attention.sliding_window_attention(
            query,
            key,
            value,
            window=window,
            sink=sink,
            softmax_scale=softmax_scale,
            cu_seqlens=cu_seqlens,
        )
    return reference.sliding_window_attention(
        query,
        key,
        value,
        window=window,
        sink=sink,
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        query_chunk=query_chunk,
    )
