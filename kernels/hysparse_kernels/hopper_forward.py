"""Attention over a window or over selected blocks for Hopper GPUs, forward, written in Gluon.

One persistent program per multiprocessor with a loader and two consumers, as in hopper_oracle.py. A
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hysparse_kernels.hopper_common import (
    BLOCKS,
    LN_2,
    LOG2_E,
    as_operand,
    extent,
    fetch,
    flat,
    narrow,
    product,
    span,
    work,
)


@gluon.jit
def _loader(
    q_desc, q2_desc, k_desc, k2_desc, v_desc, q_smem, q2_smem, k_smem, k2_smem, v_smem,
    q_ready, q_empty, ready, empty, starts, counts, capacity, tile_table,
    sequence, groups, tiles, items, programs, window,
    MODE: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Bring Q of every tile and K, V of every step."""
    q_bytes: gl.constexpr = q_desc.block_type.nbytes + (q2_desc.block_type.nbytes if SPLIT else 0)
    step_bytes: gl.constexpr = (
        k_desc.block_type.nbytes + (k2_desc.block_type.nbytes if SPLIT else 0)
        + v_desc.block_type.nbytes
    )  # fmt: skip
    step = 0
    for item in range(gl.cdiv(items, programs)):
        tile, group, valid = work(item, items, tiles, programs)
        if valid:
            first, start, stop = extent(tile, tile_table, sequence, 2 * TOKENS, PACKED)
            batch = group // groups
            kv = group % groups
            begin, steps = span(first, start, stop, group, tile, tiles, window, counts,
                                MODE, 2 * TOKENS, KEYS)  # fmt: skip
            list_base = (group.to(gl.int64) * tiles + tile) * capacity
            for half in gl.static_range(2):
                slot = (item % Q_STAGES) * 2 + half
                mbarrier.wait(q_empty.index(slot), ((item // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(q_ready.index(slot), q_bytes)
                fetch(q_desc, q2_desc, (batch, first + half * TOKENS, kv * HEADS),
                      q_ready.index(slot), q_smem.index(slot), q2_smem.index(slot),
                      SPLIT)  # fmt: skip
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
                fetch(k_desc, k2_desc, (batch, key, kv), bar, k_smem.index(stage),
                      k2_smem.index(stage), SPLIT)  # fmt: skip
                tma.async_copy_global_to_shared(
                    v_desc, [batch, key, kv, 0], bar, v_smem.index(stage)
                )
                step += 1


@gluon.jit
def _consumer(
    o_desc, output, lse, sink, q_smem, q2_smem, k_smem, k2_smem, v_smem, o_smem,
    q_ready, q_empty, ready, empty, starts, bits, counts, capacity, tile_table,
    sequence, groups, tiles, items, programs, window, scale_log2,
    MODE: gl.constexpr, HALF: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, WIDTH: gl.constexpr,
    VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr,
    HAS_SINK: gl.constexpr, OWN_OUTPUT: gl.constexpr,
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
    infinite = gl.full([64], float("inf"), gl.float32, s_row)
    step = 0
    for item in range(gl.cdiv(items, programs)):
        tile, group, valid = work(item, items, tiles, programs)
        if valid:
            tile_first, start, stop = extent(tile, tile_table, sequence, 2 * TOKENS, PACKED)
            batch = group // groups
            kv = group % groups
            begin, steps = span(tile_first, start, stop, group, tile, tiles, window, counts,
                                MODE, 2 * TOKENS, KEYS)  # fmt: skip
            list_base = (group.to(gl.int64) * tiles + tile) * capacity
            first = tile_first + HALF * TOKENS
            token = first + row // HEADS
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
            peak = gl.full([64], float("-inf"), gl.float32, s_row)
            total = gl.zeros([64], gl.float32, s_row)
            o = gl.zeros([64, VALUE_WIDTH], gl.float32, o_layout)
            weights = gl.zeros([64, KEYS], gl.float32, s_layout)
            upcoming = begin
            upcoming_bits = 0
            if MODE == BLOCKS:
                upcoming = gl.load(starts + list_base)
                upcoming_bits = gl.load(bits + list_base)
            for index in range(steps):
                key_first = upcoming
                if MODE == BLOCKS:
                    mine = (upcoming_bits >> (HALF * TOKENS)) & ((1 << TOKENS) - 1)
                    further = list_base + gl.minimum(index + 1, capacity - 1)
                    upcoming = gl.load(starts + further)
                    upcoming_bits = gl.load(bits + further)
                    used = mine != 0
                else:
                    mine = 0
                    upcoming += KEYS
                    used = (key_first < first + TOKENS) & (key_first + KEYS > first - window + 1)
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                if used:
                    s = product(q, q2, k_smem.index(stage), k2_smem.index(stage), weights,
                                KEYS, WIDTH, SPLIT)  # fmt: skip
                    s = warpgroup_mma_wait(0, [s])
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
                    highest = gl.max(s, 1) * scale_log2
                    if MODE == BLOCKS:
                        picked = ((mine >> (row // HEADS)) & 1) == 1
                        highest = gl.where(picked, highest, float("-inf"))
                    new_peak = gl.maximum(peak, highest)
                    # An infinite pivot makes the weights of a row that sees nothing here zero.
                    known = new_peak != float("-inf")
                    decay = gl.exp2(peak - gl.where(known, new_peak, 0.0))
                    pivot = gl.where(known, new_peak, infinite)
                    if MODE == BLOCKS:
                        pivot = gl.where(picked, pivot, infinite)
                    weights = gl.exp2(s * scale_log2 - pivot[:, None])
                    total = total * decay + gl.sum(weights, 1)
                    peak = new_peak
                    o = o * gl.convert_layout(decay, o_row, assert_trivial=True)[:, None]
                    p = as_operand(weights, dtype, p_layout)
                    o = warpgroup_mma(p, flat(v_smem.index(stage), KEYS, VALUE_WIDTH), o,
                                      is_async=True)  # fmt: skip
                    o = warpgroup_mma_wait(0, [o])
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1

            head = kv * HEADS + row % HEADS
            if HAS_SINK:
                extra = gl.load(sink + head).to(gl.float32) * LOG2_E
                new_peak = gl.maximum(peak, extra)
                pivot = gl.where(new_peak == float("-inf"), 0.0, new_peak)
                decay = gl.exp2(peak - pivot)
                total = total * decay + gl.exp2(extra - pivot)
                o = o * gl.convert_layout(decay, o_row, assert_trivial=True)[:, None]
                peak = new_peak
            empty_row = total == 0.0
            safe = gl.where(empty_row, 1.0, total)
            log_total = gl.where(empty_row, float("-inf"), (peak + gl.log2(safe)) * LN_2)
            o = o * gl.convert_layout(1.0 / safe, o_row, assert_trivial=True)[:, None]
            alive = token < stop
            place = (batch.to(gl.int64) * groups * HEADS + head) * sequence + token
            gl.store(lse + place, log_total, mask=alive)
            if PACKED:
                # The copy engine would write over the document behind this one.
                mbarrier.arrive(q_empty.index(slot), count=1)
                line = gl.arange(0, 64, layout=o_row)
                o_token = first + line // HEADS
                o_place = (batch.to(gl.int64) * sequence + o_token) * groups * HEADS
                o_place += kv * HEADS + line % HEADS
                o_column = gl.arange(0, VALUE_WIDTH, layout=gl.SliceLayout(0, o_layout))
                gl.store(output + o_place[:, None] * VALUE_WIDTH + o_column[None, :],
                         narrow(o, dtype), mask=(o_token < stop)[:, None])  # fmt: skip
            else:
                if OWN_OUTPUT:
                    out = o_smem.index(HALF)
                    mbarrier.arrive(q_empty.index(slot), count=1)
                else:
                    out = q_smem.index(slot)
                flat(out, 64, VALUE_WIDTH).store(narrow(o, dtype))
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(o_desc, [batch, first, kv * HEADS, 0], out)
                tma.store_wait(0)
                gl.thread_barrier()
                if not OWN_OUTPUT:
                    mbarrier.arrive(q_empty.index(slot), count=1)


@gluon.jit(
    do_not_specialize=["sequence", "groups", "tiles", "items", "programs", "capacity", "window"]
)
def forward_kernel(
    q_desc, q2_desc, k_desc, k2_desc, v_desc, o_desc, output, lse, sink,
    starts, bits, counts, capacity, tile_table,
    sequence, groups, tiles, items, programs, window, scale_log2,
    MODE: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, WIDTH: gl.constexpr,
    VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    """output [B, S, HQ, DV] and lse [B, HQ, S] (natural log, sink included)."""
    dtype: gl.constexpr = q_desc.dtype
    OWN_OUTPUT: gl.constexpr = WIDTH != VALUE_WIDTH
    q_smem = gl.allocate_shared_memory(
        dtype, [2 * Q_STAGES, 1, TOKENS, HEADS, WIDTH], q_desc.layout
    )
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, KEYS, 1, WIDTH], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, KEYS, 1, VALUE_WIDTH], v_desc.layout)
    q2_smem = q_smem
    k2_smem = k_smem
    if SPLIT:
        q2_smem = gl.allocate_shared_memory(
            dtype, [2 * Q_STAGES, 1, TOKENS, HEADS, 64], q2_desc.layout
        )
        k2_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, KEYS, 1, 64], k2_desc.layout)
    o_smem = q_smem
    if OWN_OUTPUT:
        o_smem = gl.allocate_shared_memory(dtype, [2, 1, TOKENS, HEADS, VALUE_WIDTH], o_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2 * Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * Q_STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(2 * Q_STAGES):
        mbarrier.init(q_ready.index(index), count=1)
        mbarrier.init(q_empty.index(index), count=1)
    for index in gl.static_range(STAGES):
        mbarrier.init(ready.index(index), count=1)
        mbarrier.init(empty.index(index), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (o_desc, output, lse, sink, q_smem, q2_smem, k_smem, k2_smem, v_smem,
                         o_smem, q_ready, q_empty, ready, empty, starts, bits, counts, capacity,
                         tile_table, sequence, groups, tiles, items, programs, window, scale_log2,
                         MODE, 0, TOKENS, HEADS, KEYS, STAGES, Q_STAGES, WIDTH, VALUE_WIDTH, SPLIT,
                         PACKED, HAS_SINK, OWN_OUTPUT)),
            (_consumer, (o_desc, output, lse, sink, q_smem, q2_smem, k_smem, k2_smem, v_smem,
                         o_smem, q_ready, q_empty, ready, empty, starts, bits, counts, capacity,
                         tile_table, sequence, groups, tiles, items, programs, window, scale_log2,
                         MODE, 1, TOKENS, HEADS, KEYS, STAGES, Q_STAGES, WIDTH, VALUE_WIDTH, SPLIT,
                         PACKED, HAS_SINK, OWN_OUTPUT)),
            (_loader, (q_desc, q2_desc, k_desc, k2_desc, v_desc, q_smem, q2_smem, k_smem, k2_smem,
                       v_smem, q_ready, q_empty, ready, empty, starts, counts, capacity, tile_table,
                       sequence, groups, tiles, items, programs, window,
                       MODE, TOKENS, HEADS, KEYS, STAGES, Q_STAGES, SPLIT, PACKED)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
