"""dQ of window, block-sparse and causal attention for Hopper GPUs, written in Gluon.

The forward's key schedule (see forward.py) with p recomputed from lse. Before a consumer
starts on its rows it computes delta = sum(output * grad) for them, and leaves delta and lse where
the dK, dV kernel, which runs afterwards, can fetch them with the queries:

    row_lse, row_delta  fp32 [B * HKV, row_stride], place token * HEADS + head in the group; lse in
                        base 2 and +inf for a row that sees no key, so that its p are zero

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
def _row_delta(output, grad, g_b, g_s, g_h, batch, first, kv, groups, sequence, stop,
               HEADS: gl.constexpr, VALUE_WIDTH: gl.constexpr):  # fmt: skip
    """sum over DV of output * grad of 64 rows, [64] fp32; zero for rows past the end."""
    threads: gl.constexpr = VALUE_WIDTH // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, VALUE_WIDTH, layout=gl.SliceLayout(0, layout))
    token = first + row // HEADS
    head = kv * HEADS + row % HEADS
    out_row = ((batch.to(gl.int64) * sequence + token) * groups * HEADS + head) * VALUE_WIDTH
    grad_row = batch.to(gl.int64) * g_b + token.to(gl.int64) * g_s + head.to(gl.int64) * g_h
    mask = (token < stop)[:, None]
    o = gl.load(output + out_row[:, None] + column[None, :], mask=mask, other=0.0)
    g = gl.load(grad + grad_row[:, None] + column[None, :], mask=mask, other=0.0)
    return gl.sum(o.to(gl.float32) * g.to(gl.float32), 1)


@gluon.jit
def _consumer(
    dq_desc, dq2_desc, output, grad, g_b, g_s, g_h, lse, row_lse, row_delta, row_stride, dq,
    q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem,
    q_ready, q_empty, ready, empty, starts, bits, counts, capacity, tile_table,
    sequence, query_start, queries, gap, groups, tiles,
    items, together, programs, window, scale, scale_log2,
    MODE: gl.constexpr, HALF: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, WIDTH: gl.constexpr,
    VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr, RANGE: gl.constexpr,
):  # fmt: skip
    """Rows HALF * 64 .. + 64 of every tile of this program."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    q2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, q_layout, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
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
            head = kv * HEADS + row % HEADS
            alive = token < stop

            found = _row_delta(output, grad, g_b, g_s, g_h, batch, first, kv, groups, sequence,
                               stop, HEADS, VALUE_WIDTH)  # fmt: skip
            delta = gl.convert_layout(found, s_row)
            lse_row = (batch.to(gl.int64) * groups * HEADS + head) * sequence + token
            lse_i = gl.load(lse + lse_row, mask=alive, other=float("inf")) * LOG2_E
            lse_i = gl.where(lse_i == float("-inf"), float("inf"), lse_i)
            stat = group.to(gl.int64) * row_stride + token * HEADS + row % HEADS
            gl.store(row_lse + stat, lse_i, mask=alive)
            gl.store(row_delta + stat, delta, mask=alive)

            slot = (item % Q_STAGES) * 2 + HALF
            q = flat(q_smem.index(slot), 64, WIDTH)
            q2 = q
            if SPLIT:
                q2 = flat(q2_smem.index(slot), 64, 64)
            g = flat(g_smem.index(slot), 64, VALUE_WIDTH)
            acc = gl.zeros([64, WIDTH], gl.float32, q_layout)
            acc2 = gl.zeros([64, 64], gl.float32, q2_layout)
            p = gl.zeros([64, KEYS], gl.float32, s_layout)
            ds = gl.zeros([64, KEYS], gl.float32, s_layout)
            mbarrier.wait(q_ready.index(slot), (item // Q_STAGES) & 1)
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
                    dp = qk_dot(g, g, v_smem.index(stage), v_smem.index(stage), ds,
                                 KEYS, VALUE_WIDTH, False)  # fmt: skip
                    s = warpgroup_mma_wait(1, [s])
                    s = apply_mask(s, key_first, column, position, first_position, start, window,
                             MODE, TOKENS, KEYS, PACKED)  # fmt: skip
                    pivot = lse_i
                    if MODE == BLOCKS:
                        selected = ((mine >> (row // HEADS)) & 1) == 1
                        pivot = gl.where(selected, lse_i, float("inf"))
                    p = gl.exp2(s * scale_log2 - pivot[:, None])
                    dp = warpgroup_mma_wait(0, [dp])
                    ds = p * (dp - delta[:, None])
                    ds_operand = as_operand(ds, dtype, ds_layout)
                    acc = warpgroup_mma(ds_operand, flat(k_smem.index(stage), KEYS, WIDTH), acc,
                                         is_async=True)  # fmt: skip
                    if SPLIT:
                        acc2 = warpgroup_mma(ds_operand, flat(k2_smem.index(stage), KEYS, 64), acc2,
                                              is_async=True)  # fmt: skip
                        acc, acc2 = warpgroup_mma_wait(0, [acc, acc2])
                    else:
                        acc = warpgroup_mma_wait(0, [acc])
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1

            STRIDE: gl.constexpr = WIDTH + (64 if SPLIT else 0)
            found_q = narrow(acc * scale, dtype)
            if PACKED:
                mbarrier.arrive(q_empty.index(slot), count=1)
                store_rows(found_q, dq, batch, first, stop, sequence, groups, kv,
                           HEADS, STRIDE, 0)  # fmt: skip
                if SPLIT:
                    store_rows(narrow(acc2 * scale, dtype), dq, batch, first, stop, sequence,
                               groups, kv, HEADS, STRIDE, WIDTH)  # fmt: skip
            else:
                tma_store(found_q, dq_desc, q_smem.index(slot), batch, first, kv * HEADS, 0)
                if SPLIT:
                    tma_store(narrow(acc2 * scale, dtype), dq2_desc, q2_smem.index(slot),
                              batch, first, kv * HEADS, 128)  # fmt: skip
                mbarrier.arrive(q_empty.index(slot), count=1)


@gluon.jit(do_not_specialize=[*TILE_SIZES, "capacity", "window", "row_stride"])
def dq_kernel(
    q_desc, q2_desc, g_desc, k_desc, k2_desc, v_desc, dq_desc, dq2_desc,
    output, grad, g_b, g_s, g_h, lse, row_lse, row_delta, row_stride, dq,
    starts, bits, counts, capacity, tile_table,
    sequence, query_start, queries, gap, groups, tiles,
    items, together, programs, window, scale, scale_log2,
    MODE: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, WIDTH: gl.constexpr,
    VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr, RANGE: gl.constexpr,
):  # fmt: skip
    """dq [B, S, HQ, D], and the rows' lse and delta for the kernel after it."""
    q_smem = alloc_smem(q_desc, 2 * Q_STAGES)
    g_smem = alloc_smem(g_desc, 2 * Q_STAGES)
    k_smem = alloc_smem(k_desc, STAGES)
    v_smem = alloc_smem(v_desc, STAGES)
    q2_smem = alloc_smem(q2_desc, 2 * Q_STAGES) if SPLIT else q_smem
    k2_smem = alloc_smem(k2_desc, STAGES) if SPLIT else k_smem
    q_ready = barriers(2 * Q_STAGES, 1)
    q_empty = barriers(2 * Q_STAGES, 1)
    ready = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (dq_desc, dq2_desc, output, grad, g_b, g_s, g_h, lse, row_lse, row_delta,
                         row_stride, dq, q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem,
                         q_ready, q_empty, ready, empty, starts, bits, counts, capacity,
                         tile_table, sequence, query_start, queries, gap, groups, tiles,
                         items, together,
                         programs, window, scale, scale_log2,
                         MODE, 0, TOKENS, HEADS, KEYS, STAGES, Q_STAGES, WIDTH,
                         VALUE_WIDTH, SPLIT, PACKED, RANGE)),
            (_consumer, (dq_desc, dq2_desc, output, grad, g_b, g_s, g_h, lse, row_lse, row_delta,
                         row_stride, dq, q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem,
                         q_ready, q_empty, ready, empty, starts, bits, counts, capacity,
                         tile_table, sequence, query_start, queries, gap, groups, tiles,
                         items, together,
                         programs, window, scale, scale_log2,
                         MODE, 1, TOKENS, HEADS, KEYS, STAGES, Q_STAGES, WIDTH,
                         VALUE_WIDTH, SPLIT, PACKED, RANGE)),
            (loader, (q_desc, q2_desc, g_desc, k_desc, k2_desc, v_desc, q_smem, q2_smem, g_smem,
                      k_smem, k2_smem, v_smem, q_ready, q_empty, ready, empty, starts, counts,
                      capacity, tile_table, sequence, query_start, queries, gap, groups, tiles,
                      items, together, programs,
                      window, MODE, TOKENS, HEADS, KEYS, STAGES, Q_STAGES, SPLIT,
                      PACKED, RANGE, True)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
