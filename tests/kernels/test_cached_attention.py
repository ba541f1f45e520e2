"""Attention of new tokens to a cache is the same attention: all tokens at once, in any pieces."""

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hysparse_kernels import (
    FP8,
    Chunk,
    TokenCache,
    WindowCache,
    block_sparse_attention,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
    gated_sum,
    oracle_attention,
    prepare_cached_selection,
    sliding_window_attention,
)
from hysparse_kernels.key_value_cache import from_fp8, to_fp8
from torch import Tensor

from tests.kernels import rounding
from tests.kernels.cases import Case, causal_keys, random_case, random_indices, random_qkv
from tests.kernels.rounding import assert_within

CPU = torch.device("cpu")


def pieces(lengths: list[int], rng: random.Random) -> list[Chunk]:
    """Steps that bring sequences of these lengths in, some of them at a time, in random pieces."""
    past = [0] * len(lengths)
    steps = []
    while past != lengths:
        left = [row for row, length in enumerate(lengths) if past[row] < length]
        rows = rng.sample(left, rng.randint(1, len(left)))
        new = [rng.randint(1, min(9, lengths[row] - past[row])) for row in rows]
        steps.append(Chunk(tuple(rows), tuple(past[row] for row in rows), tuple(new), CPU))
        for row, count in zip(rows, new, strict=True):
            past[row] += count
    return steps


def columns(chunk: Chunk, *tensors: Tensor) -> list[Tensor]:
    """The step's part [A, C, ...] of tensors [B, S, ...], with NaN where a row has no token."""
    found = []
    for tensor in tensors:
        part = tensor.new_full((len(chunk.rows), chunk.width, *tensor.shape[2:]), torch.nan)
        for i, row, past, new in chunk.spans:
            part[i, :new] = tensor[row, past : past + new]
        found.append(part)
    return found


@dataclass
class Problem:
    """Sequences [B, S, ...] of which row b counts up to lengths[b], and the steps they come in."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    lengths: list[int]
    steps: list[Chunk]

    @property
    def options(self) -> dict[str, Any]:
        return {"softmax_scale": self.case.softmax_scale, "query_chunk": self.case.query_chunk}

    def token_cache(self, dtype: torch.dtype = torch.float64) -> TokenCache:
        case = self.case
        shape = (case.groups, case.head_dim, case.value_dim)
        return poisoned(TokenCache([length + 2 for length in self.lengths], *shape, dtype, CPU))

    def window_cache(self) -> WindowCache:
        case = self.case
        shape = (case.groups, case.head_dim, case.value_dim)
        return poisoned(WindowCache(case.batch, case.window, *shape, torch.float64, CPU))

    def assert_same(self, chunk: Chunk, found: Tensor, expected: Tensor) -> None:
        """Output [A, C, ...] of a step against [B, S, ...], where there are tokens."""
        for i, row, past, new in chunk.spans:
            torch.testing.assert_close(found[i, :new], expected[row, past : past + new])


def poisoned[Cache: (TokenCache, WindowCache)](cache: Cache) -> Cache:
    for tensor in cache.tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 127)
    return cache


def random_problem(rng: random.Random) -> Problem:
    case = random_case(rng)
    query, key, value = (tensor.detach() for tensor in random_qkv(case))
    lengths = [case.length, *(rng.randint(1, case.length) for _ in range(case.batch - 1))]
    return Problem(case, query, key, value, lengths, pieces(lengths, rng))


@pytest.mark.parametrize("trial", range(12))
def test_full_attention_and_its_selection(trial: int, rng: random.Random) -> None:
    problem = random_problem(rng)
    case = problem.case
    rule = {
        "block_size": case.block_size,
        "num_selected": case.num_selected,
        "forced_first_blocks": rng.randint(0, case.num_selected // 2),
        "forced_recent_blocks": rng.randint(0, case.num_selected // 2),
    }
    expected = oracle_attention(
        problem.query, problem.key, problem.value, softmax_scale=case.softmax_scale, **rule
    )
    assert expected.block_indices is not None
    cache = problem.token_cache()
    for chunk in problem.steps:
        tensors = columns(chunk, problem.query, problem.key, problem.value)
        found = cached_full_attention(*tensors, cache, chunk, **rule, **problem.options)
        problem.assert_same(chunk, found.output, expected.output)
        assert not any(found.output[i, new:].any() for i, _, _, new in chunk.spans)
        assert found.block_indices is not None
        for i, row, past, new in chunk.spans:
            wanted = expected.block_indices[row, :, past : past + new]
            assert torch.equal(found.block_indices[i, :, :new], wanted)


@pytest.mark.parametrize("trial", range(6))
def test_window_attention(trial: int, rng: random.Random) -> None:
    problem = random_problem(rng)
    case = problem.case
    sink = rng.choice([None, torch.randn(case.heads, dtype=torch.float64)])
    expected = sliding_window_attention(
        problem.query,
        problem.key,
        problem.value,
        window=case.window,
        sink=sink,
        softmax_scale=case.softmax_scale,
    )
    cache = problem.window_cache()
    for chunk in problem.steps:
        tensors = columns(chunk, problem.query, problem.key, problem.value)
        found = cached_window_attention(
            *tensors, cache, chunk, window=case.window, sink=sink, **problem.options
        )
        problem.assert_same(chunk, found, expected)
        assert not any(found[i, new:].any() for i, _, _, new in chunk.spans)


@pytest.mark.parametrize("trial", range(8))
def test_sparse_attention(trial: int, rng: random.Random) -> None:
    """Both branches and the gates; the oracle's tokens are in its cache before."""
    problem = random_problem(rng)
    case = problem.case
    window_key, window_value = torch.randn_like(problem.key), torch.randn_like(problem.value)
    gates = torch.randn(2, case.batch, case.length, case.heads, rng.choice([1, case.value_dim]))
    sinks = rng.choice([(None, None), tuple(torch.randn(2, case.heads, dtype=torch.float64))])
    rule = {"block_size": case.block_size, "num_selected": case.num_selected}
    scale = {"softmax_scale": case.softmax_scale}
    selected = oracle_attention(problem.query, problem.key, problem.value, **rule, **scale)
    assert selected.block_indices is not None
    own_query = torch.randn_like(problem.query)
    far = block_sparse_attention(
        own_query,
        problem.key,
        problem.value,
        selected.block_indices,
        block_size=case.block_size,
        sink=sinks[0],
        **scale,
    )
    near = sliding_window_attention(
        own_query, window_key, window_value, window=case.window, sink=sinks[1], **scale
    )
    expected = gated_sum(far, near, *gates)
    oracle, window = problem.token_cache(), problem.window_cache()
    for chunk in problem.steps:
        tensors = columns(chunk, problem.query, problem.key, problem.value)
        selection = cached_full_attention(*tensors, oracle, chunk, **rule, **scale).block_indices
        size = {"block_size": case.block_size}
        prepared = prepare_cached_selection(
            oracle, selection, chunk, query_heads=case.heads, dtype=torch.float64, **size
        )
        found = cached_sparse_attention(
            *columns(chunk, own_query, window_key, window_value, *gates),
            oracle,
            selection,
            window,
            chunk,
            **size,
            window=case.window,
            sparse_sink=sinks[0],
            window_sink=sinks[1],
            prepared=rng.choice([None, prepared]),
            **problem.options,
        )
        problem.assert_same(chunk, found, expected)


