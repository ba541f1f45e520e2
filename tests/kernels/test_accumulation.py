"""One sum of the key and value gradients of several layers, against plain autograd."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hysparse_kernels import KeyValueGradients, autograd, block_sparse_attention, oracle_attention
from hysparse_kernels.triton import kernels
from hysparse_kernels.triton.launch import KeySchedule, Saved
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK: dict[str, Any] = {"block_size": 4}
Run = Callable[..., Tensor]


def plainly(layer: Run, *inputs: Any) -> Tensor:
    return layer(*inputs)


def recomputed(reentrant: bool) -> Run:
    return lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=reentrant)


RUNS = {"plain": plainly, "reentrant": recomputed(True), "recompute": recomputed(False)}


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The oracle's hidden state, from which its key and value come, and three queries."""
    shapes = ((2, 21, 2, 13), *[(2, 21, 4, 8)] * 3)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def model(run: Run, accumulate: bool, used: tuple[int, ...], *inputs: Tensor) -> Tensor:
    """An oracle and two sparse layers on its key and value, of which the output takes `used`."""
    hidden, *queries = inputs
    key, value = (2 * hidden).split([8, 5], dim=3)
    gradients = KeyValueGradients() if accumulate else None
    if gradients is not None:
        key, value = gradients.attach(key, value)
    oracle = oracle_attention(queries[0], key, value, num_selected=2, **BLOCK)

    def sparse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_sparse_attention(
            query, key, value, oracle.block_indices, accumulate=gradients, **BLOCK
        )

    outputs = [oracle.output, *(run(sparse, query, key, value) for query in queries[1:])]
    return torch.stack([outputs[layer] for layer in used]).prod(0)


