"""The bounds of rounding: they let through what types of few digits do, and no fault."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hysparse_kernels import block_sparse_attention, oracle_attention, sliding_window_attention
from torch import Tensor

from tests.kernels import rounding
from tests.kernels.cases import (
    Case,
    blocks_of,
    causal_keys,
    random_case,
    random_indices,
    random_qkv,
    selected_keys,
    window_keys,
)
from tests.kernels.rounding import Variances, assert_within

NAMES = ("output", "dq", "dk", "dv", "dsink")
SMALL = Case(2, 37, 6, 2, 8, 5, 4, 3, 9, 10, None)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def results(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients of query, key, value and sink."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = attend(*leaves)
    found = torch.autograd.grad(output, leaves, grad.to(output.dtype), materialize_grads=True)
    return [output.detach(), *found]


def masked(seen: Tensor) -> Callable[..., Tensor]:
    """Attention of the textbook with one mask [B, HKV, S, S]."""

    def attend(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        per_group = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(per_group, 2) for tensor in (key, value))
        logits = torch.einsum("bshd,bthd->bhst", query, key) * query.shape[3] ** -0.5
        logits = logits.masked_fill(~seen.repeat_interleave(per_group, 1), -math.inf)
        extra = sink[None, :, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
        return torch.einsum("bhst,bthd->bshd", weights, value)

    return attend


def problem(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Query, key, value and sink; the output's gradient; where documents start."""
    query, key, value = (tensor.detach().to(dtype) for tensor in random_qkv(case))
    grad = torch.randn(*query.shape[:3], value.shape[3]).to(dtype)
    starts = torch.zeros(case.batch, case.length, dtype=torch.int64)
    return [query, key, value, torch.randn(case.heads)], grad, starts


def check(found: list[Tensor], exact: list[Tensor], allowed: Variances) -> None:
    for name, a, b, variance in zip(NAMES, found, exact, allowed.numbers, strict=True):
        if variance is not None:
            assert_within(a, b, variance, name)


@DTYPES
@pytest.mark.parametrize("trial", range(4))
def test_the_reference_is_within(trial: int, dtype: torch.dtype, rng: random.Random) -> None:
    """Any sizes: one token, one key in a window, blocks of one token, rows that see nothing."""
    case = replace(random_case(rng), softmax_scale=None)
    print(case)
    inputs, grad, starts = problem(case, dtype)
    indices, size = random_indices(case, rng), case.block_size
    operations: list[tuple[Callable[..., Tensor], Tensor, bool]] = [
        (
            lambda q, k, v, s: oracle_attention(q, k, v, block_size=size, num_selected=1).output,
            causal_keys(starts),
            False,
        ),
        (
            lambda q, k, v, s: block_sparse_attention(q, k, v, indices, block_size=size, sink=s),
            selected_keys(starts, indices, size),
            True,
        ),
        (
            lambda q, k, v, s: sliding_window_attention(q, k, v, window=case.window, sink=s),
            window_keys(starts, case.window),
            True,
        ),
    ]
    for attend, seen, has_sink in operations:
        sink = inputs[3] if has_sink else None
        allowed = rounding.attention(*inputs[:3], seen, dtype=dtype, sink=sink, grad=grad)
        exact = results(attend, [tensor.double() for tensor in inputs], grad.double())
        check(results(attend, inputs, grad), exact, allowed)


