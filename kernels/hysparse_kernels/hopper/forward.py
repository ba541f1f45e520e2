"""Attention over a window or over selected blocks for Hopper GPUs, forward, written in Gluon.

One persistent program per multiprocessor with a loader and two consumers, as in oracle.py. A
tile is 2 * TOKENS neighbouring tokens times the HEADS query heads of one KV group; each consumer
owns 64 rows of it. The loader brings the keys that any token of the tile sees: with BLOCKS the
union of their selections. A consumer passes over a block that none of its own tokens selected, so
that disagreeing neighbours cost loads and no arithmetic.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hysparse_kernels.hopper.common import (
    BLOCKS,
    LN_2,
    LOG2_E,
    TILE_SIZES,
    alloc_smem,
    as_operand,
    barriers,
    extent,
    flat,
    narrow,
    position_of,
    qk_dot,
    store_rows,
    tma_store,
    work,
)
from hysparse_kernels.hopper.tiling import apply_mask, first_step, loader, next_step, span


@gluon.jit
def _softmax(s, m_i, l_i, mine, row, scale_log2, MODE: gl.constexpr, HEADS: gl.constexpr):
    """One step of the online softmax in base 2: p (fp32), alpha, and the new m_i and l_i.

    s [64, KEYS] are raw dot products, -inf where hidden by place; with BLOCKS bit r of `mine` says
    that token r of the consumer selected the block. A row may see no key here, or none so far.
    """
    infinite = gl.full([64], float("inf"), gl.float32, row.type.layout)
    highest = gl.max(s, 1) * scale_log2
    if MODE == BLOCKS:
        selected = ((mine >> (row // HEADS)) & 1) == 1
        highest = gl.where(selected, highest, float("-inf"))
    m_new = gl.maximum(m_i, highest)
    # An infinite pivot makes the p of a row that sees nothing here zero.
    known = m_new != float("-inf")
    alpha = gl.exp2(m_i - gl.where(known, m_new, 0.0))
    pivot = gl.where(known, m_new, infinite)
    if MODE == BLOCKS:
        pivot = gl.where(selected, pivot, infinite)
    p = gl.exp2(s * scale_log2 - pivot[:, None])
    return p, alpha, m_new, l_i * alpha + gl.sum(p, 1)


@gluon.jit
def _consumer(
    o_desc, output, lse, sink, q_smem, q2_smem, k_smem, k2_smem, v_smem, o_smem,
    q_ready, q_empty, ready, empty, starts, bits, counts, capacity, tile_table,
    sequence, query_start, queries, gap, groups, tiles,
    items, together, programs, window, scale_log2,
    MODE: gl.constexpr, HALF: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, WIDTH: gl.constexpr,
    VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr,
    RANGE: gl.constexpr, HAS_SINK: gl.constexpr, OWN_OUTPUT: gl.constexpr,
):  # fmt: skip
    """Rows HALF * 64 .. + 64 of every tile of this program."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = v_smem.dtype
    row = gl.arange(0, 64, layout=s_row)
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, s_layout))
    step = 0
    for item in range(gl.cdiv(items, programs)):
        tile, group, valid = work(item, items, tiles, together, programs)
        if valid:
            tile_first, start, stop, shift = extent(
                tile, tile_table, sequence, query_start, queries, gap, 2 * TOKENS, PACKED, RANGE,
            )  # fmt: skip
            batch = group // groups
            kv = group % groups
            begin, steps = span(tile_first, start, stop, shift, group, tile, tiles, window, counts,
                                MODE, 2 * TOKENS, KEYS, RANGE)  # fmt: skip
            list_base = (group.to(gl.int64) * tiles + tile) * capacity
            first = tile_first + HALF * TOKENS
            token = first + row // HEADS
            first_position = position_of(first, shift, queries, gap, MODE, RANGE)
            position = position_of(token, shift, queries, gap, MODE, RANGE)
            slot = (item % Q_STAGES) * 2 + HALF
            q_tile = flat(q_smem.index(slot), 64, WIDTH)
            q2 = q_tile
            mbarrier.wait(q_ready.index(slot), (item // Q_STAGES) & 1)
            q = q_tile
            if SPLIT:
                q2 = flat(q2_smem.index(slot), 64, 64)
            elif VALUE_WIDTH != KEYS:
                # From registers Q costs the shared memory no bandwidth at every step. (Where both
                # products have one shape, ptxas of CUDA 13 puts Q and P into the same registers.)
                q = q_tile.load(q_layout)
            m_i = gl.full([64], float("-inf"), gl.float32, s_row)
            l_i = gl.zeros([64], gl.float32, s_row)
            acc = gl.zeros([64, VALUE_WIDTH], gl.float32, o_layout)
            p = gl.zeros([64, KEYS], gl.float32, s_layout)
            upcoming, members = first_step(begin, starts, bits, list_base, MODE)
            for index in range(steps):
                key_first = upcoming
                mine, used, upcoming, members = next_step(
                    upcoming, members, index, starts, bits, list_base, capacity, first_position,
                    window, MODE, HALF, TOKENS, KEYS,
                )  # fmt: skip
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                if used:
                    s = qk_dot(q, q2, k_smem.index(stage), k2_smem.index(stage), p,
                                KEYS, WIDTH, SPLIT)  # fmt: skip
                    s = warpgroup_mma_wait(0, [s])
                    s = apply_mask(s, key_first, column, position, first_position, start, window,
                             MODE, TOKENS, KEYS, PACKED)  # fmt: skip
                    p, alpha, m_i, l_i = _softmax(s, m_i, l_i, mine, row, scale_log2, MODE, HEADS)
                    acc = acc * gl.convert_layout(alpha, o_row, assert_trivial=True)[:, None]
                    p_operand = as_operand(p, dtype, p_layout)
                    v = flat(v_smem.index(stage), KEYS, VALUE_WIDTH)
                    acc = warpgroup_mma(p_operand, v, acc, is_async=True)
                    acc = warpgroup_mma_wait(0, [acc])
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1

            head = kv * HEADS + row % HEADS
            if HAS_SINK:
                extra = gl.load(sink + head).to(gl.float32) * LOG2_E
                m_new = gl.maximum(m_i, extra)
                pivot = gl.where(m_new == float("-inf"), 0.0, m_new)
                alpha = gl.exp2(m_i - pivot)
                l_i = l_i * alpha + gl.exp2(extra - pivot)
                acc = acc * gl.convert_layout(alpha, o_row, assert_trivial=True)[:, None]
                m_i = m_new
            empty_row = l_i == 0.0
            safe = gl.where(empty_row, 1.0, l_i)
            lse_i = gl.where(empty_row, float("-inf"), (m_i + gl.log2(safe)) * LN_2)
            acc = acc * gl.convert_layout(1.0 / safe, o_row, assert_trivial=True)[:, None]
            alive = token < stop
            lse_row = (batch.to(gl.int64) * groups * HEADS + head) * sequence + token
            gl.store(lse + lse_row, lse_i, mask=alive)
            if PACKED:
                mbarrier.arrive(q_empty.index(slot), count=1)
                store_rows(narrow(acc, dtype), output, batch, first, stop, sequence, groups, kv,
                           HEADS, VALUE_WIDTH, 0)  # fmt: skip
            elif OWN_OUTPUT:
                mbarrier.arrive(q_empty.index(slot), count=1)
                tma_store(
                    narrow(acc, dtype), o_desc, o_smem.index(HALF), batch, first, kv * HEADS, 0
                )
            else:
                tma_store(
                    narrow(acc, dtype), o_desc, q_smem.index(slot), batch, first, kv * HEADS, 0
                )
                mbarrier.arrive(q_empty.index(slot), count=1)


@gluon.jit(do_not_specialize=[*TILE_SIZES, "capacity", "window"])
def forward_kernel(
    q_desc, q2_desc, k_desc, k2_desc, v_desc, o_desc, output, lse, sink,
    starts, bits, counts, capacity, tile_table,
    sequence, query_start, queries, gap, groups, tiles,
    items, together, programs, window, scale_log2,
    MODE: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, WIDTH: gl.constexpr,
    VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr, RANGE: gl.constexpr,
    HAS_SINK: gl.constexpr,
):  # fmt: skip
    """output [B, S, HQ, DV] and lse [B, HQ, S] (natural log, sink included)."""
    OWN_OUTPUT: gl.constexpr = WIDTH != VALUE_WIDTH
    q_smem = alloc_smem(q_desc, 2 * Q_STAGES)
    k_smem = alloc_smem(k_desc, STAGES)
    v_smem = alloc_smem(v_desc, STAGES)
    q2_smem = alloc_smem(q2_desc, 2 * Q_STAGES) if SPLIT else q_smem
    k2_smem = alloc_smem(k2_desc, STAGES) if SPLIT else k_smem
    o_smem = alloc_smem(o_desc, 2) if OWN_OUTPUT else q_smem
    q_ready = barriers(2 * Q_STAGES, 1)
    q_empty = barriers(2 * Q_STAGES, 1)
    ready = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (o_desc, output, lse, sink, q_smem, q2_smem, k_smem, k2_smem, v_smem,
                         o_smem, q_ready, q_empty, ready, empty, starts, bits, counts, capacity,
                         tile_table, sequence, query_start, queries, gap, groups, tiles,
                         items, together,
                         programs, window, scale_log2, MODE, 0, TOKENS, HEADS, KEYS, STAGES,
                         Q_STAGES, WIDTH, VALUE_WIDTH, SPLIT, PACKED, RANGE, HAS_SINK, OWN_OUTPUT)),
            (_consumer, (o_desc, output, lse, sink, q_smem, q2_smem, k_smem, k2_smem, v_smem,
                         o_smem, q_ready, q_empty, ready, empty, starts, bits, counts, capacity,
                         tile_table, sequence, query_start, queries, gap, groups, tiles,
                         items, together,
                         programs, window, scale_log2, MODE, 1, TOKENS, HEADS, KEYS, STAGES,
                         Q_STAGES, WIDTH, VALUE_WIDTH, SPLIT, PACKED, RANGE, HAS_SINK, OWN_OUTPUT)),
            (loader, (q_desc, q2_desc, q_desc, k_desc, k2_desc, v_desc, q_smem, q2_smem, q_smem,
                      k_smem, k2_smem, v_smem, q_ready, q_empty, ready, empty, starts, counts,
                      capacity, tile_table, sequence, query_start, queries, gap, groups, tiles,
                      items, together, programs,
                      window, MODE, TOKENS, HEADS, KEYS, STAGES, Q_STAGES, SPLIT,
                      PACKED, RANGE, False)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
