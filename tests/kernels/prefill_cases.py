"""Prompts in chunks on the kernels against one piece in fp64, on fresh random sequences.

`python -m tests.kernels.prefill_cases SEED` runs all cases, without a GPU, in Triton's interpreter
(TRITON_INTERPRET=1) in fp32, where rounding cannot hide a mistake; tests/gpu has the other types.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hysparse_kernels import (
    FP8,
    Chunk,
    TokenCache,
    WindowCache,
    block_sparse_attention,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
    gated_sum,
    oracle_attention,
    prepare_cached_selection,
    sliding_window_attention,
)
from hysparse_kernels.key_value_cache import from_fp8, to_fp8
from torch import Tensor

from tests.kernels import rounding
from tests.kernels.cases import Sizes, blocks_of, causal_keys, selected_keys, window_keys
from tests.kernels.drawn_cases import poisoned_memory
from tests.kernels.rounding import assert_within


@dataclass(frozen=True)
class Case(Sizes):
    """Sizes of one comparison; see `cached_attention` for the letters."""

    lengths: tuple[int, ...]
    """Of the prompts."""
    chunk: int
    """Tokens of each prompt in a step."""
    dtype: torch.dtype
    full_dtype: torch.dtype
    forced: tuple[int, int] = (0, 0)
    is_shared: bool = True
    """Whether sparse layers get what they have in common."""

    @property
    def rule(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "num_selected": self.selected,
            "forced_first_blocks": self.forced[0],
            "forced_recent_blocks": self.forced[1],
        }

    def steps(self, device: torch.device) -> Iterator[Chunk]:
        """Those that bring the prompts in, the rows of each in falling order."""
        for past in range(0, max(self.lengths), self.chunk):
            rows = [row for row, length in enumerate(self.lengths) if length > past][::-1]
            new = tuple(min(self.chunk, self.lengths[row] - past) for row in rows)
            yield Chunk(tuple(rows), (past,) * len(rows), new, device)


def draw(rng: random.Random, dtype: torch.dtype, on_gpu: bool = False) -> Case:
    """Ragged prompts, chunks that divide neither them nor blocks, any heads per group."""
    groups = rng.choice([1, 2])
    dims = [64, 96, 128, 192] if on_gpu else [16, 24]
    longest, block_size = (900, rng.choice([32, 64])) if on_gpu else (45, 16)
    selected = rng.choice([1, 2, 5])
    first = rng.randint(0, 1)
    return Case(
        groups * rng.choice([1, 3, 4, 8] if on_gpu else [1, 2, 4]),
        groups,
        rng.choice(dims),
        rng.choice(dims),
        block_size,
        selected,
        rng.choice([1, 5, block_size + 1, 2 * longest]),
        tuple(rng.randint(1, longest) for _ in range(rng.choice([1, 2, 3]))),
        rng.randint(longest // 8, longest),
        dtype,
        rng.choice([dtype, FP8]),
        (first, rng.randint(0, selected - first)),
        rng.random() < 0.7,
    )


class Prompts:
    """The tokens of an oracle, of a sparse layer that reads it, and the layers' caches."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        heads, groups = case.heads, case.groups
        self.query = 2 * self.normal(heads, case.head_dim)
        self.key, self.value = (
            self.normal(groups, case.head_dim),
            self.normal(groups, case.value_dim),
        )
        self.own_query = 2 * self.normal(heads, case.head_dim)
        self.near_key = self.normal(groups, case.head_dim)
        self.near_value = self.normal(groups, case.value_dim)
        self.gates = [self.normal(heads, 1), self.normal(heads, 1)]
        self.sinks = torch.randn(2, heads, generator=self.generator, device=device)
        widths = (groups, case.head_dim, case.value_dim)
        capacities = [length + 3 for length in case.lengths]
        self.oracle = TokenCache(capacities, *widths, case.full_dtype, device)
        entries = min(case.window, max(capacities))
        self.rings = [
            WindowCache(len(capacities), entries, *widths, case.dtype, device) for _ in range(2)
        ]
        for cache in (self.oracle, *self.rings):
            for tensor in cache.tensors:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 127)

    def normal(self, count: int, width: int) -> Tensor:
        """[B, S, count, width] of all prompts, NaN after the end of each."""
        shape = (len(self.case.lengths), max(self.case.lengths), count, width)
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        for row, length in enumerate(self.case.lengths):
            drawn[row, length:] = torch.nan
        return drawn.to(self.case.dtype)

    @staticmethod
    def columns(chunk: Chunk, *tensors: Tensor) -> list[Tensor]:
        """What a step brings [A, C, ...], strided as megatron-core lays it out."""
        columns = slice(chunk.past[0], chunk.past[0] + chunk.width)
        parts = (torch.stack([tensor[row, columns] for row in chunk.rows], 1) for tensor in tensors)
        return [part.transpose(0, 1) for part in parts]

    def full(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """A step of the full layer: output and selection."""
        given = self.columns(chunk, self.query, self.key, self.value)
        found = cached_full_attention(
            *given, self.oracle, chunk, **self.case.rule, backend="triton"
        )
        assert found.block_indices is not None
        return found

    def sparse(self, chunk: Chunk, selection: Tensor) -> Tensor:
        """A step of the sparse layer."""
        case, prepared = self.case, None
        if case.is_shared:
            prepared = prepare_cached_selection(
                self.oracle, selection, chunk, query_heads=case.heads, dtype=case.dtype,
                block_size=case.block_size, backend="triton",
            )  # fmt: skip
        tensors = (self.own_query, self.near_key, self.near_value, *self.gates)
        return cached_sparse_attention(
            *self.columns(chunk, *tensors), self.oracle, selection, self.rings[0], chunk,
            block_size=case.block_size, window=case.window, sparse_sink=self.sinks[0],
            window_sink=self.sinks[1], prepared=prepared, backend="triton",
        )  # fmt: skip

    def window(self, chunk: Chunk) -> Tensor:
        """A step of a window layer."""
        given = self.columns(chunk, self.own_query, self.near_key, self.near_value)
        return cached_window_attention(
            *given, self.rings[1], chunk, window=self.case.window, sink=self.sinks[1],
            backend="triton",
        )  # fmt: skip


@dataclass(frozen=True)
class Exact:
    """Of one prompt in one piece, in fp64, with the variances that rounding leads to."""

    full: Tensor
    selection: Tensor
    offered: Tensor
    sparse: Tensor
    window: Tensor
    on_full: Tensor
    on_scores: Tensor
    on_sparse: Tensor
    on_window: Tensor

    @classmethod
    def of(cls, prompts: Prompts, row: int) -> Exact:
        """Of the prompt in this row of the caches."""
        case, length = prompts.case, prompts.case.lengths[row]

        def own(tensor: Tensor) -> Tensor:
            return tensor[row : row + 1, :length].double()

        far, query = [own(prompts.query)], own(prompts.own_query)
        for tensor in (prompts.key, prompts.value):
            given = own(tensor)
            far.append(from_fp8(*to_fp8(given), torch.float64) if case.full_dtype == FP8 else given)
        near = [query, own(prompts.near_key), own(prompts.near_value)]
        starts = torch.zeros(1, length, dtype=torch.int64, device=prompts.device)
        causal, block_of = causal_keys(starts), blocks_of(starts, case.block_size)
        oracle = oracle_attention(*far, **case.rule, backend="reference")
        indices = oracle.block_indices
        scores = rounding.block_scores(far[0], far[1], oracle.lse, causal, block_of)
        block = torch.arange(scores.shape[-1], device=prompts.device)
        forced = (block < case.forced[0]) | (block > block_of[0, :, None] - case.forced[1])
        scores = scores.masked_fill(forced & (scores > -torch.inf), torch.inf)
        size = {"block_size": case.block_size}
        branches = (
            block_sparse_attention(
                query, *far[1:], indices, sink=prompts.sinks[0], backend="reference", **size
            ),
            sliding_window_attention(
                *near, window=case.window, sink=prompts.sinks[1], backend="reference"
            ),
        )
        gates = [own(gate) for gate in prompts.gates]
        near_seen = window_keys(starts, case.window)

        def allowed(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, sink: Any) -> Any:
            return rounding.attention(query, key, value, seen, dtype=case.dtype, sink=sink)

        whole = allowed(*far, causal, None)
        chosen = selected_keys(starts, indices, case.block_size)
        on_far = allowed(query, *far[1:], chosen, prompts.sinks[0]).output
        on_near = allowed(*near, near_seen, prompts.sinks[1]).output
        on_sum = sum(
            part * gate.sigmoid() ** 2 for part, gate in zip((on_far, on_near), gates, strict=True)
        )
        return cls(
            oracle.output, indices, scores, gated_sum(*branches, *gates, backend="reference"),
            branches[1], whole.output, whole.scores, rounding.SUM_OF_TWO * on_sum, on_near,
        )  # fmt: skip


def compare(case: Case, device: torch.device, seed: int) -> None:
    """Assert outputs and selections of every kind of layer, chunk by chunk."""
    prompts = Prompts(case, device, seed)
    exact = [Exact.of(prompts, row) for row in range(len(case.lengths))]
    for chunk in case.steps(device):
        shape = (len(chunk.rows), case.groups, chunk.width, case.selected)
        selection = torch.full(shape, -1, dtype=torch.int32, device=device)
        for i, row, past, new in chunk.spans:
            selection[i, :, :new] = exact[row].selection[0, :, past : past + new]
        with poisoned_memory():
            full, picks = prompts.full(chunk)
            sparse, window = prompts.sparse(chunk, selection), prompts.window(chunk)
        for i, row, past, new in chunk.spans:
            here, of_row, what = slice(past, past + new), exact[row], f"row {row} of {case}"
            for name, got, wanted, variance in (
                ("full", full, of_row.full, of_row.on_full),
                ("sparse", sparse, of_row.sparse, of_row.on_sparse),
                ("window", window, of_row.window, of_row.on_window),
            ):
                layer = f"{name} layer, tokens from {past} on of {what}"
                assert_within(got[i, :new], wanted[0, here], variance[0, here], layer)
            assert not full[i, new:].any()
            assert not window[i, new:].any()
            offered, variance = of_row.offered[0, :, here], of_row.on_scores[0, :, here]
            wrong = rounding.wrong_rows(picks[i, :, :new], offered, variance)
            assert not wrong.any(), f"{int(wrong.sum())} selections of tokens {here} of {what}"


def main(seed: int) -> None:
    """Run all cases for one seed."""
    rng = random.Random(seed)
    fp32 = torch.float32
    fixed = [
        # More than one block a chunk, a prompt shorter than it, and one of exactly two.
        Case(4, 2, 16, 24, 16, 2, 5, (40, 9, 34), 17, fp32, FP8),
        # Chunks of two tokens, a window as long as a block, one token left for the decode kernels.
        Case(2, 1, 16, 16, 16, 1, 16, (19,), 2, fp32, fp32, (1, 0)),
    ]
    for case in [*fixed, *(draw(rng, fp32) for _ in range(3))]:
        compare(case, torch.device("cpu"), rng.randrange(2**31))
        print(f"{case} agrees", flush=True)
    print("all cases agree")


if __name__ == "__main__":
    main(int(sys.argv[1]))
