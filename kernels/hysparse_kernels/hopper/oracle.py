"""Causal attention with its block selection for Hopper GPUs, written in Gluon.

One persistent program per multiprocessor. A program owns a tile of ROWS = 128 rows, 2 * TOKENS
neighbouring tokens times the HEADS query heads of one KV group, and iterates over all keys up to
its last token, KEYS at a time:

    loader      one warp: Q of the tile, then K and V tiles, by the copy engine into a ring
    consumer 0  four warps, rows 0..63:   S = Q K^T, online softmax, O += P V
    consumer 1  four warps, rows 64..127: the same on the other half of the tokens

While one consumer is in its softmax the other one keeps the tensor cores busy; within a consumer
the softmax of one key tile runs beside the P V of the tile before. The maximum of every row over
every block of keys, which the online softmax has in its hands anyway, goes raw into a scratch row
of the program. When a tile is done its consumer reads them back, subtracts lse, takes the maximum
over the heads of the group (P1 Eq. 3 in the log) and selects.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim,
N blocks, K selected. P1 = HySparse, arXiv 2602.03560.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hysparse_kernels import limits
from hysparse_kernels.hopper.common import (
    LN_2,
    TILE_SIZES,
    add,
    alloc_smem,
    as_operand,
    barriers,
    extent,
    flat,
    maximum,
    narrow,
    qk_dot,
    store_rows,
    tma_load,
    tma_store,
    work,
)

LOWEST = gl.constexpr(-2147483648)
MOST_SCORES = gl.constexpr(limits.HOPPER_ORACLE_MAX_BLOCKS)
"""Of all tokens that are ranked at a time: 128 for each thread of a consumer."""


@gluon.jit
def _loader(
    q_desc, q2_desc, k_desc, k2_desc, v_desc,
    q_smem, q2_smem, k_smem, k2_smem, v_smem,
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
    tile_table, sequence, query_start, queries, gap, groups, tiles, items, together, programs,
    TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, PACKED: gl.constexpr, RANGE: gl.constexpr,
):  # fmt: skip
    """Bring Q once a tile and K, V once a step; K and V have rings of their own."""
    q_bytes: gl.constexpr = q_desc.block_type.nbytes + (q2_desc.block_type.nbytes if SPLIT else 0)
    k_bytes: gl.constexpr = k_desc.block_type.nbytes + (k2_desc.block_type.nbytes if SPLIT else 0)
    step = 0
    turn = 0
    for item in range(gl.cdiv(items, programs)):
        tile, group, valid = work(item, items, tiles, together, programs)
        first, start, stop, shift = extent(
            tile, tile_table, sequence, query_start, queries, gap, 2 * TOKENS, PACKED, RANGE
        )
        if valid & (first < stop):
            batch = group // groups
            kv = group % groups
            last = gl.minimum(first + 2 * TOKENS, stop) + shift
            steps = gl.cdiv(last - start, KEYS)
            for half in gl.static_range(2):
                mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
                bar = q_ready.index(half)
                mbarrier.expect(bar, q_bytes)
                token = first + half * TOKENS
                tma_load(q_desc, q2_desc, (batch, token, kv * HEADS), bar, q_smem.index(half),
                      q2_smem.index(half), SPLIT)  # fmt: skip
            for index in range(steps):
                stage = step % STAGES
                phase = (step // STAGES) & 1
                key = start + index * KEYS
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                bar = k_ready.index(stage)
                mbarrier.expect(bar, k_bytes)
                tma_load(k_desc, k2_desc, (batch, key, kv), bar, k_smem.index(stage),
                      k2_smem.index(stage), SPLIT)  # fmt: skip
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                bar = v_ready.index(stage)
                mbarrier.expect(bar, v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    v_desc, [batch, key, kv, 0], bar, v_smem.index(stage)
                )
                step += 1
            turn += 1


@gluon.jit
def _softmax(s, m_i, l_i, key, position, row_scratch, block, num_blocks, scale_log2,
             MASKED: gl.constexpr, SCORES: gl.constexpr,
             KEYS: gl.constexpr, BLOCK: gl.constexpr):  # fmt: skip
    """One step of the online softmax in base 2: p (fp32), alpha, and the new m_i and l_i.

    s [64, KEYS] are raw dot products. With SCORES the maxima over blocks are stored.
    """
    layout: gl.constexpr = s.type.layout
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    if MASKED:
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    if SCORES:
        parts: gl.constexpr = KEYS // BLOCK
        blocked = gl.reshape(s, [64, parts, BLOCK])
        maxima = gl.reduce(blocked, 2, maximum)
        wide: gl.constexpr = maxima.type.layout
        column = block + gl.arange(0, parts, layout=gl.SliceLayout(0, wide))
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
        where = row[:, None] * num_blocks + column[None, :]
        gl.store(row_scratch + where, maxima, mask=(column < num_blocks)[None, :])
        highest = gl.convert_layout(gl.reduce(maxima, 1, maximum), row_layout, assert_trivial=True)
    else:
        highest = gl.max(s, 1)
    m_new = gl.maximum(m_i, highest * scale_log2)
    p = gl.exp2(s * scale_log2 - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    l_i = l_i * alpha + gl.sum(p, 1)
    return p, alpha, m_new, l_i


@gluon.jit
def _select(scratch, lse_scratch, indices, first, start, stop, shift, num_blocks, scale_log2,
            sequence, group, selected, forced_first, forced_recent,
            TOKENS: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
            BLOCKS: gl.constexpr, SELECTED: gl.constexpr):  # fmt: skip
    """Indices of TOKENS tokens from the raw maxima of their rows (P1 Eq. 3); lowest id wins a tie.

    The K-th largest score is found bit by bit, so that the cost does not depend on K, and what is
    above it is written in ascending order of ids.
    """
    # What one pass holds of a thread's registers does not grow with the sequence.
    ROWS: gl.constexpr = min(TOKENS, 4, MOST_SCORES // BLOCKS)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [ROWS, 4 // ROWS], [1, 0])
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, layout))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    for part in range(TOKENS // ROWS):
        offset = part * ROWS + row
        token = first + offset
        own = (token + shift - start) // BLOCK
        visible = (block[None, :] <= own[:, None]) & (block < num_blocks)[None, :]
        best = gl.full([ROWS, BLOCKS], float("-inf"), gl.float32, layout)
        for head in range(HEADS):
            head_row = offset * HEADS + head
            lse_i = gl.load(lse_scratch + head_row)
            raw = gl.load(scratch + head_row[:, None] * num_blocks + block[None, :],
                          mask=visible, other=float("-inf"))  # fmt: skip
            best = gl.maximum(best, raw * scale_log2 - lse_i[:, None])
        forced = (block[None, :] < forced_first) | (block[None, :] > own[:, None] - forced_recent)
        best = gl.where(forced, float("inf"), best) + 0.0
        # Like the reference, never a block in which no key has any weight.
        visible = visible & (best != float("-inf"))
        bits = best.to(gl.int32, bitcast=True)
        keys = gl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        keys = gl.where(visible, keys, LOWEST)
        # The largest threshold that at least `selected` keys reach, from its highest bit down.
        threshold = gl.full([ROWS], LOWEST, gl.int32, gl.SliceLayout(1, layout))
        for bit in range(32):
            # Adding to the lowest number turns its bits on in the order of unsigned ones.
            candidate = threshold + (1 << (31 - bit))
            reached = gl.sum((keys >= candidate[:, None]).to(gl.int32), 1)
            threshold = gl.where(reached >= selected, candidate, threshold)
        above = keys > threshold[:, None]
        equal = (keys == threshold[:, None]) & visible
        open_slots = selected - gl.sum(above.to(gl.int32), 1)
        order = gl.associative_scan(equal.to(gl.int32), 1, add)
        chosen = above | (equal & (order <= open_slots[:, None]))
        place = gl.associative_scan(chosen.to(gl.int32), 1, add) - 1
        count = gl.sum(chosen.to(gl.int32), 1)
        out = indices + (group.to(gl.int64) * sequence + token) * selected
        alive = token < stop
        gl.store(out[:, None] + place, block[None, :] + gl.zeros([ROWS, BLOCKS], gl.int32, layout),
                 mask=chosen & alive[:, None])  # fmt: skip
        slot = gl.arange(0, SELECTED, layout=gl.SliceLayout(0, layout))
        nothing = gl.full([ROWS, SELECTED], -1, gl.int32, layout)
        gl.store(out[:, None] + slot[None, :], nothing,
                 mask=(slot[None, :] >= count[:, None]) & (slot < selected)[None, :]
                 & alive[:, None])  # fmt: skip


@gluon.jit
def _consumer(
    o_desc, output, lse, indices, scratch,
    q_smem, q2_smem, k_smem, k2_smem, v_smem, o_smem,
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
    tile_table, sequence, query_start, queries, gap, groups, tiles,
    items, together, programs, scale_log2,
    num_blocks, selected, forced_first, forced_recent,
    HALF: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, WIDTH: gl.constexpr, VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr,
    PACKED: gl.constexpr, RANGE: gl.constexpr, SCORES: gl.constexpr, BLOCK: gl.constexpr,
    BLOCKS: gl.constexpr, SELECTED: gl.constexpr,
):  # fmt: skip
    """Rows HALF * 64 .. + 64 of every tile of this program."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = v_smem.dtype
    q = flat(q_smem.index(HALF), 64, WIDTH)
    q2 = q
    if SPLIT:
        q2 = flat(q2_smem.index(HALF), 64, 64)
    row = gl.arange(0, 64, layout=s_row)
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, s_layout))
    rows = scratch  # none without scores
    row_scratch = scratch
    if SCORES:
        rows = scratch + (gl.program_id(0).to(gl.int64) * 2 + HALF) * 64 * (num_blocks + 1)
        row_scratch = rows + 64
    step = 0
    turn = 0
    for item in range(gl.cdiv(items, programs)):
        tile, group, valid = work(item, items, tiles, together, programs)
        tile_first, start, stop, shift = extent(
            tile, tile_table, sequence, query_start, queries, gap, 2 * TOKENS, PACKED, RANGE
        )
        if valid & (tile_first < stop):
            batch = group // groups
            kv = group % groups
            steps = gl.cdiv(gl.minimum(tile_first + 2 * TOKENS, stop) + shift - start, KEYS)
            first = tile_first + HALF * TOKENS
            token = first + row // HEADS
            position = token + shift
            # Steps whose keys every row of this consumer sees.
            clear = gl.minimum((first + shift + 1 - start) // KEYS, steps)

            m_i = gl.full([64], float("-inf"), gl.float32, s_row)
            l_i = gl.zeros([64], gl.float32, s_row)
            acc = gl.zeros([64, VALUE_WIDTH], gl.float32, o_layout)
            mbarrier.wait(q_ready.index(HALF), turn & 1)

            # Step 0: no P V to run beside.
            mbarrier.wait(k_ready.index(step % STAGES), (step // STAGES) & 1)
            donor = gl.zeros([64, KEYS], gl.float32, s_layout)
            stage = step % STAGES
            s = qk_dot(q, q2, k_smem.index(stage), k2_smem.index(stage), donor,
                        KEYS, WIDTH, SPLIT)  # fmt: skip
            s = warpgroup_mma_wait(0, [s])
            mbarrier.arrive(k_empty.index(step % STAGES), count=1)
            key = start + column
            p, alpha, m_i, l_i = _softmax(
                s, m_i, l_i, key, position, row_scratch, 0, num_blocks, scale_log2,
                True, SCORES, KEYS, BLOCK,
            )  # fmt: skip
            p_operand = as_operand(p, dtype, p_layout)

            for index in range(1, clear):
                now = step + index
                stage = now % STAGES
                before = (now - 1) % STAGES
                mbarrier.wait(k_ready.index(stage), (now // STAGES) & 1)
                s = qk_dot(q, q2, k_smem.index(stage), k2_smem.index(stage), p,
                            KEYS, WIDTH, SPLIT)  # fmt: skip
                mbarrier.wait(v_ready.index(before), ((now - 1) // STAGES) & 1)
                v = flat(v_smem.index(before), KEYS, VALUE_WIDTH)
                acc = warpgroup_mma(p_operand, v, acc, is_async=True)
                s = warpgroup_mma_wait(1, [s])
                mbarrier.arrive(k_empty.index(stage), count=1)
                p, alpha, m_i, l_i = _softmax(
                    s, m_i, l_i, key, position, row_scratch, index * (KEYS // BLOCK), num_blocks,
                    scale_log2, False, SCORES, KEYS, BLOCK,
                )  # fmt: skip
                acc = warpgroup_mma_wait(0, [acc])
                mbarrier.arrive(v_empty.index(before), count=1)
                acc = acc * gl.convert_layout(alpha, o_row, assert_trivial=True)[:, None]
                p_operand = as_operand(p, dtype, p_layout)

            for index in range(gl.maximum(clear, 1), steps):
                now = step + index
                stage = now % STAGES
                before = (now - 1) % STAGES
                mbarrier.wait(k_ready.index(stage), (now // STAGES) & 1)
                s = qk_dot(q, q2, k_smem.index(stage), k2_smem.index(stage), p,
                            KEYS, WIDTH, SPLIT)  # fmt: skip
                mbarrier.wait(v_ready.index(before), ((now - 1) // STAGES) & 1)
                v = flat(v_smem.index(before), KEYS, VALUE_WIDTH)
                acc = warpgroup_mma(p_operand, v, acc, is_async=True)
                s, acc = warpgroup_mma_wait(0, [s, acc])
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.arrive(v_empty.index(before), count=1)
                p, alpha, m_i, l_i = _softmax(
                    s, m_i, l_i, key + index * KEYS, position, row_scratch,
                    index * (KEYS // BLOCK), num_blocks, scale_log2, True, SCORES, KEYS, BLOCK,
                )  # fmt: skip
                acc = acc * gl.convert_layout(alpha, o_row, assert_trivial=True)[:, None]
                p_operand = as_operand(p, dtype, p_layout)

            step += steps
            before = (step - 1) % STAGES
            mbarrier.wait(v_ready.index(before), ((step - 1) // STAGES) & 1)
            v = flat(v_smem.index(before), KEYS, VALUE_WIDTH)
            acc = warpgroup_mma(p_operand, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(v_empty.index(before), count=1)

            lse_i = m_i + gl.log2(l_i)
            share = gl.convert_layout(1.0 / l_i, o_row, assert_trivial=True)
            acc = acc * share[:, None]
            head = kv * HEADS + row % HEADS
            alive = token < stop
            lse_row = (batch.to(gl.int64) * groups * HEADS + head) * sequence + token
            gl.store(lse + lse_row, lse_i * LN_2, mask=alive)
            if PACKED:
                mbarrier.arrive(q_empty.index(HALF), count=1)
                store_rows(narrow(acc, dtype), output, batch, first, stop, sequence, groups, kv,
                           HEADS, VALUE_WIDTH, 0)  # fmt: skip
            else:
                tma_store(
                    narrow(acc, dtype), o_desc, o_smem.index(HALF), batch, first, kv * HEADS, 0
                )
                mbarrier.arrive(q_empty.index(HALF), count=1)
            if SCORES:
                gl.store(rows + row, lse_i)
                gl.thread_barrier()
                _select(row_scratch, rows, indices, first, start, stop, shift, num_blocks,
                        scale_log2, sequence, group, selected, forced_first, forced_recent,
                        TOKENS, HEADS, BLOCK, BLOCKS, SELECTED)  # fmt: skip
                gl.thread_barrier()
            turn += 1


@gluon.jit(
    do_not_specialize=[*TILE_SIZES, "num_blocks", "selected", "forced_first", "forced_recent"]
)
def oracle_kernel(
    q_desc, q2_desc, k_desc, k2_desc, v_desc, o_desc,
    output, lse, indices, scratch, tile_table,
    sequence, query_start, queries, gap, groups, tiles,
    items, together, programs, scale_log2, num_blocks,
    selected, forced_first, forced_recent,
    TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    WIDTH: gl.constexpr, VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr,
    RANGE: gl.constexpr, SCORES: gl.constexpr, BLOCK: gl.constexpr, BLOCKS: gl.constexpr,
    SELECTED: gl.constexpr,
):  # fmt: skip
    """See the module; launched with `programs` programs of four warps (and eight more inside)."""
    q_smem = alloc_smem(q_desc, 2)
    k_smem = alloc_smem(k_desc, STAGES)
    v_smem = alloc_smem(v_desc, STAGES)
    q2_smem = alloc_smem(q2_desc, 2) if SPLIT else q_smem
    k2_smem = alloc_smem(k2_desc, STAGES) if SPLIT else k_smem
    # The output leaves through the place of its query where that is as wide.
    o_smem = alloc_smem(o_desc, 2) if WIDTH != VALUE_WIDTH else q_smem
    q_ready = barriers(2, 1)
    q_empty = barriers(2, 1)
    k_ready = barriers(STAGES, 1)
    k_empty = barriers(STAGES, 2)
    v_ready = barriers(STAGES, 1)
    v_empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (o_desc, output, lse, indices, scratch,
                         q_smem, q2_smem, k_smem, k2_smem, v_smem, o_smem,
                         q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                         tile_table, sequence, query_start, queries, gap, groups, tiles,
                         items, together,
                         programs, scale_log2, num_blocks, selected, forced_first, forced_recent,
                         0, TOKENS, HEADS, KEYS, STAGES, WIDTH, VALUE_WIDTH, SPLIT, PACKED,
                         RANGE, SCORES, BLOCK, BLOCKS, SELECTED)),
            (_consumer, (o_desc, output, lse, indices, scratch,
                         q_smem, q2_smem, k_smem, k2_smem, v_smem, o_smem,
                         q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                         tile_table, sequence, query_start, queries, gap, groups, tiles,
                         items, together,
                         programs, scale_log2, num_blocks, selected, forced_first, forced_recent,
                         1, TOKENS, HEADS, KEYS, STAGES, WIDTH, VALUE_WIDTH, SPLIT, PACKED,
                         RANGE, SCORES, BLOCK, BLOCKS, SELECTED)),
            (_loader, (q_desc, q2_desc, k_desc, k2_desc, v_desc,
                       q_smem, q2_smem, k_smem, k2_smem, v_smem,
                       q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                       tile_table, sequence, query_start, queries, gap, groups, tiles,
                       items, together,
                       programs, TOKENS, HEADS, KEYS, STAGES, SPLIT, PACKED, RANGE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
