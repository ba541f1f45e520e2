"""The attention of a prompt in all layers of the 80B model: chunk by chunk, and in one piece.

The layout is 4*(F 11*S) F: 5 full layers, the last of which nobody reads, and 44 sparse ones. In
chunks every layer has a cache of its own, as in generation; in one piece there are none, as in
the forward pass of training. The twin has full layers only, all of which cost the same: one is
measured, and counted as often as the model has layers. Projections and experts are left out.

As in hybrid_block.py oracles make a selection of their own, and sparse layers read a given one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import hysparse_kernels as hk
import torch
from hysparse_kernels.benchmarking.problem import Inputs
from torch import Tensor

from benchmarks.hybrid_block import SPARSE_LAYERS

BLOCKS = 4
"""Of one full and 11 sparse layers; a full layer follows them."""
LAYERS = BLOCKS * (1 + SPARSE_LAYERS) + 1


class Outputs(NamedTuple):
    """Of the last full and the last sparse layer, piece by piece [B, S of a piece, HQ, DV]."""

    full: list[Tensor]
    sparse: list[Tensor]


class Measured(NamedTuple):
    """One row of the table."""

    name: str
    label: str
    make: Callable[[], Callable[[], object]]
    """Takes memory for caches, and gives what is timed."""
    layers: int = 1
    """How many of what is timed count."""


@dataclass(frozen=True)
class Prompt:
    """A problem's B prompts of S tokens; every layer has the same query, key, value and gates."""

    inputs: Inputs
    gate: Tensor
    """[B, S, HQ, 1], of both branches."""
    chunk: int

    @classmethod
    def make(cls, inputs: Inputs, chunk: int) -> Prompt:
        """With random gates; `chunk` in tokens."""
        query = inputs.query
        gate = torch.randn(*query.shape[:3], 1, device=query.device, dtype=query.dtype)
        return cls(inputs, gate, chunk)

    def rows(self) -> Iterator[Measured]:
        """What is measured."""
        stack = f"{BLOCKS * SPARSE_LAYERS} sparse + {BLOCKS + 1} full layers"
        how = f"in chunks of {self.chunk:,}"
        yield Measured("one_piece", f"{stack}, in one piece", lambda: self.in_one_piece)
        yield Measured("hysparse", f"{stack}, {how}", self.with_caches)
        yield Measured("fp8", f"{stack}, {how}, FP8", lambda: self.with_caches(hk.FP8))
        full = f"{LAYERS} full layers"
        alone = self.full_in_one_piece
        yield Measured("full_one_piece", f"{full}, in one piece", lambda: alone, LAYERS)
        yield Measured("full", f"{full}, {how}", self.full_with_cache, LAYERS)

    @property
    def _blocks(self) -> dict[str, Any]:
        return {"block_size": self.inputs.problem.block_size, "backend": self.inputs.backend}

    @property
    def _rule(self) -> dict[str, Any]:
        return {**self._blocks, "num_selected": self.inputs.problem.num_selected}

    def _indices(self) -> Tensor:
        assert self.inputs.indices is not None
        return self.inputs.indices

    @torch.no_grad()
    def in_one_piece(self) -> Outputs:
        """All queries at once, as in training."""
        inputs, indices = self.inputs, self._indices()
        backend, window = inputs.backend, inputs.problem.window
        for block in range(BLOCKS + 1):
            is_read = block < BLOCKS
            full = hk.oracle_attention(*inputs.leaves, **self._rule, select=is_read).output
            if not is_read:
                break
            lists = hk.prepare_selection(indices, inputs.problem.heads, **self._blocks)
            for _ in range(SPARSE_LAYERS):
                far = hk.block_sparse_attention(
                    *inputs.leaves, indices, sink=inputs.sink, lists=lists, **self._blocks
                )
                near = hk.sliding_window_attention(
                    *inputs.leaves, window=window, sink=inputs.sink, backend=backend
                )
                sparse = hk.gated_sum(far, near, self.gate, self.gate, backend=backend)
        return Outputs([full], [sparse])

    @torch.no_grad()
    def full_in_one_piece(self) -> Tensor:
        """A full layer that nobody reads."""
        return hk.oracle_attention(*self.inputs.leaves, **self._rule, select=False).output

    def _pieces(self) -> Iterator[tuple[slice, hk.Chunk]]:
        """The prompts' tokens, and the steps that bring them."""
        length, batch = self.inputs.problem.sequence, self.inputs.problem.batch
        for past in range(0, length, self.chunk):
            new = min(self.chunk, length - past)
            rows = tuple(range(batch))
            chunk = hk.Chunk(rows, (past,) * batch, (new,) * batch, self.inputs.query.device)
            yield slice(past, past + new), chunk

    def _token_cache(self, dtype: torch.dtype) -> hk.TokenCache:
        problem, device = self.inputs.problem, self.inputs.query.device
        sizes = (problem.groups, problem.head_dim, problem.value_dim)
        return hk.TokenCache([problem.sequence] * problem.batch, *sizes, dtype, device)

    def with_caches(self, full_dtype: torch.dtype = torch.bfloat16) -> Callable[[], Outputs]:
        """What takes the prompts in chunk by chunk, over caches that are made here."""
        problem, device = self.inputs.problem, self.inputs.query.device
        sizes = (problem.groups, problem.head_dim, problem.value_dim)
        oracles = [self._token_cache(full_dtype) for _ in range(BLOCKS + 1)]
        rings = [
            hk.WindowCache(
                problem.batch, min(problem.window, problem.sequence), *sizes, torch.bfloat16, device
            )
            for _ in range(BLOCKS * SPARSE_LAYERS)
        ]

        @torch.no_grad()
        def run() -> Outputs:
            outputs = Outputs([], [])
            for tokens, chunk in self._pieces():
                full, sparse = self._step(tokens, chunk, oracles, rings)
                outputs.full.append(full)
                outputs.sparse.append(sparse)
            return outputs

        return run

    def _step(
        self,
        tokens: slice,
        chunk: hk.Chunk,
        oracles: list[hk.TokenCache],
        rings: list[hk.WindowCache],
    ) -> tuple[Tensor, Tensor]:
        """One chunk through all layers: outputs of the last full and the last sparse one."""
        inputs, heads = self.inputs, self.inputs.problem.heads
        query, key, value = (tensor[:, tokens] for tensor in inputs.leaves)
        gate, indices = self.gate[:, tokens], self._indices()[:, :, tokens]
        for block, oracle in enumerate(oracles):
            is_read = block < BLOCKS
            full = hk.cached_full_attention(
                query, key, value, oracle, chunk, **self._rule, select=is_read
            ).output
            if not is_read:
                break
            prepared = hk.prepare_cached_selection(
                oracle, indices, chunk, query_heads=heads, dtype=query.dtype, **self._blocks
            )
            for ring in rings[block * SPARSE_LAYERS : (block + 1) * SPARSE_LAYERS]:
                sparse = hk.cached_sparse_attention(
                    query, key, value, gate, gate, oracle, indices, ring, chunk,
                    window=inputs.problem.window, sparse_sink=inputs.sink, window_sink=inputs.sink,
                    prepared=prepared, **self._blocks,
                )  # fmt: skip
        return full, sparse

    def full_with_cache(self) -> Callable[[], list[Tensor]]:
        """The same of a full layer that nobody reads."""
        cache = self._token_cache(torch.bfloat16)

        @torch.no_grad()
        def run() -> list[Tensor]:
            outputs = []
            for tokens, chunk in self._pieces():
                query, key, value = (tensor[:, tokens] for tensor in self.inputs.leaves)
                found = hk.cached_full_attention(
                    query, key, value, cache, chunk, **self._rule, select=False
                )
                outputs.append(found.output)
            return outputs

        return run