def test_ties_go_to_the_lowest_block(rng: random.Random) -> None:
    """Integers, so that equal keys score equally to the last bit in both forms.

    One head a group: lse, which two heads' scores differ by, is summed up in another order.
    """
    length, block_size = 40, 4
    query = torch.randint(-2, 3, (1, length, 2, 4)).float()
    key = torch.randint(-1, 2, (1, 6, 2, 4)).float().repeat(1, 7, 1, 1)[:, :length]
    rule = {"block_size": block_size, "num_selected": 3}
    expected = oracle_attention(query, key, key, softmax_scale=1.0, **rule)
    cache = TokenCache([length], 2, 4, 4, torch.float32, CPU)
    selected = []
    for past in range(length):
        chunk = Chunk((0,), (past,), (1,), CPU)
        tensors = columns(chunk, query, key, key)
        found = cached_full_attention(*tensors, cache, chunk, softmax_scale=1.0, **rule)
        selected.append(found.block_indices)
    logits = torch.einsum("tgd,jgd->gtj", query[0], key[0])[:, -1]
    best = logits.view(2, -1, block_size).amax(-1)
    assert any(len(set(of_group.tolist())) < len(of_group) for of_group in best), "no ties at all"
    assert torch.equal(torch.cat(selected, dim=2), expected.block_indices)


def test_split_groups_reduce_their_scores(rng: random.Random) -> None:
    """Heads of a group on two ranks: with the other's scores each selects what both select."""
    query = torch.randn(1, 30, 4, 8, dtype=torch.float64)
    key = torch.randn(1, 30, 1, 8, dtype=torch.float64)
    rule = {"block_size": 4, "num_selected": 2}
    chunk = Chunk((0,), (0,), (30,), CPU)

    def select(heads: slice, reduce: Any) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []

        def reduced(scores: Tensor) -> Tensor:
            seen.append(scores.clone())
            return reduce(scores)

        cache = TokenCache([30], 1, 8, 8, torch.float64, CPU)
        found = cached_full_attention(
            query[:, :, heads], key, key, cache, chunk, reduce_scores=reduced, **rule
        )
        assert found.block_indices is not None
        return found.block_indices, seen

    whole, _ = select(slice(None), lambda scores: scores)
    _, (other,) = select(slice(2, 4), lambda scores: scores)
    ours, seen = select(slice(0, 2), lambda scores: torch.maximum(scores, other))
    assert len(seen) == 1, "one reduction for all rows of a step"
    assert torch.equal(ours, whole)


