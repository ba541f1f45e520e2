"""What must hold whatever the numbers: dense limits, sinks, causality, exact zeros, recompute."""

import math
import random
from typing import Any

import pytest
import torch
from hysparse_kernels import block_sparse_attention, oracle_attention, sliding_window_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import Case, gradients, random_case, random_indices, random_qkv

SMALL = Case(2, 37, 6, 2, 8, 5, 4, 3, 9, 10, None)


def dense_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    swapped = (x.transpose(1, 2) for x in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*swapped, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("trial", range(4))
def test_everything_selected_is_dense_attention(trial: int, rng: random.Random) -> None:
    case = random_case(rng)
    print(case)
    query, key, value = inputs = random_qkv(case)
    size = case.block_size
    num_blocks = -(-case.length // size)
    oracle = oracle_attention(
        query,
        key,
        value,
        block_size=size,
        num_selected=num_blocks + trial,
        query_chunk=case.query_chunk,
    )
    sparse = block_sparse_attention(query, key, value, oracle.block_indices, block_size=size)
    window = sliding_window_attention(query, key, value, window=case.length + trial)
    expected = dense_causal(query, key, value)
    weight = torch.randn_like(expected)
    expected_grads = gradients(expected, inputs, weight)
    for actual in (oracle.output, sparse, window):
        torch.testing.assert_close(actual, expected)
        for got, wanted in zip(gradients(actual, inputs, weight), expected_grads, strict=True):
            torch.testing.assert_close(got, wanted)


def with_sink(
    kind: str, inputs: tuple[Tensor, ...], rng: random.Random, sink: Tensor | None
) -> Tensor:
    if kind == "window":
        return sliding_window_attention(*inputs, window=SMALL.window, sink=sink, query_chunk=10)
    indices = random_indices(SMALL, rng)
    return block_sparse_attention(
        *inputs, indices, block_size=SMALL.block_size, sink=sink, query_chunk=10
    )


@pytest.mark.parametrize("kind", ["window", "block_sparse"])
def test_sink_limits(kind: str, seed: int) -> None:
    inputs = random_qkv(SMALL)
    outputs = {}
    for level in (None, -math.inf, 0.0, 300.0):
        sink = None
        if level is not None:
            sink = torch.full((SMALL.heads,), level, dtype=torch.float64)
        outputs[level] = with_sink(kind, inputs, random.Random(seed), sink)
    assert torch.equal(outputs[None], outputs[-math.inf])
    assert (outputs[0.0].abs() <= outputs[None].abs()).all()
    assert not torch.equal(outputs[0.0], outputs[None])
    assert outputs[300.0].abs().max() < 1e-50


def test_minus_infinite_sink_gives_finite_gradients(seed: int) -> None:
    query, key, value = inputs = random_qkv(SMALL)
    sink = torch.full((SMALL.heads,), -math.inf, dtype=torch.float64, requires_grad=True)
    indices = torch.full((2, 2, 37, 3), -1, dtype=torch.int32)
    indices[:, :, 5:, 0] = 1
    output = block_sparse_attention(query, key, value, indices, block_size=4, sink=sink)
    for gradient in gradients(output, (*inputs, sink), torch.randn_like(output)):
        assert gradient.isfinite().all()


def test_sink_in_another_dtype_keeps_it(seed: int) -> None:
    query, key, value = random_qkv(SMALL, torch.bfloat16)
    sink = torch.zeros(SMALL.heads, dtype=torch.float32, requires_grad=True)
    sliding_window_attention(query, key, value, window=4, sink=sink).sum().backward()
    assert sink.grad is not None
    assert sink.grad.dtype == torch.float32
    assert sink.grad.abs().max() > 0


@pytest.mark.parametrize("sink", [None, torch.zeros(6, dtype=torch.float64)])
def test_rows_that_see_nothing_are_zero(sink: Tensor | None, seed: int) -> None:
    inputs = random_qkv(SMALL)
    indices = random_indices(SMALL, random.Random(seed))
    indices[:, 0, 3:7] = -1
    indices[:, 1, 2] = 5  # a block of the future is as good as none
    output = block_sparse_attention(*inputs, indices, block_size=4, sink=sink)
    assert (output[:, 3:7, :3] == 0).all()
    assert (output[:, 2, 3:] == 0).all()
    for gradient in gradients(output, inputs, torch.randn_like(output)):
        assert gradient.isfinite().all()


def test_duplicates_and_order_change_nothing(seed: int) -> None:
    inputs = random_qkv(SMALL)
    oracle = oracle_attention(*inputs, block_size=4, num_selected=3)
    once = block_sparse_attention(*inputs, oracle.block_indices, block_size=4)
    shuffled = torch.cat([oracle.block_indices.flip(-1), oracle.block_indices], dim=-1)
    assert torch.equal(block_sparse_attention(*inputs, shuffled, block_size=4), once)


def test_unselected_blocks_get_exactly_zero_gradient(seed: int) -> None:
    query, key, value = random_qkv(SMALL)
    indices = random_indices(SMALL, random.Random(seed))
    indices[(indices == 1) | (indices == 6)] = 0
    output = block_sparse_attention(query, key, value, indices, block_size=4, query_chunk=10)
    output.square().sum().backward()
    for gradient in (key.grad, value.grad):
        assert (gradient[:, 4:8] == 0).all()
        assert (gradient[:, 24:28] == 0).all()
        assert gradient[:, :4].abs().max() > 0


def test_future_tokens_move_nothing_before_them(rng: random.Random) -> None:
    query, key, value = (x.detach() for x in random_qkv(SMALL))
    t = rng.randrange(1, SMALL.length)
    print(f"token {t}")
    changed = [x.clone() for x in (query, key, value)]
    for tensor in changed:
        tensor[:, t] += 3 * torch.randn_like(tensor[:, t])
    results = []
    for inputs in ((query, key, value), changed):
        oracle = oracle_attention(*inputs, block_size=4, num_selected=3, query_chunk=10)
        sparse = block_sparse_attention(*inputs, oracle.block_indices, block_size=4)
        window = sliding_window_attention(*inputs, window=9, query_chunk=10)
        results.append((oracle, sparse, window))
    (oracle, sparse, window), (oracle2, sparse2, window2) = results
    assert torch.equal(oracle.block_indices[:, :, :t], oracle2.block_indices[:, :, :t])
    for before, after in ((oracle.output, oracle2.output), (sparse, sparse2), (window, window2)):
        torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-12, atol=1e-13)
        assert not torch.equal(before[:, t], after[:, t])


def test_a_chunk_reads_only_its_own_keys(seed: int) -> None:
    """NaN in what a chunk of queries has no business with does not reach it."""
    query, key, value = (x.detach() for x in random_qkv(SMALL))
    poisoned_key, poisoned_value = key.clone(), value.clone()
    poisoned_key[:, 20:], poisoned_value[:, 20:] = math.nan, math.nan
    arguments: dict[str, Any] = {"block_size": 4, "num_selected": 3, "query_chunk": 10}
    clean = oracle_attention(query, key, value, **arguments)
    poisoned = oracle_attention(query, poisoned_key, poisoned_value, **arguments)
    assert torch.equal(clean.output[:, :20], poisoned.output[:, :20])
    assert torch.equal(clean.block_indices[:, :, :20], poisoned.block_indices[:, :, :20])

    poisoned_key, poisoned_value = key.clone(), value.clone()
    poisoned_key[:, :12], poisoned_value[:, :12] = math.nan, math.nan
    window: dict[str, Any] = {"window": 9, "query_chunk": 10}
    clean_window = sliding_window_attention(query, key, value, **window)
    poisoned_window = sliding_window_attention(query, poisoned_key, poisoned_value, **window)
    assert torch.equal(clean_window[:, 20:], poisoned_window[:, 20:])


def test_strided_views_are_accepted(seed: int) -> None:
    """Megatron's activations are [S, B, H, D]; the transposed view needs no copy."""
    contiguous = random_qkv(SMALL)
    strided = tuple(
        x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in contiguous
    )
    assert not strided[0].is_contiguous()
    weight = torch.randn(2, 37, 6, 5, dtype=torch.float64)
    outputs = [
        oracle_attention(*inputs, block_size=4, num_selected=2, query_chunk=10).output
        for inputs in (contiguous, strided)
    ]
    torch.testing.assert_close(*outputs)
    left, right = gradients(outputs[0], contiguous, weight), gradients(outputs[1], strided, weight)
    for got, wanted in zip(left, right, strict=True):
        torch.testing.assert_close(got, wanted)


def test_autocast_lowers_no_precision(seed: int) -> None:
    inputs = random_qkv(SMALL, torch.float32)
    plain = oracle_attention(*inputs, block_size=4, num_selected=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = oracle_attention(*inputs, block_size=4, num_selected=2)
    assert torch.equal(plain.output, cast.output)
    assert torch.equal(plain.block_indices, cast.block_indices)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_activation_recompute(reentrant: bool, seed: int) -> None:
    """Nested in a recompute, with the backward started the way Megatron's schedules start it."""
    inputs = random_qkv(SMALL)
    sink = torch.randn(SMALL.heads, dtype=torch.float64, requires_grad=True)

    def layer(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        oracle = oracle_attention(query, key, value, block_size=4, num_selected=2, query_chunk=10)
        sparse = block_sparse_attention(
            query, key, value, oracle.block_indices, block_size=4, sink=sink, query_chunk=10
        )
        window = sliding_window_attention(query, key, value, window=9, sink=sink, query_chunk=10)
        return oracle.output + sparse * window

    plain = layer(*inputs, sink)
    weight = torch.randn_like(plain)
    expected = gradients(plain, (*inputs, sink), weight)
    recomputed = checkpoint(layer, *inputs, sink, use_reentrant=reentrant)
    assert torch.equal(recomputed, plain)
    torch.autograd.Variable._execution_engine.run_backward(
        tensors=(recomputed,),
        grad_tensors=(weight,),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )
    for tensor, wanted in zip((*inputs, sink), expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted)


def test_selection_and_lse_carry_no_gradient(seed: int) -> None:
    result = oracle_attention(*random_qkv(SMALL), block_size=4, num_selected=2)
    assert result.output.requires_grad
    assert not result.lse.requires_grad
    assert not result.block_indices.requires_grad


def test_repeats_bitwise(seed: int) -> None:
    inputs = random_qkv(SMALL, torch.float32)
    runs = []
    for _ in range(2):
        result = oracle_attention(*inputs, block_size=4, num_selected=2, query_chunk=10)
        weight = torch.ones_like(result.output, dtype=torch.float64)
        runs.append((*result, *gradients(result.output, inputs, weight)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
