"""How the forward and dQ kernels for Hopper iterate over the keys of a tile of tokens.

SPAN: the keys of a window, KEYS at a time; BLOCKS: the union of what the tile's tokens selected,
one block at a time. The loader brings the rows of a tile once and K, V of every step into a ring.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hysparse_kernels.hopper.common import BLOCKS, extent, tma_load, work


@gluon.jit
def span(first, start, stop, shift, group, tile, tiles, window, counts, MODE: gl.constexpr,
         TILE: gl.constexpr, KEYS: gl.constexpr, RANGE: gl.constexpr):  # fmt: skip
    """First key and number of steps of a token tile (for BLOCKS the lists hold the keys)."""
    begin = gl.maximum(first + shift - window + 1, start)
    steps = gl.cdiv(gl.minimum(first + TILE, stop) + shift - begin, KEYS)
    if RANGE:
        # Unused tiles stand behind the tokens, but not behind the keys before them.
        steps = gl.where(first < stop, steps, 0)
    if MODE == BLOCKS:
        steps = gl.load(counts + group.to(gl.int64) * tiles + tile)
    return begin, steps


@gluon.jit
def loader(
    q_desc, q2_desc, g_desc, k_desc, k2_desc, v_desc,
    q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem,
    q_ready, q_empty, ready, empty, starts, counts, capacity, tile_table,
    sequence, query_start, queries, gap, groups, tiles, items, together, programs, window,
    MODE: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr,
    RANGE: gl.constexpr, WITH_GRAD: gl.constexpr,
):  # fmt: skip
    """Bring Q (and with WITH_GRAD dO) of every tile, and K, V of every step."""
    q_bytes: gl.constexpr = (
        q_desc.block_type.nbytes + (q2_desc.block_type.nbytes if SPLIT else 0)
        + (g_desc.block_type.nbytes if WITH_GRAD else 0)
    )  # fmt: skip
    step_bytes: gl.constexpr = (
        k_desc.block_type.nbytes + (k2_desc.block_type.nbytes if SPLIT else 0)
        + v_desc.block_type.nbytes
    )  # fmt: skip
    step = 0
    for item in range(gl.cdiv(items, programs)):
        tile, group, valid = work(item, items, tiles, together, programs)
        if valid:
            first, start, stop, shift = extent(
                tile, tile_table, sequence, query_start, queries, gap, 2 * TOKENS, PACKED, RANGE,
            )  # fmt: skip
            batch = group // groups
            kv = group % groups
            begin, steps = span(first, start, stop, shift, group, tile, tiles, window, counts,
                                MODE, 2 * TOKENS, KEYS, RANGE)  # fmt: skip
            list_base = (group.to(gl.int64) * tiles + tile) * capacity
            for half in gl.static_range(2):
                slot = (item % Q_STAGES) * 2 + half
                bar = q_ready.index(slot)
                mbarrier.wait(q_empty.index(slot), ((item // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(bar, q_bytes)
                tma_load(q_desc, q2_desc, (batch, first + half * TOKENS, kv * HEADS), bar,
                      q_smem.index(slot), q2_smem.index(slot), SPLIT)  # fmt: skip
                if WITH_GRAD:
                    tma.async_copy_global_to_shared(
                        g_desc, [batch, first + half * TOKENS, kv * HEADS, 0], bar,
                        g_smem.index(slot),
                    )  # fmt: skip
            upcoming = begin
            if MODE == BLOCKS:
                upcoming = gl.load(starts + list_base)
            for index in range(steps):
                key = upcoming
                if MODE == BLOCKS:
                    upcoming = gl.load(starts + list_base + gl.minimum(index + 1, capacity - 1))
                else:
                    upcoming += KEYS
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                bar = ready.index(stage)
                mbarrier.expect(bar, step_bytes)
                tma_load(k_desc, k2_desc, (batch, key, kv), bar, k_smem.index(stage),
                      k2_smem.index(stage), SPLIT)  # fmt: skip
                tma.async_copy_global_to_shared(
                    v_desc, [batch, key, kv, 0], bar, v_smem.index(stage)
                )
                step += 1


@gluon.jit
def first_step(begin, starts, bits, list_base, MODE: gl.constexpr):
    """First key and member bits of a tile's first step."""
    if MODE == BLOCKS:
        begin = gl.load(starts + list_base)
        members = gl.load(bits + list_base)
    else:
        members = 0
    return begin, members


@gluon.jit
def next_step(upcoming, members, index, starts, bits, list_base, capacity, first, window,
              MODE: gl.constexpr, HALF: gl.constexpr, TOKENS: gl.constexpr,
              KEYS: gl.constexpr):  # fmt: skip
    """Of step `index`: this consumer's bits and whether it has any use for the keys.

    And first key and bits of the step after it, whose latency the work on this one hides.
    """
    if MODE == BLOCKS:
        mine = (members >> (HALF * TOKENS)) & ((1 << TOKENS) - 1)
        further = list_base + gl.minimum(index + 1, capacity - 1)
        following = gl.load(starts + further)
        members = gl.load(bits + further)
        used = mine != 0
    else:
        mine = 0
        following = upcoming + KEYS
        used = (upcoming < first + TOKENS) & (upcoming + KEYS > first - window + 1)
    return mine, used, following, members


@gluon.jit
def apply_mask(s, key_first, column, token, first, start, window, MODE: gl.constexpr,
         TOKENS: gl.constexpr, KEYS: gl.constexpr, PACKED: gl.constexpr):  # fmt: skip
    """s [64, KEYS] with -inf where a row may not see a key by its place."""
    edge = key_first + KEYS - 1 > first
    if MODE != BLOCKS:
        edge = edge | (key_first <= first + TOKENS - 1 - window) | PACKED
    if edge:
        key = key_first + column
        seen = key[None, :] <= token[:, None]
        if MODE != BLOCKS:
            seen = seen & (key[None, :] > token[:, None] - window)
            if PACKED:
                seen = seen & (key >= start)[None, :]
        s = gl.where(seen, s, float("-inf"))
    return s
