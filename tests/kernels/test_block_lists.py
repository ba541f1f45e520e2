"""The lists of a selection, built by plain torch, against Python sets; see also triton_cases.py."""

import random

import pytest
import torch
from hysparse_kernels import block_lists, block_sparse_attention, prepare_selection
from hysparse_kernels.block_lists import BlockLists, tile_of_two_parts
from hysparse_kernels.build_lists import build_block_lists
from hysparse_kernels.query_range import QueryRange
from torch import Tensor

from tests.kernels import brute_force
from tests.kernels.cases import offsets, random_documents

BLOCK = 4
Reads = dict[tuple[int, int], set[int]]
"""(row, first key token of a block) to the tokens that read it."""


def reads_of_selection(
    indices: Tensor, starts: brute_force.Starts, packed: bool, first: int
) -> Reads:
    batch, groups, length, _ = indices.shape
    reads: Reads = {}
    for b in range(batch):
        for g in range(groups):
            for t, row in enumerate(indices[b, g].tolist()):
                for block in row:
                    key = starts[b][first + t] + block * BLOCK
                    if block < 0 or key > first + t:
                        continue
                    own_row = b if packed else 0
                    reader = (g if packed else b * groups + g, key + own_row * len(starts[b]))
                    reads.setdefault(reader, set()).add(t + own_row * length)
    return reads


def reads_of_unions(lists: BlockLists) -> Reads:
    reads: Reads = {}
    rows, tiles = lists.counts.shape
    for row in range(rows):
        for tile in range(tiles):
            count = int(lists.counts[row, tile])
            keys = lists.starts[row, tile, :count].tolist()
            assert keys == sorted(set(keys))
            for key, bits in zip(keys, lists.bits[row, tile].tolist(), strict=False):
                for token in members(bits, lists.tile.tokens):
                    reads.setdefault((row, key), set()).add(tile * lists.tile.tokens + token)
    return reads


def reads_of_chunks(lists: BlockLists) -> Reads:
    reads: Reads = {}
    for entry, first, stop, after in zip(*lists.work_items.tensors, strict=True):
        row, block = divmod(int(entry), len(lists.table))
        parts = lists.inverse_part[first:stop].tolist()
        assert not parts or after > -2
        assert parts == sorted(set(parts))
        for part, bits in zip(parts, lists.inverse_bits[first:stop].tolist(), strict=True):
            key = (row, int(lists.table.first[block]))
            for token in members(bits, lists.part_tokens):
                reads.setdefault(key, set()).add(part * lists.part_tokens + token)
    return reads


def check_chunks(lists: BlockLists) -> None:
    """Every block with keys is in a chain of pieces, and those are in the order of segments."""
    entries, firsts, stops, afters = (tensor.tolist() for tensor in lists.work_items.tensors)
    used = afters.index(-2) if -2 in afters else len(afters)
    assert set(afters[used:]) <= {-2}
    latest: dict[int, int] = {}
    places: list[tuple[int, int]] = []
    for number, entry in enumerate(entries[:used]):
        assert afters[number] == latest.get(entry, -1)
        latest[entry] = number
        assert stops[number] - firsts[number] < block_lists.WORK_ITEM_PARTS + longest_segment(lists)
    for number, entry in enumerate(entries[:used]):
        if number != latest[entry]:  # the last one waits for the last segment, and may be short
            assert stops[number] - firsts[number] >= block_lists.WORK_ITEM_PARTS
            token = int(lists.inverse_part[stops[number] - 1]) * lists.part_tokens
            places.append((entry // len(lists.table), token // lists.segment_tokens))
    assert places == sorted(places)
    rows, blocks = lists.counts.shape[0], len(lists.table)
    with_keys = (lists.table.first < lists.table.stop).nonzero().flatten().tolist()
    assert set(latest) == {row * blocks + block for row in range(rows) for block in with_keys}


def longest_segment(lists: BlockLists) -> int:
    return lists.segment_tokens // lists.part_tokens


def members(bits: int, tokens: int) -> list[int]:
    assert bits != 0
    assert bits % 2**32 < 2**tokens
    return [token for token in range(tokens) if bits >> token & 1]


@pytest.mark.parametrize("trial", range(8))
def test_lists(trial: int, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_lists, "SEGMENT_ROWS", rng.choice([2, 256, 65536]))
    monkeypatch.setattr(block_lists, "WORK_ITEM_PARTS", rng.choice([1, 2, 16]))
    batch, groups, length = rng.choice([1, 2]), rng.choice([1, 2]), rng.randint(1, 90)
    heads, selected = rng.choice([1, 2, 4, 7, 16, 64, 128]), rng.randint(1, 5)
    lengths = random_documents(batch, length, rng) if trial % 2 else None
    print(batch, groups, length, heads, selected, lengths)
    first, queries = 0, length
    if trial % 4 > 1:
        first = rng.randrange(length)
        queries = rng.randint(1, length - first)
    print(first, queries)
    shape = (batch, groups, queries, selected)
    indices = torch.randint(-1, -(-length // BLOCK), shape, dtype=torch.int32)
    indices[..., 0] = 0
    starts = brute_force.one_document(batch, length)
    if lengths is not None:
        starts = brute_force.document_starts(lengths, batch, length)
    cu_seqlens = None if lengths is None else offsets(lengths)
    place = QueryRange.of(first, queries, length)
    lists = build_block_lists(indices, heads, BLOCK, cu_seqlens, place, with_triton=False)
    wanted = reads_of_selection(indices, starts, lists.packed, first)
    assert reads_of_unions(lists) == wanted
    assert reads_of_chunks(lists) == wanted

    check_chunks(lists)
    keys = [range(*span) for span in zip(lists.table.first, lists.table.stop, strict=True)]
    tokens = batch * length if lists.packed else length
    assert [key for span in keys for key in span] == list(range(tokens))


@pytest.mark.parametrize(
    ("heads", "tokens", "part_tokens"), [(16, 8, 4), (4, 32, 16), (1, 32, 16), (64, 2, 1)]
)
def test_tiles(heads: int, tokens: int, part_tokens: int) -> None:
    tile, part = tile_of_two_parts(heads)
    assert (tile.tokens, part.tokens) == (tokens, part_tokens)


def test_the_reference_needs_no_lists() -> None:
    indices = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    assert prepare_selection(indices, 2, block_size=2) is None
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        prepare_selection(indices, 2, block_size=2, cu_seqlens=offsets([3]))


def test_lists_of_another_selection_are_refused() -> None:
    query, key = torch.zeros(1, 40, 2, 4), torch.zeros(1, 40, 1, 4)
    indices = torch.zeros(1, 1, 40, 1, dtype=torch.int32)
    for heads, size, cu_seqlens in ((2, 8, None), (4, 4, None), (2, 4, offsets([40]))):
        lists = build_block_lists(indices, heads, size, cu_seqlens, with_triton=False)
        with pytest.raises(ValueError, match="lists: got"):
            block_sparse_attention(query, key, key, indices, block_size=4, lists=lists)
    place = QueryRange(2, 40, 43)
    lists = build_block_lists(indices, 2, 4, None, place, with_triton=False)
    key = torch.zeros(1, 43, 1, 4)
    with pytest.raises(ValueError, match="lists: got"):
        block_sparse_attention(query, key, key, indices, block_size=4, lists=lists, query_start=3)
