"""Random problems for the kernel tests.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head
dim, K selected.
"""

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    block_size: int
    num_selected: int
    window: int
    query_chunk: int
    softmax_scale: float | None


@dataclass(frozen=True)
class Sizes:
    """What comparisons of the Triton kernels have in common."""

    heads: int
    groups: int
    head_dim: int
    value_dim: int
    block_size: int
    selected: int
    window: int


def random_case(rng: random.Random) -> Case:
    groups = rng.choice([1, 1, 2, 3])
    heads_per_group = rng.choice([1, 2, 3, 4, 8] if groups == 1 else [1, 2, 3, 4])
    length = rng.choice([1, 2, rng.randint(3, 10), rng.randint(11, 40)])
    head_dim = rng.choice([1, 4, 5, 8, 16])
    return Case(
        batch=rng.choice([1, 1, 2]),
        length=length,
        heads=groups * heads_per_group,
        groups=groups,
        head_dim=head_dim,
        value_dim=rng.choice([head_dim, 3, 8]),
        block_size=rng.choice([1, 2, 3, 4, 5, 8, 64]),
        num_selected=rng.randint(1, 6),
        window=rng.choice([1, 2, rng.randint(1, length), length + 3]),
        query_chunk=rng.choice([1, 3, 7, 16, 256]),
        softmax_scale=rng.choice([None, 0.3]),
    )


def random_qkv(
    case: Case, dtype: torch.dtype = torch.float64, sharpness: float = 1.5
) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(case.batch, case.length, case.heads, case.head_dim, dtype=torch.float64)
    key = torch.randn(case.batch, case.length, case.groups, case.head_dim, dtype=torch.float64)
    value = torch.randn(case.batch, case.length, case.groups, case.value_dim, dtype=torch.float64)
    query = query * sharpness
    return tuple(x.to(dtype).requires_grad_() for x in (query, key, value))  # type: ignore[return-value]


def random_indices(case: Case, rng: random.Random) -> Tensor:
    """int32 [B, HKV, S, K] in any order: duplicates, gaps and blocks of the future included."""
    num_blocks = -(-case.length // case.block_size)
    ids = [
        rng.randrange(-1, num_blocks)
        for _ in range(case.batch * case.groups * case.length * case.num_selected)
    ]
    shape = (case.batch, case.groups, case.length, case.num_selected)
    return torch.tensor(ids, dtype=torch.int32).view(shape)


def random_documents(batch: int, length: int, rng: random.Random) -> list[int]:
    """Lengths of documents that fill every batch row, some of one token and some empty."""
    lengths = []
    for _ in range(batch):
        left = length
        while left:
            tokens = min(left, rng.choice([0, 1, rng.randint(1, 6), rng.randint(1, length)]))
            lengths.append(tokens)
            left -= tokens
    return lengths + [0] * rng.choice([0, 2])


def offsets(lengths: list[int]) -> Tensor:
    """cu_seqlens of the documents."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


ALL = slice(None)


def causal_keys(starts: Tensor, queries: slice = ALL) -> Tensor:
    """bool [B, 1, T, S]: which keys `queries` see, of int64 `starts` [B, S] of their documents."""
    token = torch.arange(starts.shape[1], device=starts.device)
    same = starts[:, queries, None] == starts[:, None, :]
    return (same & (token[None, :] <= token[queries, None]))[:, None]


def window_keys(starts: Tensor, window: int, queries: slice = ALL) -> Tensor:
    """The same of a sliding window."""
    token = torch.arange(starts.shape[1], device=starts.device)
    return causal_keys(starts, queries) & (token[None, :] > token[queries, None] - window)


def blocks_of(starts: Tensor, block_size: int) -> Tensor:
    """int64 [B, S]: the block of every token, counted in its document."""
    return (torch.arange(starts.shape[1], device=starts.device) - starts) // block_size


def selected_keys(
    starts: Tensor, block_indices: Tensor, block_size: int, queries: slice = ALL
) -> Tensor:
    """The same [B, HKV, T, S] of the blocks in int32 [B, HKV, T, K]."""
    block = blocks_of(starts, block_size)[:, None, None, None]
    return causal_keys(starts, queries) & (block_indices[..., None] == block).any(3)


def gradients(output: Tensor, inputs: tuple[Tensor, ...], weight: Tensor) -> tuple[Tensor, ...]:
    """d(sum of output * weight) / d inputs; zero where an input is not reached."""
    found = torch.autograd.grad(
        (output.double() * weight).sum(), inputs, allow_unused=True, materialize_grads=True
    )
    return tuple(found)
