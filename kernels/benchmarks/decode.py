"""The attention of one decode step: one new token for each of B sequences, from their caches.

Measured are layers of each kind alone, and a hybrid block of 12: one full layer that selects, then
11 sparse layers that read its cache and rings of their own. Every layer of a block has the same
query and the same ring, which costs what own ones would: caches are flushed between repetitions,
and a layer's ring is small beside what it reads of the oracle. Projections and experts are left
out, so that tokens/s are those of attention alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import hysparse_kernels as hk
import torch
import torch.nn.functional as F
from hysparse_kernels.benchmarking.problem import Problem
from torch import Tensor

from benchmarks.hybrid_block import LAYERS, SPARSE_LAYERS

BATCHES = (1, 16)
"""Sequences of a step."""


class Measured(NamedTuple):
    """One row of the table."""

    name: str
    label: str
    call: Callable[[], Tensor]
    read_bytes: int
    """What it must read for one token: keys and values, each once."""
    layers: int = 1
    """How many of what `call` does count."""


@dataclass(frozen=True)
class DecodeStep:
    """Full caches of a problem's B sequences of S tokens, the last of which is the step's."""

    problem: Problem
    backend: str
    chunk: hk.Chunk
    query: Tensor
    """[B, 1, HQ, D]"""
    key: Tensor
    value: Tensor
    gates: Tensor
    """[2, B, 1, HQ, 1]"""
    sink: Tensor
    oracle: hk.TokenCache
    ring: hk.WindowCache
    selection: Tensor
    """int32 [B, HKV, 1, K], ascending: any, as a step reads few and shares none."""

    @classmethod
    def random(
        cls, problem: Problem, device: torch.device, backend: str, full_dtype: torch.dtype
    ) -> DecodeStep:
        """Normal tensors in bf16; the oracle's cache in `full_dtype`."""
        batch, groups, bf16 = problem.batch, problem.groups, torch.bfloat16

        def normal(tokens: int, count: int, width: int) -> Tensor:
            return torch.randn(batch, tokens, count, width, device=device, dtype=bf16)

        def tokens(count: int) -> tuple[Tensor, Tensor]:
            widths = (problem.head_dim, problem.value_dim)
            return normal(count, groups, widths[0]), normal(count, groups, widths[1])

        sizes = (groups, problem.head_dim, problem.value_dim)
        oracle = hk.TokenCache([problem.sequence] * batch, *sizes, full_dtype, device)
        ring = hk.WindowCache(batch, problem.window, *sizes, bf16, device)
        rows = tuple(range(batch))
        past = problem.sequence - 1
        for start in range(0, past, 8192):
            new = min(8192, past - start)
            prompt = hk.Chunk(rows, (start,) * batch, (new,) * batch, device)
            for cache in (oracle, ring):
                cache.append(prompt, *tokens(new))
        chunk = hk.Chunk(rows, (past,) * batch, (1,) * batch, device)
        order = torch.rand(batch, groups, 1, problem.num_blocks, device=device).argsort(-1)
        selection = order[..., : problem.num_selected].sort(-1).values.int()
        return cls(
            problem, backend, chunk, normal(1, problem.heads, problem.head_dim), *tokens(1),
            torch.randn(2, batch, 1, problem.heads, 1, device=device, dtype=bf16),
            torch.randn(problem.heads, device=device), oracle, ring, selection,
        )  # fmt: skip

    def rows(self) -> Iterator[Measured]:
        """What is measured; `sdpa` counts as if a model had full layers only."""
        stored = self.oracle.key.dtype
        all_tokens = self._bytes(self.problem.sequence, stored)
        if stored == hk.FP8:
            yield Measured("full_fp8", "hysparse full layer, FP8 cache", self.full, all_tokens)
            return
        selected = self.selection.shape[-1] * self.problem.block_size
        window = self._bytes(self.problem.window, torch.bfloat16)
        sparse = self._bytes(selected, stored) + window
        yield Measured("sdpa", "SDPA of torch, full layer", self.sdpa, all_tokens)
        yield Measured("full", "hysparse full layer, selecting", self.full, all_tokens)
        yield Measured("sparse", "hysparse sparse layer", self.sparse, sparse)
        yield Measured("window", "hysparse window layer", self.window, window)
        yield Measured(
            "sdpa_block", f"{LAYERS} x SDPA, full layer", self.sdpa, all_tokens, layers=LAYERS
        )
        yield Measured(
            "hysparse", "1 full + 11 sparse layers", self.block, all_tokens + SPARSE_LAYERS * sparse
        )

    def _bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Of so many keys and values of all groups, at most those there are."""
        problem = self.problem
        per_group = (problem.head_dim + problem.value_dim) * dtype.itemsize
        per_group += 2 if dtype == hk.FP8 else 0
        return min(tokens, problem.sequence) * problem.groups * per_group

    def sdpa(self) -> Tensor:
        """torch's attention to the oracle's cache, which holds the new token already."""
        batch = self.problem.batch
        key, value = (
            kept.unflatten(0, (batch, self.problem.sequence)).transpose(1, 2)
            for kept in (self.oracle.key, self.oracle.value)
        )
        query = self.query.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return mixed.transpose(1, 2)

    def full(self) -> Tensor:
        """A full layer with its selection."""
        return hk.cached_full_attention(
            self.query, self.key, self.value, self.oracle, self.chunk,
            block_size=self.problem.block_size, num_selected=self.problem.num_selected,
            backend=self.backend,
        ).output  # fmt: skip

    def sparse(self) -> Tensor:
        """A sparse layer, both branches and gates."""
        return hk.cached_sparse_attention(
            self.query, self.key, self.value, self.gates[0], self.gates[1], self.oracle,
            self.selection, self.ring, self.chunk,
            block_size=self.problem.block_size, window=self.problem.window,
            sparse_sink=self.sink, window_sink=self.sink, backend=self.backend,
        )  # fmt: skip

    def window(self) -> Tensor:
        """A layer of the hybrid baseline."""
        return hk.cached_window_attention(
            self.query, self.key, self.value, self.ring, self.chunk,
            window=self.problem.window, sink=self.sink, backend=self.backend,
        )  # fmt: skip

    def block(self) -> Tensor:
        """A hybrid block."""
        output = self.full()
        for _ in range(SPARSE_LAYERS):
            output = self.sparse()
        return output


def as_graph(call: Callable[[], Tensor]) -> Callable[[], object]:
    """`call` recorded as a CUDA graph, whose replay costs no time of the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
