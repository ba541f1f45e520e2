"""The lists of a selection in plain torch: what triton/lists.py must build too.

Shapes as in block_lists.py; M tokens of a tile.
"""

from __future__ import annotations

import torch
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


def forward_index(
    indices: Tensor,
    tile_tokens: int,
    block_size: int,
    table: BlockTable,
    queries: QueryRange | None = None,
) -> ForwardIndex:
    """The blocks that each tile of `tile_tokens` tokens reads; indices int32 [R, tokens, K]."""
    rows, tokens, selected = indices.shape
    blocks, device = len(table), indices.device
    tiles = -(-tokens // tile_tokens)
    token = torch.arange(tokens, device=device)[:, None]
    position = token if queries is None else queries.positions(tokens, device).long()[:, None]
    if table.document_start is None or table.number is None:
        begin, number = torch.zeros_like(token), indices.long()
    else:
        begin = table.document_start.long()[position]
        number = table.number[begin] + indices.long()
    chosen = (indices >= 0) & (begin + indices.long() * block_size <= position)

    # A sortable number per selected block, block first, token second; others sort last.
    codes = torch.full((rows, tiles * tile_tokens, selected), blocks * tile_tokens, device=device)
    codes[:, :tokens] = torch.where(chosen, number * tile_tokens + token % tile_tokens, codes[0, 0])
    codes = codes.view(rows, tiles, -1).sort(dim=2).values
    number = codes // tile_tokens
    valid = number < blocks
    new_block = _differs_from_previous(number) & valid
    # A block that a token names twice sets its bit once.
    new_entry = _differs_from_previous(codes) & valid

    capacity = forward_capacity(tile_tokens, selected, blocks)
    place = torch.where(valid, new_block.cumsum(2) - 1, capacity)  # the last one is dropped
    starts = torch.zeros(rows, tiles, capacity + 1, dtype=torch.int64, device=device)
    starts.scatter_(2, place, table.first.long()[number.clamp(max=blocks - 1)])
    bits = torch.zeros_like(starts)
    bits.scatter_add_(2, place, torch.where(new_entry, 1 << (codes % tile_tokens), 0))
    counts = new_block.sum(2).to(torch.int32)
    return ForwardIndex(starts[..., :-1].to(torch.int32), _as_int32(bits[..., :-1]), counts)


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
    del queries  # only tells Triton's kernels where to begin
    rows, tiles, capacity = forward.starts.shape
    device, blocks, part_tokens = forward.starts.device, len(table), tile_tokens // 2
    number = (
        forward.starts // block_size
        if table.number is None
        else table.number[forward.starts.long()]
    )
    bits = torch.stack([forward.bits, forward.bits >> part_tokens], dim=3)
    bits = bits & ((1 << part_tokens) - 1)
    slot = torch.arange(capacity, device=device)[:, None]
    reads = (slot < forward.counts[..., None, None]) & (bits != 0)
    row = torch.arange(rows, device=device)[:, None, None, None]
    segments = -(-tiles * tile_tokens // segment_tokens)
    segment = (torch.arange(tiles, device=device) * tile_tokens // segment_tokens)[:, None, None]
    owner = (row * blocks + number[..., None]) * segments + segment
    owner = torch.where(reads, owner, rows * blocks * segments).flatten()
    part = 2 * torch.arange(tiles, device=device)[:, None, None] + torch.arange(2, device=device)
    # Each block stands once per tile, so that a stable sort by block leaves the parts ascending.
    order = owner.sort(stable=True).indices
    counts = owner.new_zeros(rows * blocks * segments + 1)
    counts.scatter_add_(0, owner, torch.ones_like(owner))
    order = order[: inverse_capacity(rows, tiles, tile_tokens, selected, blocks)]
    return InverseIndex(
        part.expand(rows, tiles, capacity, 2).flatten()[order].to(torch.int32),
        bits.flatten()[order],
        counts[:-1].to(torch.int32).view(-1, segments),
        counts[:-1].view(-1, segments).sum(1).cumsum(0),
    )


def work_items(
    inverse: InverseIndex, table: BlockTable, segments: int, most: int, least: int
) -> WorkItems:
    """The inverse index in `most` items at most, of `least` parts but for the last of a block."""
    rows = len(inverse.ends) // len(table)
    place = inverse.ends - inverse.counts.sum(1)
    taken, latest = place.clone(), torch.full_like(place, -1)
    has_keys = (table.first < table.stop).repeat(rows)
    found = []
    for segment in range(segments):
        place = place + inverse.counts[:, segment]
        enough = place - taken >= least
        if segment == segments - 1:
            enough = enough | (place > taken) | ((latest < 0) & has_keys)
        for entry in enough.nonzero().flatten().tolist():
            key = (entry // len(table), segment, entry)
            found.append((key, entry, int(taken[entry]), int(place[entry]), int(latest[entry])))
            latest[entry] = len(found) - 1
        taken = torch.where(enough, place, taken)
    # Found by segment, wanted by row first.
    order = sorted(range(len(found)), key=lambda number: found[number][0])
    new = {old: number for number, old in enumerate(order)} | {-1: -1}
    sorted_by_row = [(*found[old][1:4], new[found[old][4]]) for old in order]
    unused = [(0, 0, 0, -2)] * (most - len(found))
    columns = torch.tensor(sorted_by_row + unused, device=place.device).T.contiguous()
    return WorkItems(columns[0].int(), columns[1], columns[2], columns[3].int())


def _differs_from_previous(values: Tensor) -> Tensor:
    differs = torch.ones_like(values, dtype=torch.bool)
    differs[..., 1:] = values[..., 1:] != values[..., :-1]
    return differs


def _as_int32(bits: Tensor) -> Tensor:
    """The low 32 bits of non-negative int64 values, bit 31 becoming the sign."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
