"""The attention kernels (forward, dQ, dK and dV) behind every Triton operation.

One program of the forward and dQ kernels owns a tile of TOKENS neighbouring tokens times the HEADS
query heads of one KV group, packed into ROWS rows of one matrix, and iterates over tiles of KEYS
keys. Which keys is the mode:

  CAUSAL  all keys up to the tile's last token
  WINDOW  the keys that some token of the tile can see
  BLOCKS  the blocks that some token of the tile has selected (`BlockLists`), with a bit per token

The dK, dV kernel owns a tile of KEYS keys and iterates over tiles of tokens, the inverse of that.
Scores are kept in base 2 and in fp32. No atomics: results repeat bit for bit.

PACKED (CAUSAL and WINDOW only): the batch is one row of packed documents, and tiles are `Pieces` of
documents, so that every tile lies in one. BLOCKS needs no such thing: a token sees the keys of the
blocks that it selected, and none of them lies in another document.

RANGE: the queries are a range of a row's positions (`QueryRange`), `queries` of them from
query_start on, and `gap` more keys than that. Tokens are counted in the queries, keys and positions
in the keys; without RANGE both are the same.

Shapes: B batch, S queries and Sk keys of a row, HQ query heads, HKV KV groups, D query/key and DV
value head dim, R = B * HKV rows of lists, T token tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

CAUSAL, WINDOW, BLOCKS = 0, 1, 2


@triton.jit
def _piece(
    index, piece_first, piece_stop, piece_bound, first_token, tokens, bound,
    SIZE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """First token of piece `index`, one past its last, and the bound of its document."""
    first = first_token + index * SIZE
    stop = tl.minimum(first + SIZE, first_token + tokens)
    if PACKED:
        first = tl.load(piece_first + index)
        stop = tl.load(piece_stop + index)
        bound = tl.load(piece_bound + index)
    return first, stop, bound


@triton.jit
def position_of(token, query_start, queries, gap, RANGE: tl.constexpr):
    """Where in the keys a token of the queries stands."""
    if RANGE:
        token += query_start + token // queries * gap
    return token


@triton.jit
def _rows(
    first, stop, TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr
):
    """Place in the tile, token, head in the group and validity of each packed row of a tile."""
    row = tl.arange(0, ROWS)
    offset, head = row // PACK, row % PACK
    token = first + offset
    valid = (offset < TOKENS) & (token < stop) & (head < HEADS)
    return offset, token, head, valid


@triton.jit
def _load_rows(base, token, head, valid, stride_s, stride_h, width, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] of a [S, heads, width] tensor, zero outside."""
    column = tl.arange(0, WIDTH)
    pointers = base + token[:, None].to(tl.int64) * stride_s + head[:, None] * stride_h + column
    return tl.load(pointers, mask=valid[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _load_keys(base, key, stop, stride_s, width, WIDTH: tl.constexpr):
    """[KEYS, WIDTH] of one KV head, zero from `stop` on."""
    column = tl.arange(0, WIDTH)
    pointers = base + key[:, None].to(tl.int64) * stride_s + column[None, :]
    return tl.load(pointers, mask=(key < stop)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _span(first, stop, begin, window, counts, list_tile, MODE: tl.constexpr, KEYS: tl.constexpr):
    """First key and number of key tiles that tokens at first .. stop iterate over.

    Key tiles are aligned to `begin`, where the document's blocks begin.
    """
    start = begin
    if MODE == 1:
        start = begin + tl.maximum(first - begin - window + 1, 0) // KEYS * KEYS
    steps = tl.cdiv(stop - start, KEYS)
    if MODE == 2:
        steps = tl.load(counts + list_tile)
    return start, steps


@triton.jit
def _step(
    index, start, list_base, offset, position, stop, window, starts, bits,
    MODE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keys of step `index` and which of them each row sees: [KEYS], [ROWS, KEYS]."""
    if MODE == 2:
        key = tl.load(starts + list_base + index) + tl.arange(0, KEYS)
        chosen = (tl.load(bits + list_base + index) >> offset) & 1
    else:
        key = start + index * KEYS + tl.arange(0, KEYS)
    seen = (key[None, :] <= position[:, None]) & (key < stop)[None, :]
    if MODE == 1:
        seen = seen & (key[None, :] > position[:, None] - window)
    if MODE == 2:
        seen = seen & (chosen == 1)[:, None]
    return key, seen


@triton.jit(do_not_specialize=["query_start", "queries", "gap"])
def forward_kernel(
    query, key_, value, sink, output, lse, maxima,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    piece_first, piece_stop, piece_begin, starts, bits, counts, capacity,
    query_start, queries, gap,
    sequence, groups, window, scale_log2, width, value_width, first_token, tokens, num_blocks,
    MODE: tl.constexpr, PACKED: tl.constexpr, RANGE: tl.constexpr, HAS_SINK: tl.constexpr,
    SCORES: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output [B, S, HQ, DV] and lse [B, HQ, S] (natural log, sink included) of program (tile, row).

    The launch covers `tokens` tokens from first_token on. BLOCKS: SPLIT tiles share a union. With
    SCORES also the raw base-2 maximum of every row over every key tile, into maxima
    [R, num_blocks, tokens, PACK] fp32.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    group = tl.program_id(1)
    batch, kv = group // groups, group % groups
    first, stop, begin = _piece(tile, piece_first, piece_stop, piece_begin, first_token, tokens, 0,
                                TOKENS, PACKED)  # fmt: skip
    offset, token, head, valid = _rows(first, stop, TOKENS, HEADS, PACK, ROWS)
    position = position_of(token, query_start, queries, gap, RANGE)
    first = position_of(first, query_start, queries, gap, RANGE)
    stop = position_of(stop - 1, query_start, queries, gap, RANGE) + 1
    q_base = query + batch.to(tl.int64) * q_b + (kv * HEADS).to(tl.int64) * q_h
    k_base = key_ + batch.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v_base = value + batch.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    q = _load_rows(q_base, token, head, valid, q_s, q_h, width, WIDTH)

    list_tile = group.to(tl.int64) * tl.cdiv(sequence, TOKENS * SPLIT) + tile // SPLIT
    list_base = list_tile * capacity
    bit = offset + tile % SPLIT * TOKENS
    start, steps = _span(first, stop, begin, window, counts, list_tile, MODE, KEYS)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for index in range(steps):
        key, seen = _step(index, start, list_base, bit, position, stop, window, starts, bits,
                          MODE, KEYS)  # fmt: skip
        k = _load_keys(k_base, key, stop, k_s, width, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(seen, scores, float("-inf"))
        m_tile = tl.max(scores, 1)
        if SCORES:
            place = (group.to(tl.int64) * num_blocks + index) * tokens + token - first_token
            tl.store(maxima + place * PACK + head, m_tile, mask=valid)
        m_new = tl.maximum(m_i, m_tile)
        # A finite pivot: rows that have seen no key yet must not compute inf - inf.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - pivot[:, None])
        alpha = tl.exp2(m_i - pivot)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = _load_keys(v_base, key, stop, v_s, value_width, VALUE_WIDTH)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        m_i = m_new

    if HAS_SINK:
        extra = tl.load(sink + kv * HEADS + head).to(tl.float32) * 1.4426950408889634
        m_new = tl.maximum(m_i, extra)
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - pivot)
        l_i = l_i * alpha + tl.exp2(extra - pivot)
        acc = acc * alpha[:, None]
        m_i = m_new
    empty = l_i == 0.0
    safe = tl.where(empty, 1.0, l_i)
    acc = acc / safe[:, None]
    lse_i = tl.where(empty, float("-inf"), (m_i + tl.log2(safe)) * 0.6931471805599453)

    heads = groups * HEADS
    column = tl.arange(0, VALUE_WIDTH)
    out_row = (batch.to(tl.int64) * sequence + token) * heads + kv * HEADS + head
    tl.store(output + out_row[:, None] * value_width + column[None, :],
             acc.to(output.dtype.element_ty),
             mask=valid[:, None] & (column < value_width)[None, :])  # fmt: skip
    lse_row = (batch.to(tl.int64) * heads + kv * HEADS + head) * sequence + token
    tl.store(lse + lse_row, lse_i, mask=valid)


@triton.jit(do_not_specialize=["query_start", "queries", "gap"])
def dq_kernel(
    query, key_, value, output, grad, lse, delta, dq,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, g_b, g_s, g_h,
    piece_first, piece_stop, piece_begin, starts, bits, counts, capacity,
    query_start, queries, gap,
    sequence, groups, window, scale, scale_log2, width, value_width,
    MODE: tl.constexpr, PACKED: tl.constexpr, RANGE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, S, HQ, D]; the forward's key schedule, with p recomputed from lse.

    Also delta [B, HQ, S] = sum over DV of output * grad, what softmax's backward subtracts.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    batch, kv = group // groups, group % groups
    first, stop, begin = _piece(tile, piece_first, piece_stop, piece_begin, 0, sequence, 0,
                                TOKENS, PACKED)  # fmt: skip
    offset, token, head, valid = _rows(first, stop, TOKENS, HEADS, PACK, ROWS)
    position = position_of(token, query_start, queries, gap, RANGE)
    first = position_of(first, query_start, queries, gap, RANGE)
    stop = position_of(stop - 1, query_start, queries, gap, RANGE) + 1
    q_base = query + batch.to(tl.int64) * q_b + (kv * HEADS).to(tl.int64) * q_h
    o_base = output + batch.to(tl.int64) * o_b + (kv * HEADS).to(tl.int64) * o_h
    g_base = grad + batch.to(tl.int64) * g_b + (kv * HEADS).to(tl.int64) * g_h
    k_base = key_ + batch.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v_base = value + batch.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    heads = groups * HEADS
    stat = (batch.to(tl.int64) * heads + kv * HEADS + head) * sequence + token
    lse_i = tl.load(lse + stat, mask=valid, other=0.0) * 1.4426950408889634
    lse_i = tl.where(lse_i == float("-inf"), 0.0, lse_i)
    g = _load_rows(g_base, token, head, valid, g_s, g_h, value_width, VALUE_WIDTH)
    o = _load_rows(o_base, token, head, valid, o_s, o_h, value_width, VALUE_WIDTH)
    d = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + stat, d, mask=valid)
    q = _load_rows(q_base, token, head, valid, q_s, q_h, width, WIDTH)

    list_tile = group.to(tl.int64) * tl.cdiv(sequence, TOKENS * SPLIT) + tile // SPLIT
    list_base = list_tile * capacity
    bit = offset + tile % SPLIT * TOKENS
    start, steps = _span(first, stop, begin, window, counts, list_tile, MODE, KEYS)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for index in range(steps):
        key, seen = _step(index, start, list_base, bit, position, stop, window, starts, bits,
                          MODE, KEYS)  # fmt: skip
        k = _load_keys(k_base, key, stop, k_s, width, WIDTH)
        v = _load_keys(v_base, key, stop, v_s, value_width, VALUE_WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        p = tl.where(seen, tl.exp2(scores - lse_i[:, None]), 0.0)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - d[:, None])
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)

    column = tl.arange(0, WIDTH)
    row = (batch.to(tl.int64) * sequence + token) * heads + kv * HEADS + head
    tl.store(dq + row[:, None] * width + column[None, :], (acc * scale).to(dq.dtype.element_ty),
             mask=valid[:, None] & (column < width)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["query_start", "queries", "gap"])
def dkv_kernel(
    query, key_, value, grad, lse, delta, dk, dv,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h,
    piece_first, piece_stop, piece_end,
    blocks, item_entry, item_first, item_stop, item_after, flags,
    inverse_part, inverse_bits, keys,
    query_start, queries, gap,
    sequence, groups, window, scale, scale_log2, width, value_width,
    MODE: tl.constexpr, PACKED: tl.constexpr, RANGE: tl.constexpr, ADDS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [B, Sk, HKV, D] and dv [B, Sk, HKV, DV] of KEYS keys, stored or, with ADDS = 1, added.

    `sequence` counts the tokens of a row, `keys` its keys.

    CAUSAL, WINDOW: program (key tile, row). BLOCKS: a program adds up one work item, some of the
    parts that read one block (see block_lists.WorkItems); all but the first of a block wait for the
    one before them and add, so that the order is always the same. None waits for one that was
    started after it.
    """
    after = -1
    if MODE == 2:
        item = tl.program_id(0)
        after = tl.load(item_after + item)
        if after < -1:
            return
        entry = tl.load(item_entry + item)
        group, block = entry // blocks, entry % blocks
        start = tl.load(piece_first + block)
        stop = tl.load(piece_stop + block)
        first = tl.load(item_first + item).to(tl.int32)
        last = tl.load(item_stop + item).to(tl.int32)
        end = sequence
    else:
        group = tl.program_id(1)
        start, stop, end = _piece(tl.program_id(0), piece_first, piece_stop, piece_end, 0, keys,
                                  keys, KEYS, PACKED)  # fmt: skip
        if MODE == 1:
            end = tl.minimum(stop + window - 1, end)  # no later token sees a key of the tile
    begin = start
    shift = 0
    if RANGE:
        # Tokens of the keys' row stand this much further on among the keys.
        row_of_keys = start // (queries + gap)
        shift = query_start + row_of_keys * gap
        if MODE != 2:
            begin = tl.maximum(start - shift, row_of_keys * queries)
            end = tl.minimum(end - shift, (row_of_keys + 1) * queries)
    if MODE != 2:
        first = 0
        last = tl.cdiv(end - begin, TOKENS)
    if ADDS == 1:  # noqa: SIM102 - decided when compiling
        if last <= first:
            return  # nothing to add, and nobody waits for it
    batch, kv = group // groups, group % groups
    q_base = query + batch.to(tl.int64) * q_b + (kv * HEADS).to(tl.int64) * q_h
    g_base = grad + batch.to(tl.int64) * g_b + (kv * HEADS).to(tl.int64) * g_h
    k_base = key_ + batch.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v_base = value + batch.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    heads = groups * HEADS
    key = start + tl.arange(0, KEYS)
    k = _load_keys(k_base, key, stop, k_s, width, WIDTH)
    v = _load_keys(v_base, key, stop, v_s, value_width, VALUE_WIDTH)
    dk_acc = tl.zeros([KEYS, WIDTH], tl.float32)
    dv_acc = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    for index in range(first, last):
        if MODE == 2:
            token_first = tl.load(inverse_part + index) * TOKENS
            members = tl.load(inverse_bits + index)
        else:
            token_first = begin + index * TOKENS
            members = -1
        offset, token, head, valid = _rows(token_first, end, TOKENS, HEADS, PACK, ROWS)
        stat = (batch.to(tl.int64) * heads + kv * HEADS + head) * sequence + token
        lse_i = tl.load(lse + stat, mask=valid, other=0.0) * 1.4426950408889634
        lse_i = tl.where(lse_i == float("-inf"), 0.0, lse_i)
        d = tl.load(delta + stat, mask=valid, other=0.0)
        q = _load_rows(q_base, token, head, valid, q_s, q_h, width, WIDTH)
        g = _load_rows(g_base, token, head, valid, g_s, g_h, value_width, VALUE_WIDTH)
        position = token + shift
        seen = (key[:, None] <= position[None, :]) & (key < stop)[:, None] & valid[None, :]
        if MODE == 1:
            seen = seen & (key[:, None] > position[None, :] - window)
        if MODE == 2:
            seen = seen & (((members >> offset) & 1) == 1)[None, :]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
        p = tl.where(seen, tl.exp2(scores - lse_i[None, :]), 0.0)
        dv_acc += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        ds = p * (dp - d[None, :])
        dk_acc += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)

    row = (batch.to(tl.int64) * keys + key) * groups + kv
    inside = (key < stop)[:, None]
    column, value_column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    k_out = dk + row[:, None] * width + column[None, :]
    v_out = dv + row[:, None] * value_width + value_column[None, :]
    k_mask = inside & (column < width)[None, :]
    v_mask = inside & (value_column < value_width)[None, :]
    dk_acc = dk_acc * scale
    if MODE == 2:  # noqa: SIM102 - decided when compiling
        if after >= 0:
            while tl.atomic_add(flags + after, 0, sem="acquire", scope="gpu") == 0:
                pass
    if after + ADDS >= 0:
        dk_acc += tl.load(k_out, mask=k_mask, other=0.0)
        dv_acc += tl.load(v_out, mask=v_mask, other=0.0)
    tl.store(k_out, dk_acc.to(dk.dtype.element_ty), mask=k_mask)
    tl.store(v_out, dv_acc.to(dv.dtype.element_ty), mask=v_mask)
    if MODE == 2:
        tl.debug_barrier()  # all threads' stores come before the flag
        tl.atomic_xchg(flags + item, 1, sem="release", scope="gpu")
