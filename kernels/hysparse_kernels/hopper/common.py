"""What the Hopper kernels share: work order, tile geometry, views and conversions.

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
)

TILE_SIZES = [
    *("sequence", "query_start", "queries", "gap"),
    *("groups", "tiles", "items", "together", "programs"),
]
"""Arguments of all kernels over token tiles whose values are no reason to compile again."""
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
SPAN = gl.constexpr(0)
"""Mode of a kernel that iterates over the keys of a window, or of the whole past."""
BLOCKS = gl.constexpr(1)
"""Mode of a kernel that iterates over selected blocks."""


@gluon.jit
def maximum(a, b):
    """For reductions."""
    return gl.maximum(a, b)


@gluon.jit
def add(a, b):
    """For scans."""
    return a + b


@gluon.jit
def work(item, items, tiles, together, programs):
    """Tile, group and validity of the item-th piece of work of this program; last tiles first.

    Where tiles grow with their number the longest come first, those of `together` groups side by
    side. Programs take turns in both directions, so that none always gets the longer tile.
    """
    program = gl.program_id(0)
    index = item * programs + program + (item % 2) * (programs - 1 - 2 * program)
    valid = index < items
    index = gl.minimum(index, items - 1)
    place = index % (tiles * together)
    group = index // (tiles * together) * together + place % together
    return tiles - 1 - place // together, group, valid


@gluon.jit
def extent(tile, tile_table, sequence, query_start, queries, gap,
           TILE: gl.constexpr, PACKED: gl.constexpr, RANGE: gl.constexpr):  # fmt: skip
    """First token of a tile, first key of its document, end of its tokens, and shift.

    A token's position among the keys is token + shift, zero without RANGE.
    """
    shift = 0
    if RANGE:
        shift = query_start
    if PACKED:
        first = gl.load(tile_table + 3 * tile)
        start = gl.load(tile_table + 3 * tile + 1)
        stop = gl.load(tile_table + 3 * tile + 2)
        if RANGE:
            shift += first // queries * gap
    else:
        first = tile * TILE
        start = 0
        stop = sequence
    return first, start, stop, shift


@gluon.jit
def position_of(token, shift, queries, gap, MODE: gl.constexpr, RANGE: gl.constexpr):
    """Where tokens stand among the keys; tiles of BLOCKS may reach over the rows' borders."""
    position = token
    if RANGE:
        position = token + shift
        if MODE == BLOCKS:
            position = position + token // queries * gap
    return position


@gluon.jit
def alloc_smem(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT boxes of a descriptor: [COUNT, *box]."""
    shape: gl.constexpr = [COUNT] + desc.block_type.shape  # noqa: RUF005 - the compiler's Python
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which ARRIVALS arrivals complete."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(made.index(index), count=ARRIVALS)
    return made


@gluon.jit
def flat(memory, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A [1, .., COLUMNS] tile in shared memory as a matrix [ROWS, COLUMNS]."""
    layout: gl.constexpr = gl.NVMMASharedLayout(
        memory.layout.swizzle_byte_width, memory.layout.element_bitwidth, 2
    )
    return memory._reinterpret(memory.dtype, [ROWS, COLUMNS], layout)


@gluon.jit
def narrow(values, dtype: gl.constexpr):
    """fp32 to bf16 or fp16, two at a time."""
    if dtype == gl.bfloat16:
        result = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [values],
            dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        result = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [values],
            dtype=gl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return result


@gluon.jit
def as_operand(values, dtype: gl.constexpr, layout: gl.constexpr):
    """fp32 results of one matrix product as the left operand of the next; stays in registers."""
    return gl.convert_layout(narrow(values, dtype), layout, assert_trivial=True)


@gluon.jit
def qk_dot(left, left2, right, right2, donor, ROWS: gl.constexpr, WIDTH: gl.constexpr,
            SPLIT: gl.constexpr):  # fmt: skip
    """Start left @ right^T over a head dim that may lie in two pieces; right are [ROWS, width].

    `donor` is a dead tensor whose registers take the result.
    """
    result = warpgroup_mma(
        left, flat(right, ROWS, WIDTH).permute((1, 0)), donor, use_acc=False, is_async=True
    )
    if SPLIT:
        result = warpgroup_mma(left2, flat(right2, ROWS, 64).permute((1, 0)), result, is_async=True)
    return result


@gluon.jit
def tma_load(desc, desc2, coordinates, barrier, memory, memory2, SPLIT: gl.constexpr):
    """Bring one tile of a head dim that may lie in two pieces; `coordinates` (b, s, head)."""
    batch, token, head = coordinates
    tma.async_copy_global_to_shared(desc, [batch, token, head, 0], barrier, memory)
    if SPLIT:
        tma.async_copy_global_to_shared(desc2, [batch, token, head, 128], barrier, memory2)


@gluon.jit
def tma_store(values, desc, memory, batch, first, head, COLUMN: gl.constexpr):
    """[64, width] of a tile into [B, S, HQ, *] by the copy engine, which skips what is past S.

    Through `memory`, one box, which is free again afterwards.
    """
    flat(memory, 64, values.shape[1]).store(values)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, [batch, first, head, COLUMN], memory)
    tma.store_wait(0)
    gl.thread_barrier()


@gluon.jit
def store_rows(values, target, batch, first, stop, sequence, groups, kv, HEADS: gl.constexpr,
               STRIDE: gl.constexpr, COLUMN: gl.constexpr):  # fmt: skip
    """The same by ordinary stores, where another document begins at `stop`.

    Columns COLUMN .. of target [B, S, HQ, STRIDE].
    """
    layout: gl.constexpr = values.type.layout
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    token = first + row // HEADS
    place = (batch.to(gl.int64) * sequence + token) * groups * HEADS + kv * HEADS + row % HEADS
    column = COLUMN + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    gl.store(target + place[:, None] * STRIDE + column[None, :], values,
             mask=(token < stop)[:, None])  # fmt: skip
