"""The lists of a selection built by Triton kernels; reference/lists.py specifies them.

Forward index: one program per token tile sorts the blocks that its tokens selected. Inverse index:
a map [blocks, tiles] of the bits that the tiles' tokens set, written by the tiles and read by the
blocks, in passes over as many blocks as fit into a bounded map.

Shapes as in block_lists.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.block_lists import (
    ForwardIndex,
    InverseIndex,
    WorkItems,
    forward_capacity,
    inverse_capacity,
)
from hysparse_kernels.documents import BlockTable
from hysparse_kernels.query_range import QueryRange
from hysparse_kernels.triton.kernels import position_of

_MAP_BYTES = 256 * 2**20
"""Most memory for the map of inverse."""
_NONE = tl.constexpr(0x7FFFFFFF)


def forward_index(
    indices: Tensor,
    tile_tokens: int,
    block_size: int,
    table: BlockTable,
    queries: QueryRange | None = None,
) -> ForwardIndex:
    """The blocks that each tile of `tile_tokens` tokens reads; indices int32 [R, tokens, K]."""
    rows, tokens, selected = indices.shape
    tiles = triton.cdiv(tokens, tile_tokens)
    capacity = forward_capacity(tile_tokens, selected, len(table))
    slots = triton.next_power_of_2(selected)
    codes = max(4, slots * tile_tokens)
    starts, bits = (indices.new_empty(rows, tiles, capacity) for _ in range(2))
    counts = indices.new_empty(rows, tiles)
    forward_index_kernel[(tiles, rows)](
        indices, *_table_arguments(table, indices), table.first, starts, bits, counts,
        tokens, selected, capacity,
        *QueryRange.arguments(queries), PACKED=table.packed, RANGE=queries is not None,
        TOKENS=tile_tokens, SLOTS=slots, BLOCK=block_size, CODES=codes,
        num_warps=max(1, min(8, codes // 256)),
    )  # fmt: skip
    return ForwardIndex(starts, bits, counts)


def inverse_index(
    forward: ForwardIndex,
    tile_tokens: int,
    block_size: int,
    table: BlockTable,
    selected: int,
    segment_tokens: int,
    queries: QueryRange | None = None,
) -> InverseIndex:
    """The parts, half a tile each, that read each block; `selected` is K."""
    earliest = table.first if queries is None else queries.queries_from(table.first)
    rows, tiles, capacity = forward.starts.shape
    blocks, part_tokens = len(table), tile_tokens // 2
    entries = rows * blocks
    dtype = torch.uint8 if tile_tokens <= 8 else torch.int16 if tile_tokens <= 16 else torch.int32
    entries_per_pass = max(1, min(entries, _MAP_BYTES // (tiles * dtype.itemsize)))
    marks = forward.starts.new_empty(entries_per_pass, tiles, dtype=dtype)
    segments = triton.cdiv(tiles * tile_tokens, segment_tokens)
    counts = forward.counts.new_empty(entries, segments)
    ends = forward.counts.new_empty(entries, dtype=torch.int64)
    places = inverse_capacity(rows, tiles, tile_tokens, selected, blocks)
    part, bits = (forward.starts.new_empty(places) for _ in range(2))
    step = min(1024, triton.next_power_of_2(tiles))
    counting = min(step, triton.next_power_of_2(segment_tokens // tile_tokens))
    for first in range(0, entries, entries_per_pass):
        stop = min(first + entries_per_pass, entries)
        passed = slice(first, stop)
        first_row, last_row = first // blocks, (stop - 1) // blocks
        marks.zero_()
        map_kernel[(tiles, last_row - first_row + 1)](
            forward.starts, forward.bits, forward.counts, _table_arguments(table, counts)[1], marks,
            first_row, first, stop, blocks, tiles, capacity,
            PACKED=table.packed, BLOCK=block_size, STEP=min(64, triton.next_power_of_2(capacity)),
            num_warps=1,
        )  # fmt: skip
        count_kernel[(stop - first, segments)](
            marks, earliest, counts, first, blocks, tiles, segment_tokens // tile_tokens,
            PART=part_tokens, STEP=counting, num_warps=4,
        )  # fmt: skip
        ends[passed] = counts[passed].sum(1).cumsum(0)
        if first:
            ends[passed] += ends[first - 1]
        compact_kernel[(stop - first,)](
            marks, earliest, ends, part, bits, first, blocks, tiles,
            PART=part_tokens, STEP=step, num_warps=4,
        )  # fmt: skip
    return InverseIndex(part, bits, counts, ends)


def work_items(
    inverse: InverseIndex, table: BlockTable, segments: int, most: int, least: int
) -> WorkItems:
    """The inverse index in `most` items at most, of `least` parts but for the last of a block."""
    counts = inverse.counts
    rows = counts.shape[0] // len(table)
    at_work = counts.new_empty(rows, segments, len(table))
    entry, after = counts.new_zeros(most), counts.new_full((most,), -2)
    first, stop = (inverse.ends.new_zeros(most) for _ in range(2))
    number = at_work
    for write in (False, True):
        work_item_kernel[(triton.cdiv(counts.shape[0], 64),)](
            counts, inverse.ends, table.first, table.stop, at_work, number,
            entry, first, stop, after, counts.shape[0], len(table), segments, least,
            WRITE=write, ENTRIES=64, num_warps=2,
        )  # fmt: skip
        if not write:
            number = at_work.flatten().cumsum(0, dtype=torch.int32)
    return WorkItems(entry, first, stop, after)


def _table_arguments(table: BlockTable, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Document start and block number of every token, or stand-ins."""
    if table.document_start is None or table.number is None:
        return unused, unused
    return table.document_start, table.number


