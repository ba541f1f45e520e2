"""dK and dV of window, block-sparse and causal attention for Hopper GPUs, written in Gluon.

A program owns one block of KEYS keys of one KV group. The loader brings its keys and values once
and then, one after the other, the parts (TOKENS neighbouring tokens times HEADS query heads, 64
rows) that read them; two consumers take the parts in turn, each with sums of its own that are added
at the end, always in the same order:

    S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q

With BLOCKS the parts come from the inverse index of a selection, and a program takes one work item
of one block, see block_lists.WorkItems. The items of one segment of the sequence run at the same
time and find its queries in the L2 cache, however far apart their blocks are; and a block that
every token reads is cut up. The first program of a block stores its sums, a later one waits until
the one before is done and adds to them, so that no float is ever added in an order of chance.
Programs are started in the order of their numbers, and none waits for a higher one.

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

from hysparse_kernels.hopper.common import (
    BLOCKS,
    alloc_smem,
    as_operand,
    barriers,
    flat,
    position_of,
    tma_load,
)


@gluon.jit
def _task(block_first, block_stop, document_stop, item_entry, item_first, item_stop, item_after,
          window, sequence, query_start, queries, gap, blocks, MODE: gl.constexpr,
          TOKENS: gl.constexpr, KEYS: gl.constexpr, PACKED: gl.constexpr,
          RANGE: gl.constexpr):  # fmt: skip
    """What this program does.

    Returns group, first key, end of the keys, first and last part (BLOCKS: places in the lists),
    one past the last position that a token may have, for BLOCKS the program to wait for (-1 to
    store what is first, -2 if there is nothing to do), shift, and the first token of the keys' row.
    """
    entry = gl.program_id(0)
    after = -1
    if MODE == BLOCKS:
        first = gl.load(item_first + entry).to(gl.int32)
        stop = gl.load(item_stop + entry).to(gl.int32)
        after = gl.load(item_after + entry)
        entry = gl.load(item_entry + entry)
    group = entry // blocks
    block = entry % blocks
    if PACKED:
        key = gl.load(block_first + block)
        keys_stop = gl.load(block_stop + block)
    else:
        key = block * KEYS
        keys_stop = gl.minimum(key + KEYS, sequence)
    limit = sequence
    shift = 0
    row_first = 0
    if RANGE:
        shift = query_start
    if MODE != BLOCKS:
        if PACKED:
            limit = gl.load(document_stop + block)
        earliest = key
        if RANGE:
            if PACKED:
                row = key // (queries + gap)
                row_first = row * queries
                shift = query_start + row * gap
            earliest = gl.maximum(key, row_first + shift)
            limit = gl.minimum(limit, row_first + queries + shift)
        first = (earliest - shift) // TOKENS
        # Written so that a window as long as the sequence cannot overflow.
        last = gl.minimum(keys_stop - 1, limit - window) + window - 1
        stop = (gl.minimum(last, limit - 1) - shift + TOKENS) // TOKENS
    return group, key, keys_stop, first, stop, limit, after, shift, row_first


@gluon.jit
def _loader(
    q_desc, q2_desc, g_desc, k_desc, k2_desc, v_desc, lse_desc, delta_desc,
    q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem, lse_smem, delta_smem,
    k_ready, ready, empty,
    block_first, block_stop, document_stop, item_entry, item_first, item_stop, item_after,
    inverse_part, window, sequence, query_start, queries, gap, groups, blocks,
    MODE: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, SPLIT: gl.constexpr, PACKED: gl.constexpr, RANGE: gl.constexpr,
):  # fmt: skip
    """Bring K and V, and Q, dO, lse, delta of every part."""
    k_bytes: gl.constexpr = (
        k_desc.block_type.nbytes + (k2_desc.block_type.nbytes if SPLIT else 0)
        + v_desc.block_type.nbytes
    )  # fmt: skip
    step_bytes: gl.constexpr = (
        q_desc.block_type.nbytes + (q2_desc.block_type.nbytes if SPLIT else 0)
        + g_desc.block_type.nbytes + 2 * 64 * 4
    )  # fmt: skip
    group, key, _, first, stop, _, _, _, _ = _task(
        block_first, block_stop, document_stop, item_entry, item_first, item_stop, item_after,
        window, sequence, query_start, queries, gap, blocks, MODE, TOKENS, KEYS, PACKED, RANGE,
    )  # fmt: skip
    batch = group // groups
    kv = group % groups
    if first < stop:
        mbarrier.expect(k_ready, k_bytes)
        tma_load(k_desc, k2_desc, (batch, key, kv), k_ready, k_smem, k2_smem, SPLIT)
        tma.async_copy_global_to_shared(v_desc, [batch, key, kv, 0], k_ready, v_smem)
        upcoming = first
        if MODE == BLOCKS:
            upcoming = gl.load(inverse_part + first)
        for place in range(first, stop):
            part = upcoming
            if MODE == BLOCKS:
                upcoming = gl.load(inverse_part + gl.minimum(place + 1, stop - 1))
            else:
                upcoming += 1
            step = place - first
            stage = step % STAGES
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, step_bytes)
            token = part * TOKENS
            tma_load(q_desc, q2_desc, (batch, token, kv * HEADS), bar, q_smem.index(stage),
                  q2_smem.index(stage), SPLIT)  # fmt: skip
            tma.async_copy_global_to_shared(
                g_desc, [batch, token, kv * HEADS, 0], bar, g_smem.index(stage)
            )
            tma.async_copy_global_to_shared(
                lse_desc, [group, part * 64], bar, lse_smem.index(stage)
            )
            tma.async_copy_global_to_shared(
                delta_desc, [group, part * 64], bar, delta_smem.index(stage)
            )


@gluon.jit
def _columns(memory, FIRST: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """[COUNT] fp32 of a [1, 64] tile."""
    layout_1d: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return memory._reinterpret(gl.float32, [64], layout_1d).slice(FIRST, COUNT).load(layout)


@gluon.jit
def _view(memory, WIDTH: gl.constexpr):
    """The first bytes of the ring of queries, which is empty by then, as fp32 [64, WIDTH]."""
    rows: gl.constexpr = memory.numel // 2 // WIDTH
    layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    return memory._reinterpret(gl.float32, [rows, WIDTH], layout).slice(0, 64)


@gluon.jit
def _hand_over(acc, memory, met, meeting, WIDTH: gl.constexpr):
    """Consumer 1 leaves its [64, WIDTH] acc as soon as there is room."""
    mbarrier.wait(met.index(1), meeting & 1)
    _view(memory, WIDTH).store(acc)
    gl.thread_barrier()
    mbarrier.arrive(met.index(0), count=1)


@gluon.jit
def _take_over(acc, memory, met, meeting, WIDTH: gl.constexpr):
    """Consumer 0 adds what consumer 1 leaves, and makes room for more."""
    mbarrier.wait(met.index(0), meeting & 1)
    acc = acc + _view(memory, WIDTH).load(acc.type.layout)
    gl.thread_barrier()
    mbarrier.arrive(met.index(1), count=1)
    return acc


@gluon.jit
def _write(target, acc, first_row, keys_stop, groups, key, offset, add_to,
           STRIDE: gl.constexpr, WIDTH: gl.constexpr):  # fmt: skip
    """Store or add [64, WIDTH] acc into target [B, S, HKV, STRIDE] from column `offset` on.

    `first_row` is the place of the first key in [B, S, HKV], `key` its token.
    """
    layout: gl.constexpr = acc.type.layout
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = offset + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    place = (first_row + row.to(gl.int64) * groups) * STRIDE
    pointers = target + place[:, None] + column[None, :]
    mask = (key + row < keys_stop)[:, None]
    if add_to:
        acc = acc + gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
    gl.store(pointers, acc.to(pointers.dtype.element_ty), mask=mask)


@gluon.jit
def _consumer(
    dk, dv, flags,
    q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem, lse_smem, delta_smem,
    k_ready, ready, empty, met,
    block_first, block_stop, document_stop, item_entry, item_first, item_stop, item_after,
    inverse_part, inverse_bits, window, sequence, query_start, queries, gap, groups, blocks,
    scale, scale_log2, accumulate,
    MODE: gl.constexpr, HALF: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, VALUE_WIDTH: gl.constexpr,
    SPLIT: gl.constexpr, PACKED: gl.constexpr, RANGE: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Every second part."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    k2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, v_layout, 2)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, k_layout, 2)
    s_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = v_smem.dtype
    group, key_first, keys_stop, first, stop, limit, after, shift, row_first = _task(
        block_first, block_stop, document_stop, item_entry, item_first, item_stop, item_after,
        window, sequence, query_start, queries, gap, blocks, MODE, TOKENS, KEYS, PACKED, RANGE,
    )  # fmt: skip
    if after > -2:
        k = flat(k_smem, KEYS, WIDTH)
        k2 = k
        if SPLIT:
            k2 = flat(k2_smem, KEYS, 64)
        v = flat(v_smem, KEYS, VALUE_WIDTH)
        key = key_first + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        dk_acc = gl.zeros([64, WIDTH], gl.float32, k_layout)
        dk2_acc = gl.zeros([64, 64], gl.float32, k2_layout)
        dv_acc = gl.zeros([64, VALUE_WIDTH], gl.float32, v_layout)
        mbarrier.wait(k_ready, 0, pred=first < stop)
        upcoming = first + HALF
        upcoming_bits = 0
        if MODE == BLOCKS:
            here = gl.minimum(first + HALF, stop - 1)
            upcoming = gl.load(inverse_part + here, mask=stop > first)
            upcoming_bits = gl.load(inverse_bits + here, mask=stop > first)
        for place in range(first + HALF, stop, 2):
            part = upcoming
            members = upcoming_bits
            if MODE == BLOCKS:
                here = gl.minimum(place + 2, stop - 1)
                upcoming = gl.load(inverse_part + here)
                upcoming_bits = gl.load(inverse_bits + here)
            else:
                upcoming += 2
            step = place - first
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            q = flat(q_smem.index(stage), 64, WIDTH)
            q2 = flat(q2_smem.index(stage), 64, 64) if SPLIT else q
            g = flat(g_smem.index(stage), 64, VALUE_WIDTH)
            token_first = part * TOKENS
            first_position = position_of(token_first, shift, queries, gap, MODE, RANGE)
            edge = key_first + KEYS - 1 > first_position
            if MODE != BLOCKS:
                edge = (
                    edge | (key_first <= first_position + TOKENS - 1 - window)
                    | (first_position + TOKENS > limit)
                )  # fmt: skip
                if RANGE:
                    edge = edge | (token_first < row_first)
            for piece in gl.static_range(64 // ROWS):
                row = piece * ROWS + gl.arange(0, ROWS, layout=s_column)
                q_piece = q.slice(piece * ROWS, ROWS)
                q2_piece = q2.slice(piece * ROWS, ROWS)
                g_piece = g.slice(piece * ROWS, ROWS)
                nothing = gl.zeros([64, ROWS], gl.float32, s_layout)
                s = warpgroup_mma(k, q_piece.permute((1, 0)), nothing, use_acc=False,
                                  is_async=True)  # fmt: skip
                if SPLIT:
                    s = warpgroup_mma(k2, q2_piece.permute((1, 0)), s, is_async=True)
                dp = warpgroup_mma(v, g_piece.permute((1, 0)), nothing, use_acc=False,
                                   is_async=True)  # fmt: skip
                pivot = _columns(lse_smem.index(stage), piece * ROWS, ROWS, s_column)
                if MODE == BLOCKS:
                    member = ((members >> (row // HEADS)) & 1) == 1
                    pivot = gl.where(member, pivot, float("inf"))
                s = warpgroup_mma_wait(1, [s])
                if edge:
                    token = token_first + row // HEADS
                    position = position_of(token, shift, queries, gap, MODE, RANGE)
                    seen = key[:, None] <= position[None, :]
                    if MODE != BLOCKS:
                        seen = seen & (key[:, None] > position[None, :] - window)
                        seen = seen & (position < limit)[None, :]
                        if RANGE:
                            # Not those of the row before, which have other positions.
                            seen = seen & (token >= row_first)[None, :]
                    s = gl.where(seen, s, float("-inf"))
                p = gl.exp2(s * scale_log2 - pivot[None, :])
                p_operand = as_operand(p, dtype, p_layout)
                dv_acc = warpgroup_mma(p_operand, g_piece, dv_acc, is_async=True)
                dp = warpgroup_mma_wait(1, [dp])
                delta = _columns(delta_smem.index(stage), piece * ROWS, ROWS, s_column)
                ds_operand = as_operand(p * (dp - delta[None, :]), dtype, ds_layout)
                dk_acc = warpgroup_mma(ds_operand, q_piece, dk_acc, is_async=True)
                if SPLIT:
                    dk2_acc = warpgroup_mma(ds_operand, q2_piece, dk2_acc, is_async=True)
                    dv_acc, dk_acc, dk2_acc = warpgroup_mma_wait(0, [dv_acc, dk_acc, dk2_acc])
                else:
                    dv_acc, dk_acc = warpgroup_mma_wait(0, [dv_acc, dk_acc])
            mbarrier.arrive(empty.index(stage), count=1)

        dk_acc = dk_acc * scale
        if HALF == 1:
            _hand_over(dv_acc, q_smem, met, 0, VALUE_WIDTH)
            _hand_over(dk_acc, q_smem, met, 1, WIDTH)
            if SPLIT:
                _hand_over(dk2_acc * scale, q_smem, met, 2, 64)
        else:
            # This consumer is done with its parts, and so is the ring.
            mbarrier.arrive(met.index(1), count=1)
            dv_acc = _take_over(dv_acc, q_smem, met, 0, VALUE_WIDTH)
            add_to = after + accumulate >= 0
            if MODE == BLOCKS:  # noqa: SIM102 - decided when compiling
                if after >= 0:
                    done = gl.atomic_add(flags + after, 0, sem="acquire", scope="gpu")
                    while done == 0:
                        done = gl.atomic_add(flags + after, 0, sem="acquire", scope="gpu")
            if add_to & (first >= stop):
                keys_stop = key_first  # nothing to add
            batch = group // groups
            out = (batch.to(gl.int64) * sequence + key_first) * groups + group % groups
            _write(dv, dv_acc, out, keys_stop, groups, key_first, 0, add_to,
                   VALUE_WIDTH, VALUE_WIDTH)  # fmt: skip
            dk_acc = _take_over(dk_acc, q_smem, met, 1, WIDTH)
            _write(dk, dk_acc, out, keys_stop, groups, key_first, 0, add_to,
                   WIDTH + (64 if SPLIT else 0), WIDTH)  # fmt: skip
            if SPLIT:
                dk2_acc = _take_over(dk2_acc * scale, q_smem, met, 2, 64)
                _write(dk, dk2_acc, out, keys_stop, groups, key_first, WIDTH, add_to,
                       WIDTH + 64, 64)  # fmt: skip
            if MODE == BLOCKS:
                gl.thread_barrier()
                gl.atomic_xchg(flags + gl.program_id(0), 1, sem="release", scope="gpu")


_SIZES = ["window", "sequence", "query_start", "queries", "gap", "groups", "blocks", "accumulate"]


@gluon.jit(do_not_specialize=_SIZES)
def dkv_kernel(
    q_desc, q2_desc, g_desc, k_desc, k2_desc, v_desc, lse_desc, delta_desc, dk, dv, flags,
    block_first, block_stop, document_stop, item_entry, item_first, item_stop, item_after,
    inverse_part, inverse_bits, window, sequence, query_start, queries, gap, groups, blocks,
    scale, scale_log2, accumulate,
    MODE: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, WIDTH: gl.constexpr, VALUE_WIDTH: gl.constexpr, SPLIT: gl.constexpr,
    PACKED: gl.constexpr, RANGE: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """dk and dv [B, S, HKV, D or DV] (BLOCKS: fp32), stored or (`accumulate` = 1) added to."""
    # A stage must always be the same consumer's: a wait by parity cannot tell a turn of its own
    # from one of the other that it never waited for.
    gl.static_assert(STAGES % 2 == 0)
    gl.static_assert(STAGES * WIDTH >= 2 * VALUE_WIDTH)
    q_smem = alloc_smem(q_desc, STAGES)
    g_smem = alloc_smem(g_desc, STAGES)
    k_smem = alloc_smem(k_desc, 1).index(0)
    v_smem = alloc_smem(v_desc, 1).index(0)
    q2_smem = alloc_smem(q2_desc, STAGES) if SPLIT else q_smem
    k2_smem = alloc_smem(k2_desc, 1).index(0) if SPLIT else k_smem
    lse_smem = alloc_smem(lse_desc, STAGES)
    delta_smem = alloc_smem(delta_desc, STAGES)
    k_ready = barriers(1, 1).index(0)
    ready = barriers(STAGES, 1)
    empty = barriers(STAGES, 1)
    met = barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (dk, dv, flags, q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem, lse_smem,
                         delta_smem, k_ready, ready, empty, met, block_first, block_stop,
                         document_stop, item_entry, item_first, item_stop, item_after,
                         inverse_part, inverse_bits, window, sequence, query_start, queries, gap,
                         groups, blocks, scale, scale_log2, accumulate,
                         MODE, 0, TOKENS, HEADS, KEYS, STAGES, WIDTH, VALUE_WIDTH, SPLIT, PACKED,
                         RANGE, ROWS)),
            (_consumer, (dk, dv, flags, q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem, lse_smem,
                         delta_smem, k_ready, ready, empty, met, block_first, block_stop,
                         document_stop, item_entry, item_first, item_stop, item_after,
                         inverse_part, inverse_bits, window, sequence, query_start, queries, gap,
                         groups, blocks, scale, scale_log2, accumulate,
                         MODE, 1, TOKENS, HEADS, KEYS, STAGES, WIDTH, VALUE_WIDTH, SPLIT, PACKED,
                         RANGE, ROWS)),
            (_loader, (q_desc, q2_desc, g_desc, k_desc, k2_desc, v_desc, lse_desc, delta_desc,
                       q_smem, q2_smem, g_smem, k_smem, k2_smem, v_smem, lse_smem, delta_smem,
                       k_ready, ready, empty, block_first, block_stop, document_stop, item_entry,
                       item_first, item_stop, item_after, inverse_part, window, sequence,
                       query_start, queries, gap, groups, blocks,
                       MODE, TOKENS, HEADS, KEYS, STAGES, SPLIT, PACKED, RANGE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
