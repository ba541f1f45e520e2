"""The three attention kernels (forward, dQ, dK and dV) behind every Triton operation.

One program of the forward and dQ kernels owns a tile of TOKENS neighbouring tokens times the HEADS
query heads of one KV group, packed into ROWS rows of one matrix, and walks over tiles of KEYS keys.
What it walks over is the mode:

  CAUSAL  all keys up to the tile's last token
  WINDOW  the keys that some token of the tile can see
  BLOCKS  the blocks that some token of the tile has selected (a `Selection`), with a bit per token

The dK, dV kernel owns a tile of KEYS keys and walks over tiles of tokens: the inverse of the above.
Scores are kept in base 2 and in fp32. No atomics: results repeat bit for bit.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key and DV value head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

CAUSAL, WINDOW, BLOCKS = 0, 1, 2


@triton.jit
def _rows(
    tile,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    sequence,
):
    """Token, head in the group and validity of each packed row of a tile."""
    row = tl.arange(0, ROWS)
    offset, head = row // PACK, row % PACK
    token = tile * TOKENS + offset
    valid = (offset < TOKENS) & (token < sequence) & (head < HEADS)
    return offset, token, head, valid


@triton.jit
def _load_rows(base, token, head, valid, stride_s, stride_h, width, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] of a [S, heads, width] tensor, zero outside."""
    column = tl.arange(0, WIDTH)
    pointers = base + token[:, None].to(tl.int64) * stride_s + head[:, None] * stride_h + column
    return tl.load(pointers, mask=valid[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _load_keys(base, key, sequence, stride_s, width, WIDTH: tl.constexpr):
    """[KEYS, WIDTH] of one KV head, zero outside."""
    column = tl.arange(0, WIDTH)
    pointers = base + key[:, None].to(tl.int64) * stride_s + column[None, :]
    return tl.load(pointers, mask=(key < sequence)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _span(
    tile,
    group,
    tiles,
    sequence,
    window,
    counts,
    MODE: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """First key and number of key tiles that a token tile walks over."""
    first = 0
    stop = tl.minimum(tile * TOKENS + TOKENS, sequence)
    if MODE == 1:
        first = tl.maximum(tile * TOKENS - window + 1, 0) // KEYS * KEYS
    steps = tl.cdiv(stop - first, KEYS)
    if MODE == 2:
        steps = tl.load(counts + group.to(tl.int64) * tiles + tile)
    return first, steps


@triton.jit
def _step(
    index,
    first,
    list_base,
    offset,
    token,
    sequence,
    window,
    ids,
    bits,
    MODE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Keys of step `index` and which of them each row sees: [KEYS], [ROWS, KEYS]."""
    if MODE == 2:
        start = tl.load(ids + list_base + index) * KEYS
        chosen = (tl.load(bits + list_base + index) >> offset) & 1
    else:
        start = first + index * KEYS
    key = start + tl.arange(0, KEYS)
    seen = (key[None, :] <= token[:, None]) & (key < sequence)[None, :]
    if MODE == 1:
        seen = seen & (key[None, :] > token[:, None] - window)
    if MODE == 2:
        seen = seen & (chosen == 1)[:, None]
    return key, seen


@triton.jit
def forward_kernel(
    query, key_, value, sink, output, lse, maxima,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    ids, bits, counts, capacity,
    sequence, groups, window, scale_log2, width, value_width, first_tile, last_tile, num_blocks,
    MODE: tl.constexpr, HAS_SINK: tl.constexpr, SCORES: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output [B, S, HQ, DV] and lse [B, HQ, S] (natural log, sink included).

    With SCORES also the raw base-2 maximum of every row over every key tile, into maxima
    [B * HKV, token tiles of this launch, num_blocks, ROWS] fp32.
    """
    tiles = tl.cdiv(sequence, TOKENS)
    tile = last_tile - 1 - tl.program_id(0)  # the longest first
    group = tl.program_id(1)
    batch, kv = group // groups, group % groups
    offset, token, head, valid = _rows(tile, TOKENS, HEADS, PACK, ROWS, sequence)
    q_base = query + batch.to(tl.int64) * q_b + (kv * HEADS).to(tl.int64) * q_h
    k_base = key_ + batch.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v_base = value + batch.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    q = _load_rows(q_base, token, head, valid, q_s, q_h, width, WIDTH)

    first, steps = _span(tile, group, tiles, sequence, window, counts, MODE, TOKENS, KEYS)
    list_base = (group.to(tl.int64) * tiles + tile) * capacity
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for index in range(steps):
        key, seen = _step(index, first, list_base, offset, token, sequence, window, ids, bits,
                          MODE, KEYS)  # fmt: skip
        k = _load_keys(k_base, key, sequence, k_s, width, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(seen, scores, float("-inf"))
        tile_peak = tl.max(scores, 1)
        if SCORES:
            place = group.to(tl.int64) * (last_tile - first_tile) + tile - first_tile
            place = (place * num_blocks + index) * ROWS + tl.arange(0, ROWS)
            tl.store(maxima + place, tile_peak)
        new_peak = tl.maximum(peak, tile_peak)
        # A finite pivot: rows that have seen no key yet must not compute inf - inf.
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - pivot[:, None])
        decay = tl.exp2(peak - pivot)
        total = total * decay + tl.sum(weights, 1)
        v = _load_keys(v_base, key, sequence, v_s, value_width, VALUE_WIDTH)
        sums = sums * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = new_peak

    if HAS_SINK:
        extra = tl.load(sink + kv * HEADS + head).to(tl.float32) * 1.4426950408889634
        new_peak = tl.maximum(peak, extra)
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - pivot)
        total = total * decay + tl.exp2(extra - pivot)
        sums = sums * decay[:, None]
        peak = new_peak
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    sums = sums / safe[:, None]
    log_total = tl.where(empty, float("-inf"), (peak + tl.log2(safe)) * 0.6931471805599453)

    heads = groups * HEADS
    column = tl.arange(0, VALUE_WIDTH)
    out_row = (batch.to(tl.int64) * sequence + token) * heads + kv * HEADS + head
    tl.store(output + out_row[:, None] * value_width + column[None, :],
             sums.to(output.dtype.element_ty),
             mask=valid[:, None] & (column < value_width)[None, :])  # fmt: skip
    lse_row = (batch.to(tl.int64) * heads + kv * HEADS + head) * sequence + token
    tl.store(lse + lse_row, log_total, mask=valid)


@triton.jit
def delta_kernel(
    output, grad, delta, g_b, g_s, g_h, sequence, heads, value_width,
    ROWS: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """delta [B, HQ, S] = sum over DV of output * grad: what softmax's backward subtracts."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    column = tl.arange(0, VALUE_WIDTH)
    mask = (token < sequence)[:, None] & (column < value_width)[None, :]
    row = (batch.to(tl.int64) * sequence + token) * heads + head
    out = tl.load(output + row[:, None] * value_width + column[None, :], mask=mask, other=0.0)
    base = grad + batch.to(tl.int64) * g_b + head.to(tl.int64) * g_h
    d = tl.load(base + token[:, None].to(tl.int64) * g_s + column[None, :], mask=mask, other=0.0)
    result = tl.sum(out.to(tl.float32) * d.to(tl.float32), 1)
    where = (batch.to(tl.int64) * heads + head) * sequence + token
    tl.store(delta + where, result, mask=token < sequence)


@triton.jit
def dq_kernel(
    query, key_, value, grad, lse, delta, dq,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h,
    ids, bits, counts, capacity,
    sequence, groups, window, scale, scale_log2, width, value_width,
    MODE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, S, HQ, D]; the forward's walk, with the weights recomputed from lse."""
    tiles = tl.cdiv(sequence, TOKENS)
    tile = tiles - 1 - tl.program_id(0)
    group = tl.program_id(1)
    batch, kv = group // groups, group % groups
    offset, token, head, valid = _rows(tile, TOKENS, HEADS, PACK, ROWS, sequence)
    q_base = query + batch.to(tl.int64) * q_b + (kv * HEADS).to(tl.int64) * q_h
    g_base = grad + batch.to(tl.int64) * g_b + (kv * HEADS).to(tl.int64) * g_h
    k_base = key_ + batch.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v_base = value + batch.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    heads = groups * HEADS
    stat = (batch.to(tl.int64) * heads + kv * HEADS + head) * sequence + token
    log_total = tl.load(lse + stat, mask=valid, other=0.0) * 1.4426950408889634
    log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
    d = tl.load(delta + stat, mask=valid, other=0.0)
    q = _load_rows(q_base, token, head, valid, q_s, q_h, width, WIDTH)
    g = _load_rows(g_base, token, head, valid, g_s, g_h, value_width, VALUE_WIDTH)

    first, steps = _span(tile, group, tiles, sequence, window, counts, MODE, TOKENS, KEYS)
    list_base = (group.to(tl.int64) * tiles + tile) * capacity
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for index in range(steps):
        key, seen = _step(index, first, list_base, offset, token, sequence, window, ids, bits,
                          MODE, KEYS)  # fmt: skip
        k = _load_keys(k_base, key, sequence, k_s, width, WIDTH)
        v = _load_keys(v_base, key, sequence, v_s, value_width, VALUE_WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        weights = tl.where(seen, tl.exp2(scores - log_total[:, None]), 0.0)
        pulled = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        ds = weights * (pulled - d[:, None])
        sums += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)

    column = tl.arange(0, WIDTH)
    row = (batch.to(tl.int64) * sequence + token) * heads + kv * HEADS + head
    tl.store(dq + row[:, None] * width + column[None, :], (sums * scale).to(dq.dtype.element_ty),
             mask=valid[:, None] & (column < width)[None, :])  # fmt: skip


@triton.jit
def dkv_kernel(
    query, key_, value, grad, lse, delta, dk, dv,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h,
    chunk_block, chunk_first, chunk_stop, reader_tile, reader_bits,
    sequence, groups, window, scale, scale_log2, width, value_width,
    MODE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [.., KEYS, D] and dv [.., KEYS, DV] in fp32.

    CAUSAL, WINDOW: program (key tile, batch * group) writes into [B, HKV, S, *]. BLOCKS: program c
    adds up one chunk of the readers of one block into the c-th partial sum.
    """
    if MODE == 2:
        chunk = tl.program_id(0)
        block = tl.load(chunk_block + chunk)
        if block < 0:
            return
        blocks = tl.cdiv(sequence, KEYS)
        group = block // blocks
        start = (block % blocks) * KEYS
        first = tl.load(chunk_first + chunk)
        stop = tl.load(chunk_stop + chunk)
    else:
        group = tl.program_id(1)
        start = tl.program_id(0) * KEYS
        first = start // TOKENS
        last = sequence - 1
        if MODE == 1:
            last = tl.minimum(start + KEYS - 1 + window - 1, sequence - 1)
        stop = last // TOKENS + 1
    batch, kv = group // groups, group % groups
    q_base = query + batch.to(tl.int64) * q_b + (kv * HEADS).to(tl.int64) * q_h
    g_base = grad + batch.to(tl.int64) * g_b + (kv * HEADS).to(tl.int64) * g_h
    k_base = key_ + batch.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v_base = value + batch.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    heads = groups * HEADS
    key = start + tl.arange(0, KEYS)
    k = _load_keys(k_base, key, sequence, k_s, width, WIDTH)
    v = _load_keys(v_base, key, sequence, v_s, value_width, VALUE_WIDTH)
    k_sums = tl.zeros([KEYS, WIDTH], tl.float32)
    v_sums = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    for index in range(first, stop):
        if MODE == 2:
            tile = tl.load(reader_tile + index)
            members = tl.load(reader_bits + index)
        else:
            tile = index
            members = -1
        offset, token, head, valid = _rows(tile, TOKENS, HEADS, PACK, ROWS, sequence)
        stat = (batch.to(tl.int64) * heads + kv * HEADS + head) * sequence + token
        log_total = tl.load(lse + stat, mask=valid, other=0.0) * 1.4426950408889634
        log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
        d = tl.load(delta + stat, mask=valid, other=0.0)
        q = _load_rows(q_base, token, head, valid, q_s, q_h, width, WIDTH)
        g = _load_rows(g_base, token, head, valid, g_s, g_h, value_width, VALUE_WIDTH)
        seen = (key[:, None] <= token[None, :]) & (key < sequence)[:, None] & valid[None, :]
        if MODE == 1:
            seen = seen & (key[:, None] > token[None, :] - window)
        if MODE == 2:
            seen = seen & (((members >> offset) & 1) == 1)[None, :]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
        weights = tl.where(seen, tl.exp2(scores - log_total[None, :]), 0.0)
        v_sums += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        pulled = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        ds = weights * (pulled - d[None, :])
        k_sums += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)

    column, value_column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    if MODE == 2:
        row = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
        inside = key < sequence + KEYS
    else:
        row = group.to(tl.int64) * sequence + key
        inside = key < sequence
    tl.store(dk + row[:, None] * width + column[None, :], k_sums * scale,
             mask=inside[:, None] & (column < width)[None, :])  # fmt: skip
    tl.store(dv + row[:, None] * value_width + value_column[None, :], v_sums,
             mask=inside[:, None] & (value_column < value_width)[None, :])  # fmt: skip


@triton.jit
def group_scores_kernel(
    maxima, lse, scores, sequence, groups, first_tile, last_tile, num_blocks, num_tokens,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """scores [B * HKV, num_tokens of this launch, num_blocks]: Eq. 3 in the log, base 2.

    The largest log-probability of a block over its keys and the heads of the group; -inf for blocks
    that start after the query.
    """
    tile = first_tile + tl.program_id(0)
    group = tl.program_id(1)
    batch, kv = group // groups, group % groups
    _, token, head, valid = _rows(tile, TOKENS, HEADS, PACK, ROWS, sequence)
    stat = (batch.to(tl.int64) * groups * HEADS + kv * HEADS + head) * sequence + token
    log_total = tl.load(lse + stat, mask=valid, other=0.0) * 1.4426950408889634
    block = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    place = group.to(tl.int64) * (last_tile - first_tile) + tile - first_tile
    pointers = maxima + (place * num_blocks + block)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    # Blocks after the tile's last token were never walked over: nothing was written there.
    walked = (block * BLOCK)[:, None] <= token[None, :]
    raw = tl.load(pointers, mask=walked & valid[None, :] & (block < num_blocks)[:, None],
                  other=float("-inf"))  # fmt: skip
    best = tl.max(tl.reshape(raw - log_total[None, :], [CHUNK, TOKENS, PACK]), 2)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    row = group.to(tl.int64) * num_tokens + tokens - first_tile * TOKENS
    out = scores + row[None, :] * num_blocks + block[:, None]
    tl.store(out, best, mask=(tokens < sequence)[None, :] & (block < num_blocks)[:, None])


@triton.jit
def topk_kernel(
    scores, indices, first_token, tokens, sequence, num_blocks, selected, forced_first,
    forced_recent,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """The `selected` best blocks of one row, ids ascending, -1 last; the lowest id wins a tie.

    A score becomes an integer of the same order, the id below it: no two keys are equal.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    score = tl.load(scores + (group * tokens + row) * num_blocks + block, mask=block < num_blocks,
                    other=float("-inf"))  # fmt: skip
    own = (first_token + row) // BLOCK
    visible = (block < num_blocks) & (block <= own)
    forced = visible & ((block < forced_first) | (block > own - forced_recent))
    score = tl.where(forced, float("inf"), score)
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    nothing = -0x7FFFFFFFFFFFFFFF
    keys = tl.where(visible, (ordered << 32) + (0x7FFFFFFF - block), nothing)
    slot = tl.arange(0, SELECTED)
    chosen = tl.full([SELECTED], 0x7FFFFFFF, tl.int32)
    for index in range(selected):
        best = tl.max(keys, 0)
        found = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
        chosen = tl.where((slot == index) & (best != nothing), found, chosen)
        keys = tl.where(keys == best, nothing, keys)
    chosen = tl.sort(chosen)
    chosen = tl.where(chosen == 0x7FFFFFFF, -1, chosen)
    out = indices + (group * sequence + first_token + row) * selected + slot
    tl.store(out, chosen, mask=slot < selected)


@triton.jit
def sum_chunks_kernel(
    partial, result, first_chunk, sequence, blocks, width, KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """result [B * HKV, S, width] fp32: the partial sums of each block, added in fixed order."""
    block, group = tl.program_id(0), tl.program_id(1)
    entry = group * blocks + block
    column = tl.arange(0, WIDTH)
    total = tl.zeros([KEYS, WIDTH], tl.float32)
    inside = (column < width)[None, :]
    for chunk in range(tl.load(first_chunk + entry), tl.load(first_chunk + entry + 1)):
        row = chunk * KEYS + tl.arange(0, KEYS)
        total += tl.load(partial + row[:, None] * width + column[None, :],
                         mask=inside & (row >= 0)[:, None], other=0.0)  # fmt: skip
    key = block * KEYS + tl.arange(0, KEYS)
    out = result + (group.to(tl.int64) * sequence + key)[:, None] * width + column[None, :]
    tl.store(out, total, mask=inside & (key < sequence)[:, None])
