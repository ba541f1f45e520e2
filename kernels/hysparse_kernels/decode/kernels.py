"""The kernels of a decode step: one new query of each row against what is cached.

A program of `attend_kernel` owns one KV group of one row and a share of its keys, a split: all
heads of the group use each key and value that it loads. Heads are padded to the 16 rows that a
matrix product on tensor cores takes at least. A group of one head thus multiplies 16 times what it
needs, which costs nothing: at 16 rows a product has 16 FLOP for every byte, and a Hopper GPU can do
200 and more in the time that a byte takes to arrive. Rows shorter than others cut their own keys
into as many splits, so that all programs of a step end about together.

`combine_kernel` adds the splits of every head up in a fixed order, `scores_kernel` turns the block
maxima of a full layer into scores, `store_kernel` puts the new keys and values into the cache
before. Scores are kept in base 2 and in fp32. No atomics: results repeat bit for bit.

`step` is a `Chunk`'s int64 [3, A]: rows of the cache, tokens before, new ones. Sizes that grow with
a sequence are not specialised, or a step would wait for the compiler now and then.

Shapes: A rows of the step, HQ query heads, HKV KV groups, G = HQ // HKV heads per group, D
query/key and DV value head dim, L = A * HKV pairs of row and group, X splits, N blocks, U tiles of
KEYS keys, K selected.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, ALL, BLOCKS = 0, 1, 2
"""What the far branch reads: nothing, all tokens of a row, the selected blocks of it."""
_RING = tl.constexpr(3)


@triton.jit
def _power_of_two(exponent):
    """2^exponent in fp32 of a normal number, without rounding."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _attend_tiles(
    q, head, key_, value, key_exponent, value_exponent, selection, maxima,
    group, groups, base, first, length, entries, begin, stop, scale_log2, width, value_width,
    MODE: tl.constexpr, SCALED: tl.constexpr, SCORES: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """m_i [ROWS], l_i [ROWS] and acc [ROWS, VALUE_WIDTH] of the softmax over tiles begin..stop.

    Tile t holds the keys at first + t * KEYS and after, or, for BLOCKS, those of a piece of block
    selection[t // pieces]. With SCORES the raw maximum of every tile goes to maxima [U, HEADS].
    """
    offset = tl.arange(0, KEYS)
    column = tl.arange(0, WIDTH)
    value_column = tl.arange(0, VALUE_WIDTH)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for tile in range(begin, stop):
        if MODE == 2:
            block = tl.load(selection + tile // (BLOCK // KEYS))
            position = block * BLOCK + tile % (BLOCK // KEYS) * KEYS + offset
            seen = (block >= 0) & (position < length)
        else:
            position = first + tile * KEYS + offset
            seen = position < length
        place = position.to(tl.int64)
        if MODE == 3:
            place = place % entries
        place = (base + place) * groups + group
        k = tl.load(key_ + place[:, None] * width + column[None, :],
                    mask=seen[:, None] & (column < width)[None, :], other=0.0)  # fmt: skip
        scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision=PRECISION) * scale_log2
        if SCALED:
            power = _power_of_two(tl.load(key_exponent + place, mask=seen, other=0))
            scores = scores * power[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        m_tile = tl.max(scores, 1)
        if SCORES:
            tl.store(maxima + tile * HEADS + head, m_tile, mask=head < HEADS)
        m_new = tl.maximum(m_i, m_tile)
        # A finite pivot: rows that have seen no key yet must not compute inf - inf.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - pivot[:, None])
        alpha = tl.exp2(m_i - pivot)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(value + place[:, None] * value_width + value_column[None, :],
                    mask=seen[:, None] & (value_column < value_width)[None, :],
                    other=0.0)  # fmt: skip
        if SCALED:
            power = _power_of_two(tl.load(value_exponent + place, mask=seen, other=0))
            p = p * power[None, :]
        pv = tl.dot(p.to(DOT), v.to(DOT), input_precision=PRECISION)
        acc = acc * alpha[:, None] + pv
        m_i = m_new
    return m_i, l_i, acc


@triton.jit
def _share(tiles, split, splits):
    """First tile of a split, and one past its last."""
    size = tl.cdiv(tiles, splits)
    return tl.minimum(split * size, tiles), tl.minimum((split + 1) * size, tiles)


@triton.jit(do_not_specialize=["far_splits", "num_tiles"])
def attend_kernel(
    query, step, m_parts, l_parts, acc_parts,
    far_key, far_value, far_key_exponent, far_value_exponent, far_starts, selection, maxima,
    near_key, near_value,
    q_a, q_h, rows, groups, far_splits, num_tiles, selected, window, entries,
    scale_log2, width, value_width,
    FAR: tl.constexpr, NEAR: tl.constexpr, SCALED: tl.constexpr, SCORES: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """m_parts, l_parts [L, X, G] and acc_parts [L, X, G, DV] of program (split, pair), all fp32.

    The first far_splits splits read the far branch, the others the ring of the window. With SCORES
    also the maxima [L, U, G] of the tiles of the far branch.
    """
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_of_step, group = pair // groups, pair % groups
    row = tl.load(step + row_of_step)
    length = (tl.load(step + rows + row_of_step) + 1).to(tl.int32)
    head = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    q_rows = query + row_of_step * q_a + (group * HEADS + head) * q_h
    q = tl.load(q_rows[:, None] + column[None, :],
                mask=(head < HEADS)[:, None] & (column < width)[None, :], other=0.0)  # fmt: skip
    q = q.to(DOT)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    if FAR != 0:  # noqa: SIM102 - decided when compiling
        if split < far_splits:
            tiles = tl.cdiv(length, KEYS) if FAR == 1 else selected * (BLOCK // KEYS)
            begin, stop = _share(tiles, split, far_splits)
            m_i, l_i, acc = _attend_tiles(
                q, head, far_key, far_value, far_key_exponent, far_value_exponent,
                selection + pair * selected, maxima + pair * num_tiles * HEADS,
                group, groups, tl.load(far_starts + row), 0, length, 0, begin, stop,
                scale_log2, width, value_width,
                FAR, SCALED, SCORES, HEADS, ROWS, BLOCK, KEYS,
                WIDTH, VALUE_WIDTH, DOT, PRECISION,
            )  # fmt: skip
    if NEAR:  # noqa: SIM102 - decided when compiling
        if split >= far_splits:
            first = tl.maximum(length - window, 0)
            tiles = tl.cdiv(length - first, KEYS)
            begin, stop = _share(tiles, split - far_splits, tl.num_programs(0) - far_splits)
            m_i, l_i, acc = _attend_tiles(
                q, head, near_key, near_value, near_key, near_value, selection, maxima,
                group, groups, row * entries, first, length, entries, begin, stop,
                scale_log2, width, value_width,
                _RING, False, False, HEADS, ROWS, BLOCK, KEYS,
                WIDTH, VALUE_WIDTH, DOT, PRECISION,
            )  # fmt: skip
    place = (pair * tl.num_programs(0) + split) * HEADS + head
    value_column = tl.arange(0, VALUE_WIDTH)
    tl.store(m_parts + place, m_i, mask=head < HEADS)
    tl.store(l_parts + place, l_i, mask=head < HEADS)
    tl.store(acc_parts + place[:, None] * value_width + value_column[None, :], acc,
             mask=(head < HEADS)[:, None] & (value_column < value_width)[None, :])  # fmt: skip


@triton.jit
def _mix(
    m_parts, l_parts, acc_parts, sink, base, begin, stop, head, value_width,
    HAS_SINK: tl.constexpr, HEADS: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Output [VALUE_WIDTH] and base-2 lse of one head from splits begin..stop, 0 without a key."""
    column = tl.arange(0, VALUE_WIDTH)
    m_i = tl.full([], float("-inf"), tl.float32)
    l_i = tl.zeros([], tl.float32)
    if HAS_SINK:
        m_i = tl.load(sink + head).to(tl.float32) * 1.4426950408889634
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([VALUE_WIDTH], tl.float32)
    for chunk in range(begin, stop, CHUNK):
        split = chunk + tl.arange(0, CHUNK)
        place = base + split.to(tl.int64) * HEADS
        there = split < stop
        m_part = tl.load(m_parts + place, mask=there, other=float("-inf"))
        m_new = tl.maximum(m_i, tl.max(m_part, 0))
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(m_part - pivot)
        alpha = tl.exp2(m_i - pivot)
        l_part = tl.load(l_parts + place, mask=there, other=0.0)
        l_i = l_i * alpha + tl.sum(p * l_part, 0)
        acc_part = tl.load(acc_parts + place[:, None] * value_width + column[None, :],
                        mask=there[:, None] & (column < value_width)[None, :],
                        other=0.0)  # fmt: skip
        acc = acc * alpha + tl.sum(p[:, None] * acc_part, 0)
        m_i = m_new
    empty = l_i == 0.0
    safe = tl.where(empty, 1.0, l_i)
    return acc / safe, tl.where(empty, float("-inf"), m_i + tl.log2(safe))


@triton.jit
def _gate(gate, stride_a, stride_h, stride_d, row, head, width, PER_HEAD: tl.constexpr,
          WIDTH: tl.constexpr):  # fmt: skip
    """Sigmoid of a head's gate logits, one or [WIDTH], in fp32."""
    base = gate + row * stride_a + head * stride_h
    if PER_HEAD:
        logits = tl.load(base)
    else:
        column = tl.arange(0, WIDTH)
        logits = tl.load(base + column * stride_d, mask=column < width, other=0.0)
    return tl.sigmoid(logits.to(tl.float32))


@triton.jit(do_not_specialize=["splits", "far_splits"])
def combine_kernel(
    m_parts, l_parts, acc_parts, far_sink, near_sink, far_gate, near_gate, output, lse,
    f_a, f_h, f_d, n_a, n_h, n_d, groups, splits, far_splits, value_width,
    FAR: tl.constexpr, NEAR: tl.constexpr, FAR_SINK: tl.constexpr, NEAR_SINK: tl.constexpr,
    LSE: tl.constexpr, PER_HEAD: tl.constexpr,
    HEADS: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """output [A, 1, HQ, DV] of program (row, head): a branch, or the gated sum of both.

    With LSE also the far branch's in base 2, [A, HQ] fp32.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    base = (row * groups + head // HEADS) * splits * HEADS + head % HEADS
    result = tl.zeros([VALUE_WIDTH], tl.float32)
    if FAR:
        far, lse_i = _mix(m_parts, l_parts, acc_parts, far_sink, base, 0, far_splits, head,
                              value_width, FAR_SINK, HEADS, VALUE_WIDTH, CHUNK)  # fmt: skip
        result = far
        if LSE:
            tl.store(lse + row * groups * HEADS + head, lse_i)
        if NEAR:
            result = far * _gate(far_gate, f_a, f_h, f_d, row, head, value_width, PER_HEAD,
                                 VALUE_WIDTH)  # fmt: skip
    if NEAR:
        near, _ = _mix(m_parts, l_parts, acc_parts, near_sink, base, far_splits, splits, head,
                       value_width, NEAR_SINK, HEADS, VALUE_WIDTH, CHUNK)  # fmt: skip
        if FAR:
            near = near * _gate(near_gate, n_a, n_h, n_d, row, head, value_width, PER_HEAD,
                                VALUE_WIDTH)  # fmt: skip
        result += near
    column = tl.arange(0, VALUE_WIDTH)
    out = output + (row * groups * HEADS + head) * value_width + column
    tl.store(out, result.to(output.dtype.element_ty), mask=column < value_width)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks"])
def scores_kernel(
    maxima, lse, step, scores, rows, groups, num_tiles, num_blocks,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """scores [A, HKV, 1, N] fp32 of program (CHUNK blocks, pair): Eq. 3 in the log, base 2.

    The largest log-probability of a block over its keys and the heads of the group, that is max
    over heads of (block maximum - lse); -inf for blocks that start after the query.
    """
    pair = tl.program_id(1).to(tl.int64)
    length = tl.load(step + rows + pair // groups) + 1
    head = tl.arange(0, ROWS)
    lse_i = tl.load(lse + pair * HEADS + head, mask=head < HEADS, other=0.0)
    block = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    for piece in tl.static_range(BLOCK // KEYS):
        tile = block * (BLOCK // KEYS) + piece
        # Nothing was written for tiles after the query.
        visited = (tile * KEYS < length)[:, None] & (head < HEADS)[None, :]
        place = (pair * num_tiles + tile)[:, None] * HEADS + head[None, :]
        raw = tl.load(maxima + place, mask=visited & (block < num_blocks)[:, None],
                      other=float("-inf"))  # fmt: skip
        best = tl.maximum(best, tl.max(raw - lse_i[None, :], 1))
    tl.store(scores + pair * num_blocks + block, best, mask=block < num_blocks)


@triton.jit
def _store(given, kept, exponent, place, width, SCALED: tl.constexpr, WIDTH: tl.constexpr):
    """One head of one token, as `key_value_cache.to_fp8` stores it where SCALED."""
    column = tl.arange(0, WIDTH)
    numbers = tl.load(given + column, mask=column < width, other=0.0)
    if SCALED:
        numbers = numbers.to(tl.float32)
        ratio = tl.div_rn(tl.max(tl.abs(numbers), 0), 448.0)
        # What frexp says of it: the exponent bits, less the bias, for a mantissa below 1.
        power = tl.maximum((ratio.to(tl.int32, bitcast=True) >> 23) - 126, -126)
        power = tl.where(ratio == 0.0, 0, power)
        numbers = numbers * _power_of_two(-power)
        # To the nearest of e4m3's numbers, even in a tie, by adding what leaves 3 bits of mantissa
        # (of 2^-6 for what is less): the conversion then has nothing to round on any device.
        scale = ((numbers.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        shift = 1.5 * _power_of_two(tl.maximum(scale, -6) + 20)
        # A negative number that is rounded to zero leaves its sign behind.
        sign = numbers.to(tl.int32, bitcast=True) & -2147483648
        rounded = ((numbers + shift) - shift).to(tl.int32, bitcast=True)
        numbers = (rounded | sign).to(tl.float32, bitcast=True)
        tl.store(exponent + place, power.to(tl.int8))
    tl.store(kept + place * width + column, numbers.to(kept.dtype.element_ty),
             mask=column < width)  # fmt: skip


@triton.jit
def store_kernel(
    key_, value, step, starts, kept_key, kept_value, key_exponent, value_exponent,
    k_a, k_h, v_a, v_h, rows, groups, entries, width, value_width,
    RING: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Key and value of program (row, group) into a cache of all tokens or, with RING, a ring."""
    row_of_step, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(step + row_of_step)
    past = tl.load(step + rows + row_of_step)
    if RING:
        place = row * entries + past % entries
    else:
        place = tl.load(starts + row) + past
    place = place * groups + group
    _store(key_ + row_of_step * k_a + group * k_h, kept_key, key_exponent, place, width,
           SCALED, WIDTH)  # fmt: skip
    _store(value + row_of_step * v_a + group * v_h, kept_value, value_exponent, place, value_width,
           SCALED, VALUE_WIDTH)  # fmt: skip
