"""Numbers about a sample of queries: those of all queries, picked out."""

import itertools
import math
import random

import pytest
import torch
from hysparse_kernels import (
    has_a_choice,
    neighbour_agreement,
    oracle_attention,
    selected_mass_of_sample,
    shared_blocks,
)
from torch import Tensor

from tests.kernels.cases import Case, offsets, random_case, random_documents, random_qkv

DOCUMENTS = pytest.mark.parametrize("documents", [False, True])


def problem(
    rng: random.Random, documents: bool
) -> tuple[Case, Tensor, Tensor, Tensor, Tensor | None]:
    """A random case, its query, key and selection, and where documents start, if any do."""
    case = random_case(rng)
    print(case)
    query, key, value = (tensor.detach() for tensor in random_qkv(case))
    lengths = random_documents(case.batch, case.length, rng)
    cu_seqlens = offsets(lengths) if documents else None
    indices = oracle_attention(
        query,
        key,
        value,
        block_size=case.block_size,
        num_selected=case.num_selected,
        softmax_scale=case.softmax_scale,
        cu_seqlens=cu_seqlens,
    ).block_indices
    return case, query, key, indices, cu_seqlens


def first_tokens(case: Case, cu_seqlens: Tensor | None) -> list[list[int]]:
    """The first token of every token's document, counted in its row."""
    starts = [0, case.batch * case.length] if cu_seqlens is None else cu_seqlens.tolist()
    rows = range(0, case.batch * case.length, case.length)
    starts = sorted({*starts, *rows})
    return [
        [max(start for start in starts if start <= row + t) - row for t in range(case.length)]
        for row in rows
    ]


@DOCUMENTS
@pytest.mark.parametrize("trial", range(4))
def test_mass_of_a_sample_is_that_of_the_full_softmax(
    trial: int, documents: bool, rng: random.Random
) -> None:
    case, query, key, indices, cu_seqlens = problem(rng, documents)
    positions = sorted(rng.sample(range(case.length), rng.randint(1, case.length)))
    mass = selected_mass_of_sample(
        query[:, positions],
        key,
        indices[:, :, positions],
        torch.tensor(positions),
        block_size=case.block_size,
        softmax_scale=case.softmax_scale,
        cu_seqlens=cu_seqlens,
    )
    assert mass.shape == (case.batch, case.heads, len(positions))
    firsts = first_tokens(case, cu_seqlens)
    scale = case.softmax_scale or 1 / math.sqrt(case.head_dim)
    for b, h, p in itertools.product(range(case.batch), range(case.heads), range(len(positions))):
        t, group = positions[p], h // (case.heads // case.groups)
        first = firsts[b][t]
        logits = key[b, first : t + 1, group] @ query[b, t, h] * scale
        probability = torch.softmax(logits, 0)
        read = set(indices[b, group, t].tolist())
        expected = sum(
            share.item()
            for token, share in enumerate(probability)
            if token // case.block_size in read
        )
        assert mass[b, h, p].item() == pytest.approx(expected, abs=1e-12)


@DOCUMENTS
@pytest.mark.parametrize("trial", range(4))
def test_who_has_a_choice(trial: int, documents: bool, rng: random.Random) -> None:
    case, _, _, _, cu_seqlens = problem(rng, documents)
    positions = torch.arange(case.length)
    found = has_a_choice(
        positions,
        case.num_selected,
        block_size=case.block_size,
        batch=case.batch,
        sequence=case.length,
        cu_seqlens=cu_seqlens,
    )
    expected = [
        [-(-(t + 1 - first) // case.block_size) > case.num_selected for t, first in enumerate(row)]
        for row in first_tokens(case, cu_seqlens)
    ]
    assert found.tolist() == expected


def test_shared_blocks_by_hand() -> None:
    before = torch.tensor([[0, 1, 5], [0, -1, -1], [2, 3, 4]], dtype=torch.int32)
    after = torch.tensor([[1, 5, 7], [0, 1, -1], [-1, -1, -1]], dtype=torch.int32)
    assert shared_blocks(before, after).tolist() == pytest.approx([2 / 3, 1 / 2, 0])


def test_shared_blocks_of_all_pairs_are_the_agreement(rng: random.Random) -> None:
    _, _, _, indices, _ = problem(rng, documents=False)
    if indices.shape[2] > 1:
        shares = shared_blocks(indices[:, :, :-1], indices[:, :, 1:])
        assert shares.mean().item() == pytest.approx(neighbour_agreement(indices).item())
