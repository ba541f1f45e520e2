"""Random problems for attention kernels."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hysparse_kernels.documents import document_starts_in_rows
from hysparse_kernels.query_range import QueryRange
from torch import Tensor

from tests.kernels.cases import Sizes, offsets, random_documents


@dataclass(frozen=True)
class Case(Sizes):
    """Sizes of one comparison; see `reference` for the letters."""

    batch: int
    sequence: int
    documents: tuple[int, ...] | None = None
    first: int = 0
    count: int | None = None
    """Queries from `first` on, None for all up to the last key."""

    @property
    def queries(self) -> slice:
        return slice(self.first, self.first + (self.count or self.sequence - self.first))

    @property
    def range(self) -> QueryRange | None:
        return QueryRange.of(self.first, self.queries.stop - self.first, self.sequence)

    def cu_seqlens(self, device: str) -> Tensor | None:
        return None if self.documents is None else offsets(list(self.documents)).to(device)

    def starts(self, device: str) -> Tensor:
        """int64 [B, S]: the first token of every token's document."""
        cu_seqlens = self.cu_seqlens(device)
        if cu_seqlens is None:
            return torch.zeros(self.batch, self.sequence, dtype=torch.int64, device=device)
        return document_starts_in_rows(cu_seqlens, self.batch, self.sequence)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    sink: Tensor
    grad: Tensor

    def double(self) -> Inputs:
        """The same numbers in fp64, without gradients."""
        return Inputs(*(tensor.detach().double() for tensor in self))

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Query, key, value and sink, each with a gradient of its own."""
        return [tensor.detach().clone().to(dtype).requires_grad_() for tensor in self[:4]]


def draw(generator: random.Random, interpreted: bool, packed: bool) -> Case:
    """A random case: odd lengths, any heads per group, MQA, value dim unlike head dim, half of them
    of a range of queries."""
    groups = generator.choice([1, 2] if interpreted else [1, 2, 3])
    heads = groups * generator.choice([1, 2, 3, 4, 8, 16])
    dims = [16, 24, 32] if interpreted else [64, 96, 128, 192, 256]
    head_dim, value_dim = generator.choice(dims), generator.choice(dims)
    large = [32, 64] if max(head_dim, value_dim) > 128 else [32, 64, 128]
    block_size = generator.choice([16, 32] if interpreted else large)
    sequence = generator.randint(1, 40) if interpreted else generator.randint(1, 1500)
    batch = generator.choice([1, 2])
    documents = None
    # Kernels get an empty tile for every document there could be: slow to interpret.
    while packed and (documents is None or len(documents) > (8 if interpreted else 200)):
        documents = tuple(random_documents(batch, sequence, generator))
    return Case(
        heads,
        groups,
        head_dim,
        value_dim,
        block_size,
        generator.choice([1, 2, 3, 5] if interpreted else [1, 2, 5, 16, 64]),
        generator.randint(1, sequence + 5),
        batch,
        sequence,
        documents,
        *random_range(sequence, generator),
    )


def random_range(sequence: int, generator: random.Random) -> tuple[int, int]:
    """The first query and how many there are: all or some."""
    if generator.random() < 0.5:
        return 0, sequence
    first = generator.randrange(sequence)
    return first, generator.randint(1, sequence - first)


@contextlib.contextmanager
def poisoned_memory(number: float = torch.nan) -> Iterator[None]:
    """New tensors hold `number` or huge integers: what is read but was never written shows.

    A maximum passes over NaN: there a large number shows.
    """

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                return tensor.fill_(min(number, torch.finfo(tensor.dtype).max))
            return tensor.fill_(torch.iinfo(tensor.dtype).max // 2)

        return made

    places = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), make in zip(places, before, strict=True):
        setattr(owner, name, poison(make))
    try:
        yield
    finally:
        for (owner, name), make in zip(places, before, strict=True):
            setattr(owner, name, make)
