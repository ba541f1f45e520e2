"""The three operations on random problems: outputs, selections and gradients, in fp64."""

import random
from collections.abc import Callable

import pytest
import torch
from hysparse_kernels import block_sparse_attention, oracle_attention, sliding_window_attention
from torch import Tensor

from tests.kernels import brute_force, rounding
from tests.kernels.cases import (
    Case,
    causal_keys,
    gradients,
    offsets,
    random_case,
    random_documents,
    random_indices,
    random_qkv,
    selected_keys,
    window_keys,
)
from tests.kernels.rounding import Variances, assert_within

TRIALS = range(12)


def assert_same(
    actual: Tensor,
    expected: Tensor,
    inputs: tuple[Tensor, ...],
    seen: Tensor,
    softmax_scale: float | None = None,
) -> Variances:
    """Assert output and gradients of query, key, value and, if given, sink; returns their bounds.

    `seen` bool [B, HKV or 1, S, S] says which keys a query sees. Inputs are those of `actual`.
    """
    weight = torch.randn_like(expected).to(actual.dtype)
    allowed = rounding.attention(
        *inputs[:3],
        seen,
        dtype=actual.dtype,
        sink=inputs[3] if len(inputs) > 3 else None,
        grad=weight,
        softmax_scale=softmax_scale,
    )
    assert_within(actual, expected, allowed.output, "output")
    names = ("query", "key", "value", "sink")
    actual_grads = gradients(actual, inputs, weight)
    expected_grads = gradients(expected, inputs, weight)
    for name, got, wanted, variance in zip(
        names, actual_grads, expected_grads, allowed.numbers[1:], strict=False
    ):
        assert variance is not None
        assert_within(got, wanted, variance, f"gradient of {name}")
    return allowed


def random_sink(case: Case, rng: random.Random) -> Tensor | None:
    if rng.random() < 0.3:
        return None
    return torch.randn(case.heads, dtype=torch.float64).mul_(2.0).requires_grad_()


def random_packing(case: Case, rng: random.Random) -> tuple[Tensor | None, brute_force.Starts]:
    """cu_seqlens, half of the time none, and the same for the brute force."""
    if rng.random() < 0.5:
        return None, brute_force.one_document(case.batch, case.length)
    lengths = random_documents(case.batch, case.length, rng)
    print(lengths)
    return offsets(lengths), brute_force.document_starts(lengths, case.batch, case.length)


def drawn(
    rng: random.Random,
) -> tuple[Case, tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, brute_force.Starts]]:
    """A case, its query, key and value, and its documents as `random_packing` says them."""
    case = random_case(rng)
    print(case)
    return case, random_qkv(case), random_packing(case, rng)


