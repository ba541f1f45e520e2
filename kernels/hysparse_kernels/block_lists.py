"""A selection turned into lists that kernels can walk: built once, used by every sparse layer.

Neighbouring tokens select much the same blocks. The forward and dQ kernels therefore take a tile of
neighbouring tokens at once and walk over the union of their blocks, with one bit per token. The dK,
dV kernel needs the inverse: for every block the tiles that read it, cut into chunks so that a block
that everybody reads does not keep one program busy for longer than all others take together.

Everything is made by torch operations on the device, without waiting for it.
Shapes: B batch, HKV KV groups, S sequence, K selected, T token tiles, U longest union, N blocks,
E = B * HKV * T * U.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

READERS_PER_CHUNK = 1024
"""Token tiles that one program of the dK, dV kernel adds up before it starts a new partial sum."""


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
class BlockLists:
    """The lists of one selection; see the module. Hold it as long as layers read the selection."""

    tile: TokenTile
    block_size: int
    ids: Tensor
    """int32 [B * HKV, T, U]: block ids of each tile's union, ascending."""
    bits: Tensor
    """int32 [B * HKV, T, U]: bit r says that token r of the tile selected the block."""
    counts: Tensor
    """int32 [B * HKV, T]: length of each union."""
    reader_tile: Tensor
    """int32 [E]: the tiles that read block 0, then block 1, ... of group 0, then group 1, ..."""
    reader_bits: Tensor
    """int32 [E]: which of their tokens."""
    chunk_block: Tensor
    """int32 [chunks]: group * N + block whose readers this chunk holds; -1 for unused chunks."""
    chunk_first: Tensor
    chunk_stop: Tensor
    """int64 [chunks]: the chunk's range in `reader_tile`."""
    first_chunk: Tensor
    """int64 [B * HKV * N + 1]: the first chunk of each block; its last one ends at the next."""


def build_block_lists(block_indices: Tensor, heads: int, block_size: int) -> BlockLists:
    """Lists of `block_indices` int32 [B, HKV, S, K] for `heads` query heads per KV group."""
    batch, groups, sequence, _ = block_indices.shape
    tile = TokenTile.of(heads, 64, most_tokens=32)
    blocks = -(-sequence // block_size)
    ids, bits, counts = _unions(block_indices, tile, blocks)
    return BlockLists(
        tile,
        block_size,
        ids.to(torch.int32),
        _as_int32(bits),
        counts.to(torch.int32),
        *_readers(ids, bits, counts, batch * groups * blocks, blocks),
    )


def _as_int32(bits: Tensor) -> Tensor:
    """The low 32 bits of non-negative int64 values, bit 31 becoming the sign."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def _unions(block_indices: Tensor, tile: TokenTile, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, bits [B * HKV, T, U] and counts [B * HKV, T], all int64."""
    batch, groups, sequence, selected = block_indices.shape
    device = block_indices.device
    tiles = -(-sequence // tile.tokens)
    padded = torch.full(
        (batch * groups, tiles * tile.tokens, selected), -1, dtype=torch.int64, device=device
    )
    padded[:, :sequence] = block_indices.reshape(batch * groups, sequence, selected)
    # One sortable number per pick, block first, token second; padding sorts last.
    token = torch.arange(tile.tokens, device=device)[:, None]
    picks = padded.view(batch * groups, tiles, tile.tokens, selected)
    picks = torch.where(picks < 0, blocks, picks) * tile.tokens + token
    picks = picks.flatten(2).sort(dim=2).values
    ids = picks // tile.tokens
    valid = ids < blocks
    new_block = _differs_from_previous(ids) & valid
    # A block that a token names twice sets its bit once.
    new_pick = _differs_from_previous(picks) & valid
    capacity = min(tile.tokens * selected, blocks) + 1  # the last place takes the padding
    place = torch.where(valid, new_block.cumsum(2) - 1, capacity - 1)
    union = ids.new_zeros(batch * groups, tiles, capacity)
    union.scatter_(2, place, torch.where(valid, ids, 0))
    bits = torch.zeros_like(union)
    bits.scatter_add_(2, place, torch.where(new_pick, 1 << (picks % tile.tokens), 0))
    return union, bits, new_block.sum(2)


def _differs_from_previous(values: Tensor) -> Tensor:
    differs = torch.ones_like(values, dtype=torch.bool)
    differs[..., 1:] = values[..., 1:] != values[..., :-1]
    return differs


def _readers(
    ids: Tensor, bits: Tensor, counts: Tensor, total: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `BlockLists` from `reader_tile` on; `total` = B * HKV * N."""
    groups, tiles, capacity = ids.shape
    device = ids.device
    slot = torch.arange(capacity, device=device)
    group = torch.arange(groups, device=device)[:, None, None]
    owner = torch.where(slot < counts[..., None], group * blocks + ids, total).flatten()
    order = owner.sort(stable=True).indices
    readers = owner.new_zeros(total + 1).scatter_add_(0, owner, torch.ones_like(owner))[:-1]
    end_of_block = readers.cumsum(0)
    end_of_chunks = (-(-readers // READERS_PER_CHUNK)).cumsum(0)
    first_chunk = torch.cat([end_of_chunks.new_zeros(1), end_of_chunks])

    # As many chunks as there could be: their true number is known on the device only.
    chunk = torch.arange(total + owner.numel() // READERS_PER_CHUNK, device=device)
    block = torch.searchsorted(end_of_chunks, chunk, right=True)
    known = block.clamp(max=total - 1)
    done = (chunk - first_chunk[known]) * READERS_PER_CHUNK
    first = end_of_block[known] - readers[known] + done
    stop = torch.minimum(first + READERS_PER_CHUNK, end_of_block[known])
    return (
        (order // capacity % tiles).to(torch.int32),
        _as_int32(bits.flatten()[order]),
        torch.where(block < total, block, -1).to(torch.int32),
        first,
        stop,
        first_chunk,
    )
