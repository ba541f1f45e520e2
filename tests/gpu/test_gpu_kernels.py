"""What only a GPU can show of the kernels: bitwise repeats, 64-bit offsets, no host in the way."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hysparse_kernels import (
    KeyValueGradients,
    block_sparse_attention,
    gated_sum,
    oracle_attention,
    prepare_selection,
    sliding_window_attention,
)
from torch import Tensor

from tests.gpu.drawn import BLOCK, draw, error
from tests.kernels.drawn_cases import Inputs

pytestmark = pytest.mark.usefixtures("seed")
SELECTED, WINDOW = 16, 128


def leaves(sequence: int, *shape: int) -> Inputs:
    """Of one batch row, all but the gradient of the output as leaves."""
    inputs = draw(1, sequence, shape)
    for tensor in inputs[:4]:
        tensor.requires_grad_()
    return inputs


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def selection(inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found = oracle_attention(*inputs[:3], block_size=BLOCK, num_selected=SELECTED)
    return found.block_indices


def sparse(inputs: Inputs, indices: Tensor) -> Tensor:
    heads = inputs.query.shape[2]
    lists = prepare_selection(indices, heads, block_size=BLOCK, backend="triton")
    return block_sparse_attention(
        *inputs[:3], indices, block_size=BLOCK, sink=inputs.sink, lists=lists
    )


@pytest.mark.parametrize("dims", [(64, 4, 128, 128), (8, 8, 64, 64), (64, 4, 192, 128)])
def test_ten_runs_are_equal_to_the_bit(deterministic: None, dims: tuple[int, ...]) -> None:
    inputs = leaves(4113, *dims)
    indices = selection(inputs)
    indices[..., 0] = 0  # one block that every token reads
    operations: dict[str, Callable[[], Tensor]] = {
        "oracle": lambda: (
            oracle_attention(*inputs[:3], block_size=BLOCK, num_selected=SELECTED).output
        ),
        "block-sparse": lambda: sparse(inputs, indices),
        "window": lambda: sliding_window_attention(*inputs[:3], window=WINDOW, sink=inputs.sink),
    }
    for name, operation in operations.items():
        first: list[Tensor] = []
        for _ in range(10):
            output = operation()
            wanted = inputs[:3] if name == "oracle" else inputs[:4]
            results = [output, *torch.autograd.grad(output, wanted, inputs.grad)]
            first = first or results
            for before, after in zip(first, results, strict=True):
                assert torch.equal(before, after), name
    picked = [selection(inputs) for _ in range(10)]
    assert all(torch.equal(picked[0], other) for other in picked)


def test_nothing_waits_for_the_device() -> None:
    inputs = leaves(2048, 16, 1, 128, 128)
    gates = torch.randn(2, 1, 2048, 16, 1, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 500, 2048], dtype=torch.int32, device="cuda")

    def layers(packing: Tensor | None) -> None:
        own = [tensor.detach().requires_grad_() for tensor in inputs[:4]]
        query, key, value, sink = own
        gradients = KeyValueGradients()
        shared = gradients.attach(key, value)
        oracle = oracle_attention(
            query, key, value, block_size=BLOCK, num_selected=SELECTED, cu_seqlens=packing
        )
        lists = prepare_selection(
            oracle.block_indices, 16, block_size=BLOCK, cu_seqlens=packing, backend="triton"
        )
        one = block_sparse_attention(
            query, *shared, oracle.block_indices, block_size=BLOCK, sink=sink, lists=lists,
            cu_seqlens=packing, accumulate=gradients,
        )  # fmt: skip
        two = sliding_window_attention(
            query, key, value, window=WINDOW, sink=sink, cu_seqlens=packing
        )
        out = gated_sum(one, two, *gates)
        (out + oracle.output).backward(inputs.grad)

    for packing in (None, cu_seqlens):
        layers(packing)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layers(packing)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Rows(NamedTuple):
    """fp64 attention of a few query tokens, computed one KV group at a time."""

    output: Tensor
    """[T, HQ, DV]"""
    d_query: Tensor
    """[T, HQ, D]"""
    d_key: Tensor
    """[S, HKV, D], as if no other token had a gradient."""
    d_value: Tensor
    block_maxima: Tensor
    """[T, HKV, N] of log-probabilities."""


def exact_rows(inputs: Inputs, tokens: Tensor, seen: Tensor, with_sink: bool) -> Rows:
    """`seen` bool [T, HKV, S] says which keys each token reads."""
    groups, scale = inputs.key.shape[2], inputs.query.shape[3] ** -0.5
    parts = []
    for group in range(groups):
        heads = inputs.query.shape[2] // groups
        of_group = slice(group * heads, (group + 1) * heads)
        query = inputs.query[0, tokens, of_group].detach().double()
        grad = inputs.grad[0, tokens, of_group].double()
        key, value = (tensor[0, :, group].detach().double() for tensor in inputs[1:3])
        logits = torch.einsum("thd,sd->ths", query, key) * scale
        logits = logits.masked_fill(~seen[:, group, None], -torch.inf)
        log_total = logits.logsumexp(-1)
        if with_sink:
            log_total = torch.logaddexp(log_total, inputs.sink[of_group].detach().double())
        logits = logits - log_total[..., None]
        weights = logits.exp()
        output = weights @ value
        d_weights = torch.einsum("thd,sd->ths", grad, value) - (grad * output).sum(-1)[..., None]
        d_logits = weights * d_weights * scale
        padded = torch.nn.functional.pad(logits.amax(1), (0, -len(key) % BLOCK), value=-torch.inf)
        parts.append(
            Rows(
                output,
                d_logits @ key,
                torch.einsum("ths,thd->sd", d_logits, query),
                torch.einsum("ths,thd->sd", weights, grad),
                padded.unflatten(1, (-1, BLOCK)).amax(2),
            )
        )
    output, d_query = (torch.cat(x, 1) for x in zip(*(part[:2] for part in parts), strict=True))
    rest = (torch.stack(x, 1) for x in zip(*(part[2:] for part in parts), strict=True))
    return Rows(output, d_query, *rest)


@pytest.mark.alone
@pytest.mark.parametrize("hopper", ["1", "0"])
def test_offsets_beyond_2_to_the_31(
    deterministic: None, hopper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYSPARSE_HOPPER", hopper)
    torch.cuda.empty_cache()  # what the case before has left with PyTorch
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    sequence = 262107
    inputs = leaves(sequence, 64, 4, 192, 128)
    assert inputs.query.numel() > 1.4 * 2**31
    tokens = torch.tensor([5, sequence // 2, sequence - 70, sequence - 1], device="cuda")
    # Only these tokens have a gradient, so that they alone decide all of dK and dV.
    rows = inputs.grad[:, tokens].clone()
    inputs.grad.zero_()
    inputs.grad[:, tokens] = rows

    key = torch.arange(sequence, device="cuda")
    causal = (key <= tokens[:, None])[:, None].expand(-1, 4, -1)
    oracle = oracle_attention(*inputs[:3], block_size=BLOCK, num_selected=SELECTED)
    indices = oracle.block_indices
    exact = exact_rows(inputs, tokens, causal, with_sink=False)
    wanted = exact.block_maxima.topk(SELECTED, -1).indices.sort(-1).values
    picked = indices[0][:, tokens].transpose(0, 1)
    for got, best in zip(picked[1:].flatten(0, 1), wanted[1:].flatten(0, 1), strict=True):
        assert torch.equal(got.long(), best)
    compare(inputs, tokens, oracle.output, exact, "oracle")
    del oracle

    blocks = -(-sequence // BLOCK)
    chosen = torch.zeros(4, 4, blocks + 1, dtype=torch.bool, device="cuda")
    chosen.scatter_(2, torch.where(picked < 0, blocks, picked).long(), True)
    seen = causal & chosen.repeat_interleave(BLOCK, 2)[..., :sequence]
    exact = exact_rows(inputs, tokens, seen, with_sink=True)
    compare(inputs, tokens, sparse(inputs, indices), exact, "block-sparse")

    seen = causal & (key > tokens[:, None] - WINDOW)[:, None]
    exact = exact_rows(inputs, tokens, seen, with_sink=True)
    output = sliding_window_attention(*inputs[:3], window=WINDOW, sink=inputs.sink)
    compare(inputs, tokens, output, exact, "window")


def compare(inputs: Inputs, tokens: Tensor, output: Tensor, exact: Rows, name: str) -> None:
    assert error(output[0, tokens].detach(), exact.output) < 5e-3, name
    d_query, d_key, d_value = torch.autograd.grad(output, inputs[:3], inputs.grad)
    assert error(d_query[0, tokens], exact.d_query) < 5e-3, name
    assert int((d_query[0].abs().amax((1, 2)) > 0).sum()) <= len(tokens), name
    assert error(d_key[0], exact.d_key) < 5e-3, name
    assert error(d_value[0], exact.d_value) < 5e-3, name
