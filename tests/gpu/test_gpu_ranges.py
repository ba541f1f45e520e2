"""Ranges of queries on a GPU: the fast kernels against the fp64 reference and the square call."""

import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from hysparse_kernels import (
    KeyValueGradients,
    block_sparse_attention,
    oracle_attention,
    prepare_selection,
    sliding_window_attention,
)
from hysparse_kernels.hopper import launch as hopper
from torch import Tensor

from tests.gpu.drawn import BLOCK, draw, error
from tests.kernels.drawn_cases import Inputs

pytestmark = pytest.mark.usefixtures("seed")
SELECTED = 4
SHAPES = ((32, 2, 128, 128), (8, 2, 64, 64), (16, 1, 192, 128), (4, 4, 128, 64), (64, 1, 128, 128))
WITH_SINKS = ("block-sparse", "window")
NAMES = ("oracle", "causal", *WITH_SINKS)


class Results(NamedTuple):
    output: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor
    d_sink: Tensor | None
    indices: Tensor | None


def attend(
    name: str,
    inputs: Inputs,
    ranges: list[tuple[int, int]],
    indices: Tensor,
    window: int,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Results:
    """One operation over ranges of the queries; their gradients of key and value are summed."""
    accumulate = KeyValueGradients()
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:4]]
    query, key, value, sink = leaves
    shared = accumulate.attach(key, value)
    outputs, selected, sink_used = [], [], name in WITH_SINKS
    for start, stop in ranges:
        own: dict[str, Any] = {
            "query_start": start, "cu_seqlens": cu_seqlens, "backend": backend,
        }  # fmt: skip
        part = query[:, start:stop]
        if name == "window":
            outputs.append(sliding_window_attention(part, *shared, window=window, sink=sink, **own))
            continue
        own |= {"block_size": BLOCK, "accumulate": accumulate}
        if name in ("oracle", "causal"):
            own["select"] = name == "oracle"
            found = oracle_attention(part, *shared, num_selected=SELECTED, **own)
            outputs.append(found.output)
            if found.block_indices is not None:
                selected.append(found.block_indices)
            continue
        chosen = indices[:, :, start:stop].contiguous()
        lists = prepare_selection(
            chosen, query.shape[2], block_size=BLOCK, cu_seqlens=cu_seqlens, query_start=start,
            key_length=key.shape[1], backend=backend,
        )  # fmt: skip
        outputs.append(block_sparse_attention(part, *shared, chosen, sink=sink, lists=lists, **own))
    covered = torch.cat([torch.arange(*piece) for piece in ranges])
    grads = [inputs.grad[:, start:stop] for start, stop in ranges]
    torch.autograd.backward(outputs, grads)
    output = torch.zeros_like(inputs.grad)
    output[:, covered] = torch.cat(outputs, 1).detach()
    return Results(
        output,
        *(leaf.grad for leaf in leaves[:3]),
        sink.grad if sink_used else None,
        torch.cat(selected, 2) if selected else None,
    )


def documents(batch: int, length: int, rng: random.Random) -> Tensor:
    """Offsets of a few documents of every row, an empty one among them."""
    offsets = {row * length for row in range(batch + 1)}
    offsets |= {rng.randrange(batch * length) for _ in range(3 * batch)}
    ordered = sorted([*offsets, min(offsets)])
    return torch.tensor(ordered, dtype=torch.int32, device="cuda")