@triton.jit
def _join(left_number, left_bits, right_number, right_bits):
    """Scan step: OR of the bits since the block number last changed."""
    return right_number, tl.where(left_number == right_number, left_bits | right_bits, right_bits)


@triton.jit(do_not_specialize=["query_start", "queries", "gap"])
def forward_index_kernel(
    indices, document_start, block_number, block_first, starts, bits, counts,
    tokens, selected, capacity, query_start, queries, gap,
    PACKED: tl.constexpr, RANGE: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """starts, bits [R, T, U] and counts [R, T] of program (tile, row)."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    place = tl.arange(0, CODES)
    offset, slot = place // SLOTS, place % SLOTS
    token = tile * TOKENS + offset
    inside = (offset < TOKENS) & (slot < selected) & (token < tokens)
    block_id = tl.load(indices + (row * tokens + token) * selected + slot, mask=inside, other=-1)
    position = position_of(token, query_start, queries, gap, RANGE)
    begin, before = 0, 0
    if PACKED:
        begin = tl.load(document_start + position, mask=inside, other=0)
        before = tl.load(block_number + begin, mask=inside, other=0)
    chosen = inside & (block_id >= 0) & (begin + block_id * BLOCK <= position)

    # Block first, token second; what is not selected sorts last.
    code = tl.sort(tl.where(chosen, (before + block_id) * TOKENS + offset, _NONE))
    valid = code != _NONE
    number = code // TOKENS
    members = tl.full([CODES], 1, tl.int32) << (code % TOKENS)
    number, members = tl.associative_scan((number, members), 0, _join)
    following = tl.gather(number, tl.minimum(place + 1, CODES - 1), 0)
    last = valid & ((following != number) | (place == CODES - 1))
    ones = last.to(tl.int32)
    found = tl.cumsum(ones, 0) - 1
    count = tl.sum(ones, 0)
    base = (row * tiles + tile) * capacity
    tl.store(starts + base + found, tl.load(block_first + number, mask=last, other=0), mask=last)
    tl.store(bits + base + found, members, mask=last)
    unused = (place >= count) & (place < capacity)
    tl.store(starts + base + place, 0, mask=unused)
    tl.store(bits + base + place, 0, mask=unused)
    tl.store(counts + row * tiles + tile, count)


@triton.jit
def map_kernel(
    starts, bits, counts, block_number, marks, first_row, first, stop, blocks, tiles, capacity,
    PACKED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Bits of program (tile, row - first_row) into marks [stop - first, T] at the blocks' rows."""
    tile = tl.program_id(0)
    row = (first_row + tl.program_id(1)).to(tl.int64)
    base = (row * tiles + tile) * capacity
    count = tl.load(counts + row * tiles + tile)
    for begin in range(0, count, STEP):
        index = begin + tl.arange(0, STEP)
        inside = index < count
        start = tl.load(starts + base + index, mask=inside, other=0)
        members = tl.load(bits + base + index, mask=inside, other=0)
        number = start // BLOCK
        if PACKED:
            number = tl.load(block_number + start, mask=inside, other=0)
        entry = row * blocks + number
        inside = inside & (entry >= first) & (entry < stop)
        where = marks + (entry - first) * tiles + tile
        tl.store(where, members.to(marks.dtype.element_ty), mask=inside)


@triton.jit
def _parts(marks, tile, tiles, PART: tl.constexpr, STEP: tl.constexpr):
    """Bits of the parts of tiles tile .. tile + STEP: int32 [2 * STEP]."""
    place = tile + tl.arange(0, STEP)
    both = tl.load(marks + place, mask=place < tiles, other=0).to(tl.int32)
    low: tl.constexpr = (1 << PART) - 1
    return tl.interleave(both & low, (both >> PART) & low)


@triton.jit
def count_kernel(
    marks, earliest, counts, first, blocks, tiles, segment,
    PART: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """counts [R * NT, C]: the parts that read entry first + program, per `segment` tiles.

    earliest int32 [NT]: the first token that may read each block.
    """
    entry = first + tl.program_id(0)
    row = marks + tl.program_id(0).to(tl.int64) * tiles
    begin = tl.program_id(1) * segment
    stop = tl.minimum(begin + segment, tiles)
    begin = tl.maximum(begin, tl.load(earliest + entry % blocks) // (2 * PART))
    count = tl.zeros([2 * STEP], tl.int32)
    for tile in range(begin, stop, STEP):
        count += (_parts(row, tile, stop, PART, STEP) != 0).to(tl.int32)
    tl.store(counts + entry * tl.num_programs(1) + tl.program_id(1), tl.sum(count, 0))


@triton.jit
def compact_kernel(
    marks, earliest, ends, part, bits, first, blocks, tiles,
    PART: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The parts that read entry first + program, and their bits, up to place ends [R * NT]."""
    entry = first + tl.program_id(0)
    row = marks + tl.program_id(0).to(tl.int64) * tiles
    place = tl.load(ends + entry - 1, mask=entry > 0, other=0)
    for tile in range(tl.load(earliest + entry % blocks) // (2 * PART), tiles, STEP):
        members = _parts(row, tile, tiles, PART, STEP)
        ones = (members != 0).to(tl.int32)
        found = place + tl.cumsum(ones, 0) - 1
        tl.store(part + found, 2 * tile + tl.arange(0, 2 * STEP), mask=members != 0)
        tl.store(bits + found, members, mask=members != 0)
        place += tl.sum(ones, 0)


@triton.jit
def work_item_kernel(
    counts, ends, block_first, block_stop, at_work, number, item_entry, item_first, item_stop,
    item_after, entries, blocks, segments, least,
    WRITE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Go through the segments of ENTRIES blocks and cut the parts that read them into items.

    The first time at_work [R, C, NT] says in which segments an item ends, the second time `number`
    is its running sum and the items are written to their places.
    """
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < entries
    block = entry % blocks
    cell = entry // blocks * segments * blocks + block
    has_keys = tl.load(block_first + block) < tl.load(block_stop + block)
    place = tl.load(ends + entry - 1, mask=inside & (entry > 0), other=0)
    taken = place
    latest = tl.full([ENTRIES], -1, tl.int32)
    for segment in range(segments):
        place += tl.load(counts + entry * segments + segment, mask=inside, other=0)
        enough = place - taken >= least
        last = segment == segments - 1
        enough = enough | (last & ((place > taken) | ((latest < 0) & has_keys)))
        enough = enough & inside
        here = cell + segment * blocks
        if WRITE:
            own = tl.load(number + here, mask=enough, other=0) - 1
            tl.store(item_entry + own, entry, mask=enough)
            tl.store(item_first + own, taken, mask=enough)
            tl.store(item_stop + own, place, mask=enough)
            tl.store(item_after + own, latest, mask=enough)
        else:
            own = tl.zeros([ENTRIES], tl.int32)
            tl.store(at_work + here, enough.to(tl.int32), mask=inside)
        latest = tl.where(enough, own, latest)
        taken = tl.where(enough, place, taken)