@pytest.mark.parametrize("trial", range(4))
def test_fp8_is_within_its_error(trial: int, rng: random.Random) -> None:
    scale = 10.0 ** rng.uniform(-20, 20)
    given = torch.randn(50, 3, 16) * torch.logspace(-6, 0, 16) * scale
    given[0] = 0.0
    numbers, exponent = to_fp8(given)
    assert (numbers.dtype, exponent.dtype) == (FP8, torch.int8)
    largest = given.abs().amax(-1, keepdim=True)
    bound = torch.maximum(given.abs() / 16, largest * 2.0**-17)
    error = (from_fp8(numbers, exponent, torch.float32) - given).abs()
    assert (error <= bound).all()
    assert (error > bound / 4).any(), "the bound is far too wide"


def test_fp8_cache_is_attention_to_rounded_keys(rng: random.Random) -> None:
    """And a token reads its own chunk as later ones read it: pieces change nothing."""
    problem = random_problem(rng)
    case = problem.case
    query, key, value = (t.float() for t in (problem.query, problem.key, problem.value))
    rule = {"block_size": case.block_size, "num_selected": case.num_selected}
    rounded = [from_fp8(*to_fp8(tensor), torch.float64) for tensor in (key, value)]
    scale = {"softmax_scale": case.softmax_scale}
    expected = oracle_attention(query.double(), *rounded, **scale, **rule).output
    seen = causal_keys(torch.zeros(case.batch, case.length, dtype=torch.int64))
    allowed = rounding.attention(query, *rounded, seen, dtype=torch.float32, **scale).output
    cache = problem.token_cache(FP8)
    for chunk in problem.steps:
        tensors = columns(chunk, query, key, value)
        found = cached_full_attention(*tensors, cache, chunk, **rule, **problem.options).output
        for i, row, past, new in chunk.spans:
            here = (row, slice(past, past + new))
            assert_within(found[i, :new], expected[here], allowed[here], f"{chunk}")
    per_token = case.groups * (case.head_dim + case.value_dim + 2)
    tokens = sum(cache.capacities)
    assert sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors) == tokens * per_token


def test_sparse_layers_read_an_fp8_cache_as_it_is(rng: random.Random) -> None:
    """The oracle's keys are rounded, those of the window are not; pieces change nothing."""
    problem = random_problem(rng)
    case = problem.case
    given = (problem.query, problem.key, problem.value)
    gates = torch.randn(2, case.batch, case.length, case.heads, 1)
    size = {"block_size": case.block_size}
    rounded = [from_fp8(*to_fp8(tensor), torch.float64) for tensor in given[1:]]
    selection = random_indices(case, rng)
    far = block_sparse_attention(given[0], *rounded, selection, **size)
    near = sliding_window_attention(*given, window=case.window)
    expected = gated_sum(far, near, *gates)
    oracle, window = problem.token_cache(FP8), problem.window_cache()
    for chunk in problem.steps:
        oracle.append(chunk, *columns(chunk, *given[1:]))
        picks = torch.full((len(chunk.rows), case.groups, chunk.width, case.num_selected), -1)
        for i, row, past, new in chunk.spans:
            picks[i, :, :new] = selection[row, :, past : past + new]
            picks[i][picks[i] * case.block_size >= past + new] = -1  # of blocks that begin later
        found = cached_sparse_attention(
            *columns(chunk, *given, *gates), oracle, picks.int(), window, chunk,
            window=case.window, **size,
        )  # fmt: skip
        problem.assert_same(chunk, found, expected)


def test_a_full_cache_refuses(rng: random.Random) -> None:
    cache = TokenCache([3, 5], 1, 2, 2, torch.float32, CPU)
    chunk = Chunk((1, 0), (0, 2), (5, 2), CPU)
    with pytest.raises(ValueError, match="row 0 of the cache has room for 3 tokens: 2 are there"):
        cache.append(chunk, torch.zeros(2, 5, 1, 2), torch.zeros(2, 5, 1, 2))


def test_a_ring_keeps_the_last_tokens(rng: random.Random) -> None:
    cache = WindowCache(2, 4, 1, 1, 1, torch.float32, CPU)
    for past, new in itertools.pairwise([0, 3, 4, 13, 14]):
        tokens = torch.arange(past, new).float().view(1, -1, 1, 1)
        cache.append(Chunk((1,), (past,), (new - past,), CPU), tokens, -tokens)
        count = min(4, new)
        key, value = cache.before(1, new, count, torch.float32)
        assert key.flatten().tolist() == list(range(new - count, new))
        assert torch.equal(value, -key)