def faulty_masks(seen: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """What a kernel with a small fault would see in place of `seen`, a window of 9 tokens."""
    one_key = seen.clone()
    one_key[:, :, :, 22] = False
    next_token = torch.ones(SMALL.length, SMALL.length, dtype=torch.bool).triu(2).logical_not()
    return {
        "a window too short by one": window_keys(starts, 8).expand_as(seen),
        "a window too long by one": window_keys(starts, 10).expand_as(seen),
        "one key of a block left out": one_key,
        "queries that see the next token": seen.roll(1, 3) & next_token | seen,
    }


@DTYPES
def test_small_faults_are_beyond_it(dtype: torch.dtype, seed: int) -> None:
    inputs, grad, starts = problem(SMALL, dtype)
    seen = window_keys(starts, SMALL.window).expand(2, 2, -1, -1)
    allowed = rounding.attention(*inputs[:3], seen, dtype=dtype, sink=inputs[3], grad=grad)
    wide, wide_grad = [tensor.double() for tensor in inputs], grad.double()
    exact = results(masked(seen), wide, wide_grad)
    check(exact, exact, allowed)
    found: list[tuple[str, int, Tensor]] = []
    for fault, mask in faulty_masks(seen, starts).items():
        faulty = results(masked(mask), wide, wide_grad)
        found += [(fault, which, faulty[which]) for which in range(4)]
    no_sink = results(masked(seen), [*wide[:3], wide[3] - 100], wide_grad)
    half = wide_grad * (torch.arange(SMALL.heads) % 2)[:, None]
    found += [
        ("the sink left out", 0, no_sink[0]),
        ("the sink's gradient left out", 4, torch.zeros_like(exact[4])),
        ("its sign", 4, -exact[4]),
        ("a scale left out", 1, exact[1] * SMALL.head_dim**0.5),
        ("half of the heads", 2, results(masked(seen), wide, half)[2]),
        ("half of the heads", 3, results(masked(seen), wide, half)[3]),
        ("the row before", 3, exact[3].roll(1, 1)),
    ]
    # One token of 37 whose heaviest key is not seen, in one group.
    logits = torch.einsum("hd,td->ht", wide[0][0, 30, :3], wide[1][0, :, 0])
    one_row = seen.clone()
    one_row[0, 0, 30, logits[0, 22:31].argmax() + 22] = False
    found.append(("one row without a key", 0, results(masked(one_row), wide, wide_grad)[0]))
    for fault, which, wrong in found:
        variance = allowed.numbers[which]
        assert variance is not None
        with pytest.raises(AssertionError, match="rounding moves it"):
            assert_within(wrong, exact[which], variance, f"{NAMES[which]} with {fault}")


@DTYPES
def test_what_cancels_still_rounds_and_what_is_hidden_does_not(
    dtype: torch.dtype, seed: int
) -> None:
    """A query with one key: its weight is one, so that no gradient reaches query and key."""
    one_token = replace(SMALL, length=1)
    inputs, grad, _ = problem(one_token, dtype)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    allowed = rounding.attention(*inputs[:3], seen, dtype=dtype, grad=grad)
    _, key, value = (tensor.double().abs() for tensor in inputs[:3])
    of_heads = torch.einsum("btkgd,btkd->btkg", grad.double().abs().unflatten(2, (2, 3)), value)
    terms = (of_heads[..., None] * key[:, :, :, None]).flatten(2, 3) * SMALL.head_dim**-0.5
    assert allowed.query is not None
    assert allowed.key is not None
    assert (allowed.query > 0).all()
    assert (allowed.key > 0).all()
    assert (allowed.query.sqrt() < 500 * rounding.Unit.of(dtype).stored * terms).all()
    allowed = rounding.attention(
        *inputs[:3], ~seen, dtype=dtype, grad=grad, sink=torch.zeros(one_token.heads)
    )
    for variance in allowed.numbers:
        assert variance is not None
        assert not variance.any()
    nothing = torch.zeros(2, 1, 2, 8)
    assert_within(nothing, nothing, torch.zeros(2, 1, 2, 8), "nothing")
    with pytest.raises(AssertionError, match="by at most 0"):
        assert_within(nothing + 1e-30, nothing, torch.zeros(2, 1, 2, 8), "nothing")


def test_a_selection_may_differ_by_near_ties_alone() -> None:
    offered = torch.tensor([3.0, 1.0, 1.0 + 1e-9, math.inf, 2.0, -math.inf]).double()
    variance = torch.tensor(1e-18)

    def wrong(*ids: int) -> bool:
        return bool(rounding.wrong_rows(torch.tensor(ids, dtype=torch.int32), offered, variance))

    assert not wrong(0, 2, 3, 4)
    assert not wrong(0, 1, 3, 4), "within rounding of the best"
    assert not wrong(0, 1, 2, 3, 4, -1, -1)
    assert wrong(0, 1, 2, 3), "2.0 is better than both"
    assert wrong(0, 2, 4, -1), "the forced one"
    assert wrong(0, 3, 4, 5), "one that is not visible"
    assert wrong(0, 3, 2, 4), "not in order"
    assert wrong(0, 0, 3, 4), "named twice"
    assert wrong(0, 1, 2, 3, 4, 5)


@DTYPES
def test_the_next_best_block_is_no_near_tie(dtype: torch.dtype, rng: random.Random) -> None:
    inputs, _, starts = problem(SMALL, dtype)
    query, key, _, _ = inputs
    seen, block = causal_keys(starts), blocks_of(starts, SMALL.block_size)
    allowed = rounding.attention(query, key, key, seen, dtype=dtype)
    result = oracle_attention(
        query.double(), key.double(), key.double(), block_size=SMALL.block_size, num_selected=3
    )
    scores = rounding.block_scores(query, key, result.lse, seen, block)
    assert result.block_indices is not None
    assert not rounding.wrong_rows(result.block_indices, scores, allowed.scores).any()
    last = scores[:, :, -1].argsort(-1, descending=True)
    other = result.block_indices.clone()
    other[:, :, -1] = torch.cat([last[..., :2], last[..., 3:4]], -1).sort(-1).values.int()
    wrong = rounding.wrong_rows(other, scores, allowed.scores)
    ranked = scores[:, :, -1].sort(-1, descending=True).values
    apart = ranked[..., 2] - ranked[..., 3] > 1e-3
    assert torch.equal(wrong[:, :, -1] | ~apart, torch.ones_like(apart))
    assert not wrong[:, :, :-1].any()
