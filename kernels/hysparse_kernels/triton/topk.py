"""Block scores and the exact top-k over them on Triton kernels; reference/selection.py specifies.

The k best of N scores are found in two levels: N scores make segments, only the k segments with the
largest maxima can hold one of the k best, and these k segments are searched again.

Shapes: B batch, S sequence, HKV KV groups, N blocks, K selected, C tokens of a chunk, R = B * HKV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.block_lists import TokenTile
from hysparse_kernels.call import SelectionRule
from hysparse_kernels.documents import document_starts
from hysparse_kernels.query_range import QueryRange

_SCRATCH_BYTES = 256 * 2**20
"""Most memory for the raw block maxima of the oracle; long sequences take several launches."""
_NO_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
_NO_BLOCK = tl.constexpr(0x7FFFFFFF)


def block_topk(scores: Tensor, num_selected: int) -> Tensor:
    """int32 [..., K] of scores [..., N] in fp32, bf16 or fp16; see `dispatch.block_topk`."""
    indices = torch.empty(*scores.shape[:-1], num_selected, dtype=torch.int32, device=scores.device)
    total = indices.numel() // num_selected
    if total:
        _launch_topk(scores.contiguous(), indices, (total, 1), total)
    return indices


@dataclass(frozen=True)
class Selector:
    """Turns the raw block maxima of the oracle's forward kernel into block indices."""

    rule: SelectionRule
    longest: int
    """Where the last query of a row stands, and one more: no query sees more keys."""
    cu_seqlens: Tensor | None
    queries: QueryRange | None = None
    """Which positions the queries are; None for all of the row."""

    def run(
        self,
        launch: Callable[[int, int, Tensor | None, int], None],
        tile: TokenTile,
        lse: Tensor,
        groups: int,
    ) -> Tensor:
        """Indices int32 [B, HKV, S, K] after a forward in chunks of tokens.

        `launch(first_token, tokens, maxima, N)` runs the forward of such a chunk: it fills maxima
        [R, N, tokens, PACK] and its part of lse [B, HQ, S].
        """
        batch, _, sequence = lse.shape
        blocks = triton.cdiv(self.longest, self.rule.block_size)
        rows = batch * groups
        most = _SCRATCH_BYTES // (rows * blocks * tile.pack * 4)
        step = min(sequence, max(1, most // tile.tokens) * tile.tokens)
        maxima = lse.new_empty(rows * blocks * step * tile.pack)
        scores = lse.new_empty(rows * step * blocks)
        indices = torch.empty(
            batch, groups, sequence, self.rule.num_selected, dtype=torch.int32, device=lse.device
        )
        starts = self._starts(sequence, lse.device)
        for first in range(0, sequence, step):
            tokens = min(step, sequence - first)
            launch(first, tokens, maxima, blocks)
            part = scores[: rows * tokens * blocks].view(batch, groups, tokens, blocks)
            group_scores_kernel[(triton.cdiv(tokens, tile.tokens), rows, triton.cdiv(blocks, 32))](
                maxima, lse, starts, part,
                sequence, groups, first, tokens, blocks, PACKED=starts is not None,
                **tile.constants(), BLOCK=self.rule.block_size, CHUNK=32,
            )  # fmt: skip
            if self.rule.reduce_scores is not None:
                part = self.rule.reduce_scores(part).contiguous()
            _launch_topk(part, indices, (tokens, rows), sequence, first, self.rule, starts)
        return indices

    def _starts(self, sequence: int, device: torch.device) -> Tensor | None:
        """int32 [S]: where the document of every query begins, counted in queries and thus perhaps
        before the first one; None where all begin with the first."""
        if self.queries is None:
            if self.cu_seqlens is None:
                return None
            return document_starts(self.cu_seqlens, sequence)
        position = self.queries.positions(sequence, device)
        begin = torch.zeros_like(position)
        if self.cu_seqlens is not None:
            keys = sequence // self.queries.queries * self.queries.keys
            begin = document_starts(self.cu_seqlens, keys)[position]
        return begin - position + torch.arange(sequence, dtype=torch.int32, device=device)


def _launch_topk(
    scores: Tensor,
    indices: Tensor,
    grid: tuple[int, int],
    sequence: int,
    first_token: int = 0,
    rule: SelectionRule | None = None,
    document_start: Tensor | None = None,
) -> None:
    """`rule` None: any block may be selected."""
    blocks, selected = scores.shape[-1], indices.shape[-1]
    places, slots = triton.next_power_of_2(blocks), triton.next_power_of_2(selected)
    segment = 1
    while 4 * segment * segment * slots <= places:
        segment *= 2
    forced = (0, 0) if rule is None else (rule.forced_first_blocks, rule.forced_recent_blocks)
    topk_kernel[grid](
        scores, document_start, indices,
        first_token, grid[0], sequence, blocks, selected, *forced,
        CAUSAL=rule is not None, PACKED=document_start is not None,
        BLOCK=1 if rule is None else rule.block_size,
        SEGMENTS=places // segment, SEGMENT=segment, SELECTED=slots,
        num_warps=max(1, min(8, places // 512)),
    )  # fmt: skip


@triton.jit
def group_scores_kernel(
    maxima, lse, document_start, scores, sequence, groups, first_token, tokens, num_blocks,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """scores [R, tokens, N] of the chunk of tokens at first_token: Eq. 3 in the log, base 2.

    The largest log-probability of a block over its keys and the heads of the group; -inf for blocks
    that start after the query.
    """
    row = tl.program_id(1).to(tl.int64)
    batch, kv = row // groups, row % groups
    index = tl.arange(0, ROWS)
    place = tl.program_id(0) * TOKENS + index // PACK  # the token, counted in the chunk
    head = index % PACK
    valid = (index // PACK < TOKENS) & (place < tokens) & (head < HEADS)
    token = first_token + place
    stat = (batch * groups * HEADS + kv * HEADS + head) * sequence + token
    lse_i = tl.load(lse + stat, mask=valid, other=0.0) * 1.4426950408889634
    begin = 0
    if PACKED:
        begin = tl.load(document_start + token, mask=valid, other=0)[None, :]
    block = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    # Blocks after the token were never visited: nothing was written there.
    visited = begin + (block * BLOCK)[:, None] <= token[None, :]
    where = ((row * num_blocks + block[:, None]) * tokens + place[None, :]) * PACK + head[None, :]
    raw = tl.load(maxima + where, mask=visited & valid[None, :] & (block < num_blocks)[:, None],
                  other=float("-inf"))  # fmt: skip
    best = tl.max(tl.reshape(raw - lse_i[None, :], [CHUNK, TOKENS, PACK]), 2)
    places = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    out = scores + (row * tokens + places[None, :]) * num_blocks + block[:, None]
    tl.store(out, best, mask=(places < tokens)[None, :] & (block < num_blocks)[:, None])


@triton.jit
def _keys(row, block, num_blocks, own, forced_first, forced_recent, CAUSAL: tl.constexpr):
    """int64 keys in the order of the blocks' scores, the lower id winning a tie; none are equal.

    A score becomes an integer of the same order, the id below it. Not a number ranks first.
    """
    offered = (block >= 0) & (block < num_blocks)
    score = tl.load(row + block, mask=offered, other=float("-inf")).to(tl.float32)
    if CAUSAL:
        offered = offered & (block <= own)
        forced = (block < forced_first) | (block > own - forced_recent)
        score = tl.where(forced, float("inf"), score)
    offered = offered & (score != float("-inf"))
    score = tl.where(score != score, float("nan"), score) + 0.0  # one NaN, one zero
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(offered, (ordered << 32) + (0x7FFFFFFF - block), _NO_KEY)


@triton.jit
def _best(keys, selected, SELECTED: tl.constexpr):
    """[SELECTED] blocks of the `selected` largest keys, then _NO_BLOCK."""
    slot = tl.arange(0, SELECTED)
    chosen = tl.full([SELECTED], _NO_BLOCK, tl.int32)
    for index in range(selected):
        best = tl.max(keys, 0)
        found = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
        chosen = tl.where((slot == index) & (best != _NO_KEY), found, chosen)
        keys = tl.where(keys == best, _NO_KEY, keys)
    return chosen


@triton.jit
def topk_kernel(
    scores, document_start, indices, first_token, tokens, sequence, num_blocks, selected,
    forced_first, forced_recent,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """indices [R, S, K] of program (token of the chunk, row): ids ascending, -1 last.

    CAUSAL: blocks that start after the token are out, the first and most recent may be forced.
    """
    place = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    token = first_token + place
    own = token
    if CAUSAL:
        if PACKED:
            own = token - tl.load(document_start + token)
        own = own // BLOCK
    base = scores + (row * tokens + place) * num_blocks
    block = tl.arange(0, SEGMENTS)[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    keys = _keys(base, block, num_blocks, own, forced_first, forced_recent, CAUSAL)
    chosen = _best(tl.max(keys, 1), selected, SELECTED)
    if SEGMENT > 1:
        # The k best lie in the k segments with the best maxima: any other has k blocks above it.
        start = tl.where(chosen == _NO_BLOCK, -SEGMENT, chosen // SEGMENT * SEGMENT)
        block = start[:, None] + tl.arange(0, SEGMENT)[None, :]
        keys = _keys(base, block, num_blocks, own, forced_first, forced_recent, CAUSAL)
        chosen = _best(tl.reshape(keys, [SELECTED * SEGMENT]), selected, SELECTED)
    chosen = tl.sort(chosen)
    chosen = tl.where(chosen == _NO_BLOCK, -1, chosen)
    slot = tl.arange(0, SELECTED)
    tl.store(indices + (row * sequence + token) * selected + slot, chosen, mask=slot < selected)
