"""Packed documents: as if each ran alone, nothing crosses a border, geometry by hand."""

import random
from typing import Any

import pytest
import torch
from hysparse_kernels import (
    block_sparse_attention,
    neighbour_agreement,
    oracle_attention,
    selected_mass,
    sliding_window_attention,
)
from hysparse_kernels.documents import cut, document_starts
from torch import Tensor

from tests.kernels.cases import gradients, offsets, random_case, random_documents, random_qkv

BLOCK = 4
ORACLE: dict[str, Any] = {
    "block_size": BLOCK,
    "num_selected": 3,
    "forced_first_blocks": 1,
    "forced_recent_blocks": 1,
    "query_chunk": 7,
}


def attend(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All three operations side by side [B, S, HQ, 3 * DV], block_indices, selected mass."""
    oracle = oracle_attention(query, key, value, cu_seqlens=cu_seqlens, **ORACLE)
    sparse = block_sparse_attention(
        query,
        key,
        value,
        oracle.block_indices,
        block_size=BLOCK,
        sink=sink,
        cu_seqlens=cu_seqlens,
        query_chunk=5,
    )
    window = sliding_window_attention(
        query, key, value, window=6, sink=sink, cu_seqlens=cu_seqlens, query_chunk=9
    )
    mass = selected_mass(
        query, key, oracle.block_indices, oracle.lse, block_size=BLOCK, cu_seqlens=cu_seqlens
    )
    return torch.cat([oracle.output, sparse, window], dim=3), oracle.block_indices, mass


@pytest.mark.parametrize("trial", range(4))
def test_documents_run_as_if_alone(trial: int, rng: random.Random) -> None:
    case = random_case(rng)
    print(case)
    inputs = random_qkv(case)
    sink = torch.randn(case.heads, dtype=torch.float64, requires_grad=True)
    lengths = random_documents(case.batch, case.length, rng)
    print(lengths)
    output, indices, mass = attend(*inputs, sink, offsets(lengths))
    weight = torch.randn_like(output)
    packed = gradients(output, (*inputs, sink), weight)
    sum_of_sinks = torch.zeros_like(sink)
    begin = 0
    for tokens in filter(None, lengths):
        row, first = divmod(begin, case.length)
        here = (slice(row, row + 1), slice(first, first + tokens))
        alone = tuple(tensor[here].detach().requires_grad_() for tensor in inputs)
        wanted, wanted_indices, wanted_mass = attend(*alone, sink, None)
        torch.testing.assert_close(output[here], wanted)
        torch.testing.assert_close(mass[row : row + 1, :, here[1]], wanted_mass)
        got = indices[row : row + 1, :, here[1]]
        assert torch.equal(got, wanted_indices)
        *wanted_gradients, sink_gradient = gradients(wanted, (*alone, sink), weight[here])
        sum_of_sinks += sink_gradient
        for actual, expected in zip(packed[:3], wanted_gradients, strict=True):
            torch.testing.assert_close(actual[here], expected)
        begin += tokens
    torch.testing.assert_close(packed[3], sum_of_sinks)


def test_nothing_leaks_into_another_document(seed: int) -> None:
    query, key, value = (torch.randn(2, 40, heads, 8) for heads in (4, 2, 2))
    sink = torch.randn(4)
    lengths = [13, 27, 40]
    results = []
    for _ in range(2):
        inputs = tuple(tensor.clone().requires_grad_() for tensor in (query, key, value))
        output, indices, mass = attend(*inputs, sink, offsets(lengths))
        weight = torch.ones_like(output, dtype=torch.float64)
        results.append((output, indices.transpose(1, 2), mass.transpose(1, 2)))
        results[-1] += gradients(output, inputs, weight)
        for tensor in (query, key, value):
            tensor[0, :13] = 5 * torch.randn_like(tensor[0, :13])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[0, 13:], after[0, 13:])
        assert torch.equal(before[1], after[1])
    assert not torch.equal(results[0][0][0, :13], results[1][0][0, :13])


def test_cut() -> None:
    pieces = cut(offsets([5, 0, 1, 8, 0]), 4, 14)
    assert len(pieces) == 4 + 5
    fields = (pieces.first, pieces.stop, pieces.document_first, pieces.document_stop)
    assert torch.stack(fields, 1).tolist() == [
        [0, 4, 0, 5],
        [4, 5, 0, 5],
        [5, 6, 5, 6],
        [6, 10, 6, 14],
        [10, 14, 6, 14],
        *[[14] * 4] * 4,
    ]
    # From token 3 to token 9: documents that began before are cut from there.
    pieces = cut(offsets([5, 0, 1, 8, 0]), 4, 6, first_token=3)
    fields = (pieces.first, pieces.stop, pieces.document_first, pieces.document_stop)
    assert torch.stack(fields, 1).tolist() == [
        [3, 5, 0, 5],
        [5, 6, 5, 6],
        [6, 9, 6, 14],
        *[[9] * 4] * 4,
    ]


def test_document_starts() -> None:
    assert document_starts(offsets([0, 2, 0, 1, 3, 0]), 6).tolist() == [0, 0, 2, 3, 3, 3]


def test_agreement_ignores_borders() -> None:
    indices = torch.tensor([[0, -1], [0, 1], [0, 1], [0, 2]], dtype=torch.int32).view(1, 1, 4, 2)
    assert neighbour_agreement(indices, offsets([2, 2])).item() == pytest.approx(0.5)
    assert neighbour_agreement(indices, offsets([1, 1, 1, 1])).item() == 0