@pytest.mark.parametrize("trial", TRIALS)
def test_oracle_attention(trial: int, rng: random.Random) -> None:
    case, (query, key, value), (cu_seqlens, starts) = drawn(rng)
    forced_first = rng.randint(0, min(1, case.num_selected))
    forced_recent = rng.randint(0, min(2, case.num_selected - forced_first))
    result = oracle_attention(
        query,
        key,
        value,
        block_size=case.block_size,
        num_selected=case.num_selected,
        softmax_scale=case.softmax_scale,
        forced_first_blocks=forced_first,
        forced_recent_blocks=forced_recent,
        cu_seqlens=cu_seqlens,
        query_chunk=case.query_chunk,
    )
    scale = case.softmax_scale
    expected = brute_force.attend(query, key, value, brute_force.causal(starts), scale=scale)
    seen = causal_keys(torch.tensor(starts))
    allowed = assert_same(result.output, expected, (query, key, value), seen, scale)
    lse = brute_force.log_sum_exp(query, key, scale, starts)
    assert_within(result.lse, lse, allowed.lse, "lse")
    selected = brute_force.select(
        query,
        key,
        case.block_size,
        case.num_selected,
        scale,
        forced_first,
        forced_recent,
        starts=starts,
    )
    assert torch.equal(result.block_indices, selected)
    assert result.block_indices.dtype == torch.int32


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("branch", ["blocks", "window"])
def test_branches_of_sparse_layers(branch: str, trial: int, rng: random.Random) -> None:
    case, qkv, (cu_seqlens, starts) = drawn(rng)
    sink = random_sink(case, rng)
    options = {
        "sink": sink,
        "softmax_scale": case.softmax_scale,
        "cu_seqlens": cu_seqlens,
        "query_chunk": case.query_chunk,
    }
    if branch == "window":
        actual = sliding_window_attention(*qkv, window=case.window, **options)
        visible = brute_force.last_tokens(case.window, starts)
        seen = window_keys(torch.tensor(starts), case.window)
    else:
        indices = random_indices(case, rng)
        actual = block_sparse_attention(*qkv, indices, block_size=case.block_size, **options)
        visible = brute_force.selected_tokens(indices, case.block_size, starts)
        seen = selected_keys(torch.tensor(starts), indices, case.block_size)
    expected = brute_force.attend(*qkv, visible, sink, case.softmax_scale)
    inputs = qkv if sink is None else (*qkv, sink)
    assert_same(actual, expected, inputs, seen, case.softmax_scale)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def operations(case: Case, rng: random.Random) -> dict[str, tuple[Attend, Tensor]]:
    """Each with the keys that it sees; all but the oracle have a sink."""
    indices = random_indices(case, rng)
    size, chunk = case.block_size, case.query_chunk
    starts = torch.zeros(case.batch, case.length, dtype=torch.int64)
    return {
        "oracle": (
            lambda q, k, v, _sink: (
                oracle_attention(q, k, v, block_size=size, num_selected=2, query_chunk=chunk).output
            ),
            causal_keys(starts),
        ),
        "block_sparse": (
            lambda q, k, v, s: block_sparse_attention(
                q, k, v, indices, block_size=size, sink=s, query_chunk=chunk
            ),
            selected_keys(starts, indices, size),
        ),
        "window": (
            lambda q, k, v, s: sliding_window_attention(
                q, k, v, window=3, sink=s, query_chunk=chunk
            ),
            window_keys(starts, 3),
        ),
    }


@pytest.mark.thorough
@pytest.mark.parametrize("operation", ["oracle", "block_sparse", "window"])
def test_gradcheck(operation: str, rng: random.Random) -> None:
    case = Case(2, 7, 4, 2, 3, 2, 3, 2, 3, 4, None)
    query, key, value = random_qkv(case)
    sink = torch.randn(case.heads, dtype=torch.float64, requires_grad=True)
    attend, _ = operations(case, rng)[operation]
    assert torch.autograd.gradcheck(attend, (query, key, value, sink))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("operation", ["oracle", "block_sparse", "window"])
def test_low_precision_inputs(operation: str, dtype: torch.dtype, rng: random.Random) -> None:
    case = Case(1, 33, 4, 2, 16, 8, 4, 3, 3, 8, None)
    low = random_qkv(case, dtype, sharpness=1.0)
    exact = tuple(x.detach().double().requires_grad_() for x in low)
    sink = torch.randn(case.heads, dtype=torch.float32)
    attend, seen = operations(case, rng)[operation]
    actual, expected = attend(*low, sink), attend(*exact, sink)
    assert actual.dtype == dtype
    weight = torch.randn_like(expected).to(dtype)
    sinks = None if operation == "oracle" else sink
    allowed = rounding.attention(*low, seen, dtype=dtype, sink=sinks, grad=weight)
    assert_within(actual, expected, allowed.output, "output")
    for name, got, wanted, variance in zip(
        ("query", "key", "value"),
        gradients(actual, low, weight),
        gradients(expected, exact, weight),
        allowed.numbers[1:4],
        strict=True,
    ):
        assert got.dtype == dtype
        assert variance is not None
        assert_within(got, wanted, variance, f"gradient of {name}")