def random_blocks(batch: int, groups: int, length: int, cu_seqlens: Tensor | None) -> Tensor:
    """Blocks that begin at or before each query, of its own document."""
    position = torch.arange(batch * length, device="cuda")
    bounds = torch.arange(0, batch * length + 1, length, device="cuda")
    starts = bounds if cu_seqlens is None else cu_seqlens.long()
    start = starts[torch.searchsorted(starts, position, right=True) - 1]
    last = ((position - start) // BLOCK).view(batch, 1, length, 1)
    drawn = torch.rand(batch, groups, length, SELECTED, device="cuda") * (last + 1)
    return torch.minimum(drawn.long(), last).int()


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("trial", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_ranges_equal_the_reference(
    name: str, trial: int, with_documents: bool, rng: random.Random
) -> None:
    shape = SHAPES[trial % len(SHAPES)]
    batch, length, window = rng.choice([1, 2]), rng.randint(200, 900), rng.randint(1, 200)
    inputs = draw(batch, length, shape)
    cu_seqlens = documents(batch, length, rng) if with_documents else None
    indices = random_blocks(batch, shape[1], length, cu_seqlens)
    places = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randint(1, 3)))})
    if trial == 1:  # each range begins with one of a single query, which cuDNN does not take
        places = sorted({*places, *(place + 1 for place in places[:-1])})
    ranges = list(itertools.pairwise(places))
    left_out = rng.choice([0, 1]) if len(ranges) > 2 else 0
    ranges = rng.sample(ranges, len(ranges) - left_out)
    print(shape, batch, length, window, ranges, None if cu_seqlens is None else cu_seqlens.tolist())
    common = (indices, window, cu_seqlens)
    got = attend(name, inputs, ranges, *common, "triton")
    wanted = attend(name, inputs.double(), ranges, *common, "reference")
    for field in Results._fields[:5]:
        ours, exact = getattr(got, field), getattr(wanted, field)
        if exact is not None:
            assert error(ours, exact) < 1e-2, field
    if name == "oracle":
        assert got.indices is not None
        square = attend(name, inputs, [(0, length)], *common, "triton").indices
        assert square is not None
        assert torch.equal(got.indices, torch.cat([square[:, :, a:b] for a, b in ranges], 2))


def test_the_fast_kernels_take_ranges() -> None:
    """A reason to fall back would leave the tests above on the portable kernels unseen."""
    if not hopper.is_hopper(torch.device("cuda", 0)):
        pytest.skip("needs a Hopper GPU")
    from hysparse_kernels.query_range import QueryRange
    from hysparse_kernels.triton import kernels
    from hysparse_kernels.triton.launch import KeySchedule

    inputs = draw(1, 512, SHAPES[0])
    schedule = KeySchedule(kernels.CAUSAL, keys=64, queries=QueryRange(128, 256, 512))
    query = inputs.query[:, :256]
    assert hopper.why_not(query, inputs.key, inputs.value, schedule) is None


@pytest.mark.alone
@pytest.mark.parametrize("length", [524288, 1048576])
def test_a_million_tokens_of_one_group(length: int) -> None:
    """Selection among 8,192 and 16,384 blocks; outputs of a few rows against fp64."""
    inputs = draw(1, length, (4, 1, 128, 128))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # The last range is enough: it has the most blocks.
    start = length - 4096
    query = inputs.query[:, start:].detach().requires_grad_()
    accumulate = KeyValueGradients()
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[1:3]]
    shared = accumulate.attach(*leaves)
    oracle = oracle_attention(
        query, *shared, block_size=BLOCK, num_selected=16, query_start=start, accumulate=accumulate
    )
    sparse = block_sparse_attention(
        query, *shared, oracle.block_indices, block_size=BLOCK, query_start=start,
        accumulate=accumulate,
    )  # fmt: skip
    torch.autograd.backward([oracle.output, sparse], [inputs.grad[:, start:]] * 2)
    print(length, (torch.cuda.max_memory_allocated() - before) / 2**30, "GiB")
    rows = torch.tensor([0, 2000, 4095], device="cuda")
    key, value = (tensor[0, :, 0].detach().double() for tensor in leaves)
    logits = query.detach()[0, rows].double() @ key.T * 128**-0.5
    position = torch.arange(length, device="cuda")
    hidden = position[None] > (start + rows)[:, None]
    logits = logits.masked_fill(hidden[:, None], -torch.inf)
    weights = logits.softmax(-1)
    assert error(oracle.output[0, rows].detach(), weights @ value) < 1e-2
    scores = logits.log_softmax(-1).unflatten(2, (-1, BLOCK)).amax((1, 3))
    kth = scores.topk(16, 1).values[:, -1:]
    chosen = oracle.block_indices[0, 0, rows].long()
    assert (scores.gather(1, chosen) >= kth - 1e-4).all()
    assert (chosen.diff(dim=1) > 0).all()
    member = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    seen = member.repeat_interleave(BLOCK, 1)
    picked = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    assert error(sparse[0, rows].detach(), picked @ value) < 1e-2
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
