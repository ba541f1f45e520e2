"""Ranges of queries give what all queries give, piece by piece; their gradients add up."""

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from hysparse_kernels import (
    KeyValueGradients,
    block_sparse_attention,
    oracle_attention,
    prepare_selection,
    sliding_window_attention,
)
from hysparse_kernels.query_range import QueryRange
from torch import Tensor

from tests.kernels.cases import (
    Case,
    gradients,
    offsets,
    random_case,
    random_documents,
    random_indices,
    random_qkv,
)

Inputs = tuple[Tensor, ...]
"""Query, key, value and sink."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all operations are run with, beside their inputs."""

    case: Case
    indices: Tensor
    cu_seqlens: Tensor | None
    forced: tuple[int, int]

    @classmethod
    def random(cls, rng: random.Random) -> "Problem":
        case = random_case(rng)
        lengths = random_documents(case.batch, case.length, rng) if rng.random() < 0.5 else None
        first = rng.randint(0, min(1, case.num_selected))
        forced = (first, rng.randint(0, min(2, case.num_selected - first)))
        print(case, lengths, forced)
        cu_seqlens = None if lengths is None else offsets(lengths)
        return cls(case, random_indices(case, rng), cu_seqlens, forced)

    def attend(
        self, inputs: Inputs, start: int, stop: int, accumulate: KeyValueGradients | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The operations of the queries start .. stop, side by side [B, Sq, HQ, 3 * DV]; lse and
        block indices of the oracle."""
        query, key, value, sink = inputs
        common: dict[str, Any] = {
            "softmax_scale": self.case.softmax_scale,
            "cu_seqlens": self.cu_seqlens,
            "query_start": start,
            "query_chunk": self.case.query_chunk,
        }
        block = {**common, "block_size": self.case.block_size, "accumulate": accumulate}
        query = query[:, start:stop]
        oracle = oracle_attention(
            query,
            key,
            value,
            num_selected=self.case.num_selected,
            forced_first_blocks=self.forced[0],
            forced_recent_blocks=self.forced[1],
            **block,
        )
        # Blocks that begin after all keys are none of theirs.
        indices = self.indices[:, :, start:stop]
        indices = indices.where(indices * self.case.block_size < key.shape[1], -1)
        sparse = block_sparse_attention(query, key, value, indices, sink=sink, **block)
        window = sliding_window_attention(
            query, key, value, window=self.case.window, sink=sink, **common
        )
        return torch.cat([oracle.output, sparse, window], 3), oracle.lse, oracle.block_indices


def cut(length: int, rng: random.Random) -> list[tuple[int, int]]:
    """All of a row in up to four ranges, in any order."""
    inner = rng.sample(range(1, length), min(length - 1, rng.randint(0, 3)))
    places = [0, *sorted(inner), length]
    return rng.sample(list(itertools.pairwise(places)), len(places) - 1)


@pytest.mark.parametrize("trial", range(8))
def test_ranges_are_slices_of_all_queries(trial: int, rng: random.Random) -> None:
    problem = Problem.random(rng)
    case = problem.case
    sink = torch.randn(case.heads, dtype=torch.float64, requires_grad=True)
    inputs = (*random_qkv(case), sink)
    output, lse, indices = problem.attend(inputs, 0, case.length)
    weight = torch.randn_like(output)
    wanted = gradients(output, inputs, weight)
    found = [torch.zeros_like(tensor) for tensor in inputs]
    for start, stop in cut(case.length, rng):
        print(start, stop)
        # Without documents fewer keys will do, all up to the last query.
        keys = case.length if problem.cu_seqlens is not None else rng.randint(stop, case.length)
        part = (inputs[0], inputs[1][:, :keys], inputs[2][:, :keys], sink)
        its_output, its_lse, its_indices = problem.attend(part, start, stop)
        torch.testing.assert_close(its_output, output[:, start:stop])
        torch.testing.assert_close(its_lse, lse[:, :, start:stop])
        assert torch.equal(its_indices, indices[:, :, start:stop])
        its_gradients = gradients(its_output, inputs, weight[:, start:stop])
        for total, part_of_it in zip(found, its_gradients, strict=True):
            total += part_of_it
        unread = (
            its_gradients[1][:, stop:],
            its_gradients[2][:, stop:],
            its_gradients[0][:, stop:],
        )
        assert all(not tensor.any() for tensor in unread)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("trial", range(3))
def test_ranges_accumulate_into_one_sum(trial: int, rng: random.Random) -> None:
    problem = Problem.random(rng)
    case = problem.case
    sink = torch.randn(case.heads, dtype=torch.float64, requires_grad=True)
    inputs = (*random_qkv(case), sink)
    output = problem.attend(inputs, 0, case.length)[0]
    weight = torch.randn_like(output)
    wanted = gradients(output, inputs, weight)
    total = KeyValueGradients()
    query, key, value, _ = inputs
    attached = (query, *total.attach(key, value), sink)
    ranges = sorted(cut(case.length, rng))
    parts = [problem.attend(attached, *place, accumulate=total)[0] for place in ranges]
    for got, expected in zip(gradients(torch.cat(parts, 1), inputs, weight), wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_places() -> None:
    assert QueryRange.of(0, 5, 5) is None
    place = QueryRange(start=3, queries=2, keys=7)
    assert place.positions(4, torch.device("cpu")).tolist() == [3, 4, 10, 11]
    wanted = [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4]
    assert place.queries_from(torch.arange(15)).tolist() == wanted


def test_ranges_that_do_not_fit_are_refused() -> None:
    query, key = torch.zeros(1, 4, 2, 8), torch.zeros(1, 9, 1, 8)
    arguments: dict[str, Any] = {"block_size": 2, "num_selected": 1}
    for start, message in (
        (6, r"got 9 keys a row, expected at least 10: the 4 queries stand at positions 6 to 9"),
        (-1, "query_start: got -1, expected an integer of at least 0"),
        (1.0, "query_start: got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            oracle_attention(query, key, key, query_start=start, **arguments)
    indices = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected \[1, 1, 4, selected\]"):
        block_sparse_attention(query, key, key, indices[:, :, :3], block_size=2, query_start=2)
    with pytest.raises(ValueError, match="key_length: got 5, expected an integer of at least 6"):
        prepare_selection(indices, 2, block_size=2, query_start=2, key_length=5)
    with pytest.raises(ValueError, match="expected ascending offsets from 0 to 6"):
        prepare_selection(indices, 2, block_size=2, query_start=2, cu_seqlens=offsets([4]))
