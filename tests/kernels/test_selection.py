"""Which blocks are selected: Eq. 3 and not Algorithm 1, ties, forced blocks, split groups."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hysparse_kernels import (
    ReduceScores,
    block_topk,
    neighbour_agreement,
    oracle_attention,
    selected_mass,
)
from torch import Tensor

from tests.kernels import brute_force, rounding
from tests.kernels.cases import blocks_of, causal_keys, random_case, random_qkv


def agreement(left: Tensor, right: Tensor) -> float:
    """Share of the ids of ``left`` that the same row of ``right`` holds."""
    found = (left.unsqueeze(-1) == right.unsqueeze(-2)).any(-1)
    return found.double().mean().item()


def test_heads_of_different_sharpness_follow_equation_3(seed: int) -> None:
    """After the group max the printed Algorithm 1, without the exp, prefers diffuse heads."""
    length, heads, head_dim, block_size, num_selected = 256, 16, 16, 4, 16
    sharpness = torch.logspace(math.log10(0.3), math.log10(8.0), heads, dtype=torch.float64)
    query = torch.randn(1, length, heads, head_dim, dtype=torch.float64) * sharpness[:, None]
    key = torch.randn(1, length, 1, head_dim, dtype=torch.float64)
    ours = oracle_attention(
        query, key, key, block_size=block_size, num_selected=num_selected, query_chunk=64
    ).block_indices
    assert ours is not None
    assert torch.equal(ours, brute_force.select(query, key, block_size, num_selected))
    printed = brute_force.select(query, key, block_size, num_selected, printed_algorithm=True)
    offers_a_choice = slice(3 * num_selected * block_size, None)
    share = agreement(ours[:, :, offers_a_choice], printed[:, :, offers_a_choice])
    print(f"agreement with the printed algorithm: {share:.2f}")
    assert share < 0.8


def test_scores_do_not_underflow(seed: int) -> None:
    """Blocks whose probability is below the smallest fp32 still rank by it."""
    key = torch.tensor([0.0, -200.0, -300.0, -150.0, -400.0]).view(1, 5, 1, 1)
    query = torch.ones(1, 5, 1, 1)
    result = oracle_attention(
        query, key, key, block_size=1, num_selected=3, softmax_scale=1.0
    ).block_indices
    assert result[0, 0, -1].tolist() == [0, 1, 3]


def test_low_precision_selection_scores_in_fp32(seed: int) -> None:
    """Up to near-ties of fp32, far below what bf16 tells apart."""
    query = torch.randn(1, 200, 8, 32).mul_(3.0).bfloat16()
    key = torch.randn(1, 200, 2, 32).bfloat16()
    ours = oracle_attention(query, key, key, block_size=8, num_selected=4).block_indices
    starts = torch.zeros(1, 200, dtype=torch.int64)
    keys, blocks = causal_keys(starts), blocks_of(starts, 8)
    lse = brute_force.log_sum_exp(query, key)
    scores = rounding.block_scores(query, key, lse, keys, blocks)
    allowed = rounding.attention(query, key, key, keys, dtype=torch.bfloat16)
    assert not rounding.wrong_rows(ours, scores, allowed.scores).any()
    assert allowed.scores.max().sqrt() < 1e-4


@pytest.mark.parametrize("trial", range(10))
def test_block_topk(trial: int, rng: random.Random) -> None:
    """Scores with many ties, +inf and -inf, against sorted()."""
    num_blocks, num_selected = rng.randint(1, 30), rng.randint(1, 40)
    levels = [-math.inf, -2.0, 0.0, 1.5, math.inf]
    rows = [[rng.choice(levels) for _ in range(num_blocks)] for _ in range(6)]
    expected = []
    for row in rows:
        offered = [n for n in range(num_blocks) if row[n] > -math.inf]
        kept = sorted(sorted(offered, key=lambda n, r=row: (-r[n], n))[:num_selected])
        expected.append(kept + [-1] * (num_selected - len(kept)))
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    scores = torch.tensor(rows, dtype=dtype).view(2, 3, num_blocks)
    result = block_topk(scores, num_selected)
    assert result.dtype == torch.int32
    assert result.view(6, num_selected).tolist() == expected


def test_tie_goes_to_the_lowest_block_every_time() -> None:
    """Equal keys: every visible block has the same score, so the first ones win."""
    query, key = torch.ones(1, 600, 4, 8), torch.ones(1, 600, 2, 8)
    arguments: dict[str, Any] = {"block_size": 2, "num_selected": 5, "query_chunk": 100}
    results = [oracle_attention(query, key, key, **arguments).block_indices for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert (results[0][:, :, 8:] == torch.arange(5)).all()
    assert results[0][0, 0, 3].tolist() == [0, 1, -1, -1, -1]


def test_forced_blocks(seed: int) -> None:
    query, key = torch.randn(1, 64, 2, 8), torch.randn(1, 64, 1, 8)
    result = oracle_attention(
        query, key, key, block_size=4, num_selected=4, forced_first_blocks=1, forced_recent_blocks=2
    ).block_indices
    for t, row in enumerate(result[0, 0].tolist()):
        own = t // 4
        assert {0, own, max(own - 1, 0)} <= set(row)
        assert max(row) <= own


def test_own_partial_block_competes_like_any_other() -> None:
    """Token 5 opens block 1 with the weakest key: with K = 1 its own block is not selected."""
    key = torch.tensor([9.0, 0, 0, 0, -5.0, -5.0]).view(1, 6, 1, 1)
    query = torch.ones(1, 6, 1, 1)
    result = oracle_attention(query, key, key, block_size=4, num_selected=1).block_indices
    assert result[0, 0, 5].tolist() == [0]


def test_not_a_number_never_selects_the_future() -> None:
    query, key = torch.full((1, 8, 1, 2), math.nan), torch.randn(1, 8, 1, 2)
    result = oracle_attention(query, key, key, block_size=2, num_selected=4).block_indices
    own = torch.arange(8).view(8, 1) // 2
    assert (result[0, 0] <= own).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_group_split_over_two_ranks_selects_as_unsplit(groups: int, seed: int) -> None:
    """Each rank sees half of every group's heads; the max over ranks restores the group's max."""
    length, heads_per_group, chunk = 50, 8, 16
    query = torch.randn(1, length, groups, heads_per_group, 8, dtype=torch.float64) * 2
    key = torch.randn(1, length, groups, 8, dtype=torch.float64)
    arguments: dict[str, Any] = {"block_size": 4, "num_selected": 3, "query_chunk": chunk}

    def run(queries: Tensor, reduce_scores: ReduceScores | None) -> Tensor:
        return oracle_attention(
            queries.flatten(2, 3), key, key, reduce_scores=reduce_scores, **arguments
        ).block_indices

    halves = query.chunk(2, dim=3)
    seen: list[list[Tensor]] = [[], []]

    def record(scores: Tensor, rank: int) -> Tensor:
        seen[rank].append(scores.clone())
        return scores

    alone = [run(half, lambda scores, r=r: record(scores, r)) for r, half in enumerate(halves)]
    num_blocks = math.ceil(length / 4)
    expected_shapes = [(1, groups, c, num_blocks) for c in (16, 16, 16, 2)]
    assert [tuple(scores.shape) for scores in seen[0]] == expected_shapes
    assert all(not scores.requires_grad for scores in seen[0])

    def run_reduced(half: Tensor) -> Tensor:
        chunks = iter([torch.maximum(*ranks) for ranks in zip(*seen, strict=True)])
        return run(half, lambda _: next(chunks))

    both = [run_reduced(half) for half in halves]
    unsplit = run(query, None)
    assert torch.equal(both[0], unsplit)
    assert torch.equal(both[1], unsplit)
    assert not torch.equal(alone[0], unsplit)


def test_invisible_blocks_reach_the_reduction_as_minus_infinity(seed: int) -> None:
    query, key = torch.randn(1, 12, 2, 4), torch.randn(1, 12, 1, 4)
    seen: list[Tensor] = []

    def reduce_scores(scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    oracle_attention(
        query, key, key, block_size=4, num_selected=2, query_chunk=5, reduce_scores=reduce_scores
    )
    scores = torch.cat(seen, dim=2)[0, 0]
    visible = torch.arange(3) <= torch.arange(12).unsqueeze(1) // 4
    assert torch.equal(scores > -math.inf, visible)


def test_selection_is_made_once(seed: int) -> None:
    """Called per chunk in increasing order, not in backward, not at all when not selecting."""
    query = torch.randn(1, 40, 2, 4, requires_grad=True)
    key = torch.randn(1, 40, 1, 4, requires_grad=True)
    last_visible: list[int] = []

    def reduce_scores(scores: Tensor) -> Tensor:
        last_visible.append(int((scores[0, 0, -1] > -math.inf).sum()) - 1)
        return scores

    arguments: dict[str, Any] = {
        "block_size": 4,
        "num_selected": 2,
        "query_chunk": 12,
        "reduce_scores": reduce_scores,
    }
    result = oracle_attention(query, key, key, **arguments)
    result.output.sum().backward()
    assert last_visible == [2, 5, 8, 9]
    again = oracle_attention(query, key, key, select=False, **arguments)
    assert len(last_visible) == 4
    assert again.block_indices is None
    assert torch.equal(again.output, result.output)
    assert torch.equal(again.lse, result.lse)


def test_query_chunk_changes_no_selection(rng: random.Random) -> None:
    case = random_case(rng)
    query, key, value = random_qkv(case)
    results = [
        oracle_attention(
            query, key, value, block_size=case.block_size, num_selected=2, query_chunk=chunk
        ).block_indices
        for chunk in (1, 4, 11, 512)
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_neighbour_agreement() -> None:
    indices = torch.tensor([[0, -1], [0, 1], [2, 1], [3, 4]], dtype=torch.int32)
    assert neighbour_agreement(indices.view(1, 1, 4, 2)).item() == pytest.approx((0.5 + 0.5) / 3)


def test_selected_mass(seed: int) -> None:
    block_size, heads_per_group, head_dim = 3, 2, 8
    query = torch.randn(2, 20, 4, head_dim, dtype=torch.float64)
    key = torch.randn(2, 20, 2, head_dim, dtype=torch.float64)
    for num_selected in (2, 7):
        result = oracle_attention(query, key, key, block_size=block_size, num_selected=num_selected)
        mass = selected_mass(query, key, result.block_indices, result.lse, block_size=block_size)
        visible = brute_force.selected_tokens(
            result.block_indices, block_size, brute_force.one_document(2, 20)
        )
        expected = torch.zeros_like(mass)
        for b, h, t in itertools.product(range(2), range(4), range(20)):
            group = h // heads_per_group
            logits = key[b, visible(b, group, t), group] @ query[b, t, h] / math.sqrt(head_dim)
            expected[b, h, t] = torch.exp(logits - result.lse[b, h, t]).sum()
        torch.testing.assert_close(mass, expected)
    torch.testing.assert_close(mass, torch.ones_like(mass))
