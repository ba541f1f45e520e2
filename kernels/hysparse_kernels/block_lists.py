"""A selection as index lists for the kernels, built once and used by every sparse layer.

Forward index (CSR): neighbouring tokens select much the same blocks, so that the forward and dQ
kernels take a tile of neighbouring tokens at once and visit the union of their blocks, with one bit
per token. Inverse index (CSC): for every block the parts (half tiles) that read it, for the dK, dV
kernel. Work items: the inverse index cut where the sequence is cut into segments. Programs that
work on one segment at a time find its queries in the cache, whatever block they work for, and a
block that every token reads does not keep one program busy for longer than all others together.

Packed documents (see documents.py) are one row of B * S tokens: tiles and parts may reach over a
border, as a token sees only blocks that it selected. Blocks that start after the token are dropped.
Where the tokens are a range of a row's positions, tiles, parts and segments are counted in them and
blocks in the keys. Everything is made on the device, without waiting for it.

Shapes: B batch, HKV KV groups, S sequence, K selected, R = B * HKV rows of S tokens (packed: HKV
rows of B * S), T token tiles and P = 2 * T parts of a row, U places for a union, NT entries of the
block table, E entries of the inverse index, M work items, C segments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hysparse_kernels.documents import BlockTable
from hysparse_kernels.query_range import QueryRange

SEGMENT_ROWS = 65536
"""Tokens times query heads per group of a segment: 32 MB of queries and gradients at head dim 128,
which stay in the L2 cache of an H100 or H200."""
WORK_ITEM_PARTS = 32
"""Parts below which a work item goes on into the next segment: fetching the keys and adding to
their gradients costs a program as much as several parts, but those of the last segment may have
left the cache. Backward at 131,072 tokens, clustered: 1 takes 40.3 ms, 8 36.8, 32 36.0, 64 37.5."""
_PART_ROWS = 64
_MOST_PART_TOKENS = 16
"""A tile is two parts, and the bits of its tokens must fit into 32."""


@dataclass(frozen=True)
class TokenTile:
    """Neighbouring tokens times the heads of one KV group, packed into the rows of one matrix."""

    tokens: int
    heads: int
    """Query heads per KV group."""
    pack: int
    """`heads` rounded up to a power of two."""

    @property
    def rows(self) -> int:
        """Rows of the packed matrix, a power of two of at least 16."""
        return self.tokens * self.pack

    @classmethod
    def of(cls, heads: int, rows: int, most_tokens: int = 128) -> TokenTile:
        """The tile with about `rows` rows for `heads` query heads per group."""
        pack = 1 << (heads - 1).bit_length()
        tokens = max(1, min(rows // pack, most_tokens), 16 // pack)
        return cls(tokens, heads, pack)

    def constants(self) -> dict[str, int]:
        """The kernels' compile-time names of these sizes."""
        return {"TOKENS": self.tokens, "HEADS": self.heads, "PACK": self.pack, "ROWS": self.rows}


@dataclass(frozen=True)
class ForwardIndex:
    """The blocks that every token tile reads (CSR); see `BlockLists`."""

    starts: Tensor
    bits: Tensor
    counts: Tensor


@dataclass(frozen=True)
class InverseIndex:
    """The parts that read every block (CSC); see `BlockLists`."""

    part: Tensor
    bits: Tensor
    counts: Tensor
    """int32 [R * NT, C]: how many parts of every segment read a block."""
    ends: Tensor
    """int64 [R * NT]: where the parts of a block end."""


@dataclass(frozen=True)
class WorkItems:
    """The inverse index cut up, in the order in which kernels start on the items.

    An item is what one program works on: parts that read one block, from one segment or, until
    there are WORK_ITEM_PARTS, from several. Every block has at least one, be it empty, as its sum
    must be written. They are in the order of rows, then segments (of the last part), then blocks.
    """

    entry: Tensor
    """int32 [M]: row * NT + block."""
    first: Tensor
    """int64 [M]: where in `inverse_part` the item begins."""
    stop: Tensor
    """int64 [M]: where it ends."""
    after: Tensor
    """int32 [M]: the item whose share of the block's sum comes before this one's, -1 for the first
    one of a block; -2 past the last item, where there is nothing to do."""

    def __len__(self) -> int:
        return len(self.entry)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What kernels take."""
        return self.entry, self.first, self.stop, self.after


@dataclass(frozen=True)
class BlockLists:
    """The lists of one selection; see the module. Hold it as long as layers read the selection."""

    tile: TokenTile
    """A token tile: two parts."""
    part: TokenTile
    """Half of it; part p of a row holds tokens p * part.tokens up to (p + 1) * part.tokens."""
    block_size: int
    table: BlockTable
    """The blocks that keys are cut into, the same for every row."""
    starts: Tensor
    """int32 [R, T, U]: first key token of each block of each tile's union, ascending; then 0."""
    bits: Tensor
    """int32 [R, T, U]: bit r says that token r of the tile selected the block; then 0."""
    counts: Tensor
    """int32 [R, T]: length of each union."""
    inverse_part: Tensor
    """int32 [E]: the parts that read block 0, then block 1, ... of row 0, then row 1, ...;
    ascending within a block. Nothing is written past the last one."""
    inverse_bits: Tensor
    """int32 [E]: which of the part's tokens."""
    segments: int
    """C: into how many segments of `segment_tokens` the tokens are cut."""
    segment_tokens: int
    work_items: WorkItems
    """What the programs of the dK, dV kernel do."""
    queries: QueryRange | None = None
    """Which positions the tokens are; None for all of the row."""

    @property
    def part_tokens(self) -> int:
        """Tokens of one part."""
        return self.part.tokens

    @property
    def packed(self) -> bool:
        """Whether the selection is one of packed documents."""
        return self.table.packed


def tile_of_two_parts(heads: int) -> tuple[TokenTile, TokenTile]:
    """The tile of a union and its part for `heads` query heads per group."""
    part = TokenTile.of(heads, _PART_ROWS, _MOST_PART_TOKENS)
    return TokenTile(2 * part.tokens, part.heads, part.pack), part


def forward_capacity(tile_tokens: int, selected: int, blocks: int) -> int:
    """U: the longest union there can be, rounded up to whole 16-byte loads."""
    return -(-min(tile_tokens * selected, blocks) // 4) * 4


def inverse_capacity(rows: int, tiles: int, tile_tokens: int, selected: int, blocks: int) -> int:
    """E: a tile's two parts read no more blocks than its tokens select, and each all at most."""
    return rows * tiles * min(tile_tokens * selected, 2 * blocks)


def segment_of(heads: int, tile_tokens: int) -> int:
    """Tokens of a segment, a multiple of a tile's."""
    return max(1, SEGMENT_ROWS // heads // tile_tokens) * tile_tokens


def max_work_items(
    rows: int,
    table: BlockTable,
    block_size: int,
    segments: int,
    segment_tokens: int,
    query_start: int = 0,
) -> int:
    """M: how many items there can be, known without asking the device."""
    if table.packed:
        return rows * len(table) * segments
    # No token before a block reads it; the last segment writes the sums of blocks that none reads.
    ends = (query_start + (segment + 1) * segment_tokens for segment in range(segments - 1))
    return rows * (len(table) + sum(min(-(-end // block_size), len(table)) for end in ends))
