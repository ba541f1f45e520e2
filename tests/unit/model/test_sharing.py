"""Packing what an oracle shares into one tensor, and back, without losing a bit."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hysparse_megatron.architecture.stages import MAX_PAYLOAD_BLOCKS
from hysparse_megatron.model.sharing import SharedAttention, SharedWidths, index_bits, pack, unpack

DTYPES = [torch.float32, torch.bfloat16]
# tokens_per_row, batch, KV groups, key dim, value dim, K, channels
SHAPES = [
    (1, 2, 2, 8, 8, 3, 16),
    (2, 1, 1, 6, 10, 1, 8),
    (4, 3, 2, 4, 2, 5, 12),
    (1, 1, 1, 1, 1, 1, 1),
]
SEQUENCE = 12


class Case(NamedTuple):
    hidden: Tensor
    shared: SharedAttention
    widths: SharedWidths


def make_case(dtype: torch.dtype, shape: tuple[int, ...], largest_index: int | None = None) -> Case:
    per_row, batch, groups, key_dim, value_dim, selected, channels = shape
    largest = MAX_PAYLOAD_BLOCKS[dtype.itemsize] - 1 if largest_index is None else largest_index

    def values(*size: int) -> Tensor:
        """From the smallest to the largest magnitudes of the format."""
        return (torch.randn(*size) * 10.0 ** torch.randint(-37, 38, size)).to(dtype)

    indices = torch.randint(-1, largest + 1, (batch, groups, SEQUENCE, selected))
    flat = indices.view(-1)
    flat[0], flat[-1] = -1, largest
    shared = SharedAttention(
        key=values(SEQUENCE, batch, groups, key_dim),
        value=values(SEQUENCE, batch, groups, value_dim),
        block_indices=indices.to(torch.int32),
    )
    hidden = values(SEQUENCE // per_row, batch, channels)
    return Case(hidden, shared, SharedWidths(groups, key_dim, value_dim, selected, per_row))


@pytest.fixture(params=itertools.product(DTYPES, SHAPES), ids=str)
def case(request: pytest.FixtureRequest, seed: int) -> Case:
    return make_case(*request.param)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def test_round_trip_is_exact_in_every_bit(case: Case) -> None:
    hidden, shared, widths = case
    dtype = hidden.dtype
    assert shared.block_indices is not None
    payload = pack(hidden, shared)
    rows, batch, channels = hidden.shape
    assert payload.dtype == dtype
    assert payload.shape == (rows, batch, channels + sum(widths.columns(dtype)))
    back_hidden, back = unpack(payload, widths)
    assert torch.equal(bits(back_hidden), bits(hidden))
    assert torch.equal(bits(back.key), bits(shared.key))
    assert torch.equal(bits(back.value), bits(shared.value))
    assert back.block_indices is not None
    assert back.block_indices.dtype == torch.int32
    assert torch.equal(back.block_indices, shared.block_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_and_bad_numbers_pass_unchanged(dtype: torch.dtype) -> None:
    case = make_case(dtype, SHAPES[0])
    case.hidden[0, 0, :4] = torch.tensor([-0.0, float("inf"), float("-inf"), float("nan")])
    back, _ = unpack(pack(case.hidden, case.shared), case.widths)
    assert torch.equal(bits(back), bits(case.hidden))


def test_columns_are_the_sizes_of_the_tensors(case: Case) -> None:
    hidden, shared, widths = case
    dtype = hidden.dtype
    assert shared.block_indices is not None
    tokens = hidden.shape[0] * hidden.shape[1]
    index_bytes = 2 if dtype.itemsize == 2 else 4
    assert index_bits(dtype).itemsize == index_bytes
    key, value, indices = widths.columns(dtype)
    assert key * tokens == shared.key.numel()
    assert value * tokens == shared.value.numel()
    assert indices * tokens * dtype.itemsize == shared.block_indices.numel() * index_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_index_up_to_the_limit_looks_like_a_bad_number(dtype: torch.dtype) -> None:
    limit = MAX_PAYLOAD_BLOCKS[dtype.itemsize]
    if dtype.itemsize == 2:
        indices = torch.arange(-1, limit)
    else:
        ends = torch.arange(1000)
        middle = torch.randint(0, limit, (100_000,))
        indices = torch.cat([ends - 1, middle, limit - 1 - ends])
    groups, selected = 1, 1
    shared = SharedAttention(
        key=torch.zeros(len(indices), 1, groups, 1, dtype=dtype),
        value=torch.zeros(len(indices), 1, groups, 1, dtype=dtype),
        block_indices=indices.to(torch.int32).view(1, groups, -1, selected),
    )
    payload = pack(torch.zeros(len(indices), 1, 1, dtype=dtype), shared)
    assert torch.isfinite(payload).all()
    _, back = unpack(payload, SharedWidths(groups, 1, 1, selected, 1))
    assert torch.equal(back.block_indices, shared.block_indices)
    # The limit is not needlessly low: one block more would be an Inf or a NaN.
    beyond = torch.tensor([limit + 1]).to(index_bits(dtype)).view(dtype)
    assert not torch.isfinite(beyond).all()


def test_gradient_splits_into_its_parts(case: Case) -> None:
    """Packing only moves numbers, so every gradient is a slice of the payload's, bit for bit."""
    hidden, shared, widths = case
    dtype = hidden.dtype
    hidden.requires_grad_()
    shared.key.requires_grad_()
    shared.value.requires_grad_()
    payload = pack(hidden, shared)
    incoming = torch.randn(payload.shape).to(dtype)
    payload.backward(incoming)
    rows, batch, channels = hidden.shape
    key, value, _ = widths.columns(dtype)
    for tensor, first, last in (
        (hidden, 0, channels),
        (shared.key, channels, channels + key),
        (shared.value, channels + key, channels + key + value),
    ):
        wanted = torch.empty(tensor.shape, dtype=dtype).view(rows, batch, -1)
        wanted.copy_(incoming[..., first:last])
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, wanted.view(tensor.shape))