def backward(*arguments: Any) -> list[Tensor | None]:
    inputs = [tensor.clone().requires_grad_() for tensor in arguments[3:]]
    model(*arguments[:3], *inputs).square().sum().backward()
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("used", [(0, 1, 2), (1, 2), (0, 2), (1,), (0,)])
def test_sum_is_that_of_autograd(run: str, used: tuple[int, ...], seed: int) -> None:
    inputs = leaves()
    wanted = backward(plainly, False, used, *inputs)
    for got, expected in zip(backward(RUNS[run], True, used, *inputs), wanted, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_everything_inside_a_recompute(reentrant: bool, seed: int) -> None:
    inputs = leaves()
    wanted = backward(plainly, False, (0, 1, 2), *inputs)
    whole = [tensor.clone().requires_grad_() for tensor in inputs]
    output = checkpoint(
        lambda *tensors: model(plainly, True, (0, 1, 2), *tensors), *whole, use_reentrant=reentrant
    )
    output.square().sum().backward()
    for tensor, expected in zip(whole, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, expected)


def test_low_precision_is_summed_in_fp32_and_repeats(seed: int) -> None:
    inputs = leaves(torch.bfloat16)
    first, second = (backward(plainly, True, (0, 1, 2), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].dtype == torch.bfloat16


def test_backward_twice_starts_afresh(seed: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in leaves()]
    loss = model(plainly, True, (0, 1, 2), *inputs).sum()
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_frozen_key_and_value_take_nothing(seed: int) -> None:
    hidden, query, *_ = leaves()
    gradients = KeyValueGradients()
    key, value = gradients.attach(*hidden.split([8, 5], dim=3))
    indices = torch.zeros(2, 2, 21, 1, dtype=torch.int32)
    query.requires_grad_()
    output = block_sparse_attention(query, key, value, indices, accumulate=gradients, **BLOCK)
    output.sum().backward()
    assert query.grad is not None
    assert gradients.buffers(key, value)[2] is False


@pytest.mark.parametrize("wanted", [True, False])
def test_gradients_from_cudnn_are_added(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(1, 4, heads, 8) for heads in (2, 1, 1))
    monkeypatch.setattr(autograd, "_cudnn_takes", lambda *_: True)
    monkeypatch.setattr(autograd, "_cudnn_backward", lambda *_, causal: (query, key, value))
    total = KeyValueGradients()
    context = SimpleNamespace(
        saved_tensors=(query, key, value, None, query, torch.zeros(1, 2, 4)),
        schedule=KeySchedule(kernels.CAUSAL, keys=64),
        scale=1.0,
        accumulate=total,
        needs_input_grad=(True, wanted, wanted, *[False] * 5),
    )
    for _ in range(2):
        found = autograd._Attention.backward(context, query)
        assert found[0] is query
        assert found[1:] == (None,) * 7
    *sums, written = total.buffers(key, value)
    assert written == wanted
    if wanted:
        assert torch.equal(sums[0], 2 * key)
        assert torch.equal(sums[1], 2 * value)
    context.accumulate = None
    alone = (query, key, value) if wanted else (query, None, None)
    assert autograd._Attention.backward(context, query)[:3] == alone


def test_cudnn_gets_no_single_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses one query of one key, and what stands before a range may be one key."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)

    def takes(queries: int) -> bool:
        query, value = (SimpleNamespace(is_cuda=True, shape=(2, queries, 4, 64)) for _ in range(2))
        return autograd._cudnn_takes(query, value)  # type: ignore[arg-type]

    assert takes(2)
    assert not takes(1)


def _exact_backward(saved: Saved, keys: slice, scale: float, *, causal: bool) -> tuple[Tensor, ...]:
    """What cuDNN's computes, of [B, S, heads, width]."""
    heads = saved.query.shape[2] // saved.key.shape[2]
    key, value = (x[:, keys].repeat_interleave(heads, 2) for x in (saved.key, saved.value))
    logits = torch.einsum("bshd,bthd->bhst", saved.query, key) * scale
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits[0, 0]).triu(1).bool(), -torch.inf)
    p = (logits - saved.lse[..., None]).exp()
    delta = (saved.output * saved.grad).sum(3).transpose(1, 2)
    ds = p * (torch.einsum("bshd,bthd->bhst", saved.grad, value) - delta[..., None]) * scale
    d_query = torch.einsum("bhst,bthd->bshd", ds, key)
    d_key = torch.einsum("bhst,bshd->bthd", ds, saved.query)
    d_value = torch.einsum("bhst,bshd->bthd", p, saved.grad)
    return d_query, *(x.unflatten(2, (-1, heads)).sum(3) for x in (d_key, d_value))


@pytest.mark.parametrize("start", [0, 3, 5])
@pytest.mark.usefixtures("seed")
def test_a_range_is_a_square_behind_a_rectangle_to_cudnn(
    start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "_cudnn_backward", _exact_backward)
    query = torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, 9, 2, width, dtype=torch.float64, requires_grad=True) for width in (8, 4)
    )
    grad = torch.randn(2, 4, 6, 4, dtype=torch.float64)
    found = oracle_attention(query, key, value, num_selected=1, query_start=start, **BLOCK)
    wanted = torch.autograd.grad(found.output, (query, key, value), grad)
    with torch.no_grad():
        saved = Saved(query, key, value, found.output, found.lse, grad)
        alone = autograd._cudnn_gradients(saved, 8**-0.5, start, None, keys_too=True)
        torch.testing.assert_close(alone, wanted)
        total = KeyValueGradients()
        for _ in range(2):
            only = autograd._cudnn_gradients(saved, 8**-0.5, start, total, keys_too=True)
            assert only[1:] == (None, None)
        torch.testing.assert_close(total.buffers(key, value)[:2], [2 * x for x in wanted[1:]])


def test_gradients_that_nothing_collects_are_refused() -> None:
    tensor, indices = torch.zeros(1, 4, 1, 2), torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="that nothing collects"):
        block_sparse_attention(
            tensor, tensor, tensor, indices, accumulate=KeyValueGradients(), **BLOCK
        )