def test_gradient_gathers_from_what_was_unpacked(case: Case) -> None:
    hidden, shared, widths = case
    dtype = hidden.dtype
    payload = pack(hidden, shared).detach().requires_grad_()
    back_hidden, back = unpack(payload, widths)
    assert back.block_indices is not None
    assert not back.block_indices.requires_grad
    of_hidden = torch.randn(back_hidden.shape).to(dtype)
    of_key = torch.randn(back.key.shape).to(dtype)
    of_value = torch.randn(back.value.shape).to(dtype)
    torch.autograd.backward([back_hidden, back.key, back.value], [of_hidden, of_key, of_value])
    rows, batch, channels = hidden.shape
    key, value, index = widths.columns(dtype)
    assert payload.grad is not None
    pieces = payload.grad.split((channels, key, value, index), dim=-1)
    assert torch.equal(pieces[0], of_hidden)
    assert torch.equal(pieces[1], of_key.reshape(rows, batch, -1))
    assert torch.equal(pieces[2], of_value.reshape(rows, batch, -1))
    assert pieces[3].abs().max() == 0, "indices carry no gradient"


def test_gradient_against_finite_differences() -> None:
    """Only `pack` knows a format as wide as fp64, which numerical differences need."""
    generator = torch.Generator().manual_seed(0)

    def values(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)

    hidden, key, value = values(2, 2, 3), values(4, 2, 1, 2), values(4, 2, 1, 3)
    indices = torch.zeros(2, 1, 4, 2, dtype=torch.int32)

    def packed(hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return pack(hidden, SharedAttention(key, value, indices))[..., : 3 + 4 + 6]

    assert torch.autograd.gradcheck(packed, (hidden, key, value))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_payload_owns_its_memory(shape: tuple[int, ...], seed: int) -> None:
    """The schedules free what they have sent, by the tensor's storage."""
    hidden, shared, _ = make_case(torch.float32, shape)
    payload = pack(hidden, shared)
    assert payload._base is None
    assert payload.is_contiguous()
    before = payload.clone()
    for tensor in (hidden, *shared.tensors):
        assert tensor is not None
        assert tensor.untyped_storage().data_ptr() != payload.untyped_storage().data_ptr()
        tensor.zero_()
    assert torch.equal(bits(payload), bits(before))
