"""All queries of a sequence at once, and in ranges as context parallelism makes them.

Ranges read the same keys and values as all queries do and add to the same gradients of them, as on
a rank; those of a window have keys of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hysparse_kernels as hk
import torch
from hysparse_kernels.benchmarking.problem import Inputs
from torch import Tensor

OPERATIONS = ("oracle", "sparse", "window")
CHUNKS = (2, 4)
"""As many as one rank has, and as two ranks have together."""


@dataclass(frozen=True)
class RangeRun:
    """One operation over so many ranges of equal length."""

    operation: str
    inputs: Inputs
    chunks: int

    def _window(self, query: Tensor, start: int) -> Tensor:
        """With no more keys than the window reaches, which a rank gathers for each range."""
        first = max(0, start - self.inputs.problem.window + 1)
        stop = start + query.shape[1]
        keys = (
            tensor[:, first:stop].detach().requires_grad_() for tensor in self.inputs.leaves[1:]
        )
        return hk.sliding_window_attention(
            query,
            *keys,
            window=self.inputs.problem.window,
            sink=self.inputs.sink.detach(),
            query_start=start - first,
            backend=self.inputs.backend,
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: int,
        lists: hk.BlockLists | None,
        accumulate: hk.KeyValueGradients,
    ) -> Tensor:
        if self.operation == "window":
            return self._window(query, start)
        problem = self.inputs.problem
        common: dict[str, Any] = {
            "block_size": problem.block_size,
            "query_start": start,
            "accumulate": accumulate,
            "backend": self.inputs.backend,
        }
        if self.operation == "oracle":
            return hk.oracle_attention(
                query, key, value, num_selected=problem.num_selected, **common
            ).output
        assert self.inputs.indices is not None
        indices = self.inputs.indices[:, :, start : start + query.shape[1]]
        return hk.block_sparse_attention(query, key, value, indices, lists=lists, **common)

    def prepare(self) -> list[hk.BlockLists | None]:
        """The lists of each range, which one selection's layers share; None where none are read."""
        inputs, problem = self.inputs, self.inputs.problem
        if self.operation != "sparse" or inputs.indices is None:
            return [None] * self.chunks
        return [
            hk.prepare_selection(
                indices, problem.heads, block_size=problem.block_size, backend=inputs.backend,
                query_start=number * indices.shape[2], key_length=problem.sequence,
            )
            for number, indices in enumerate(inputs.indices.chunk(self.chunks, 2))
        ]  # fmt: skip

    def run(self, lists: list[hk.BlockLists | None], *, backward: bool) -> None:
        """Forward, and with `backward` the gradients of all inputs too."""
        with torch.set_grad_enabled(backward):
            leaves = [tensor.detach().requires_grad_() for tensor in self.inputs.leaves[1:]]
            accumulate = hk.KeyValueGradients()
            key, value = accumulate.attach(*leaves)
            outputs, start = [], 0
            for own_lists, part in zip(lists, self.inputs.query.chunk(self.chunks, 1), strict=True):
                query = part.detach().requires_grad_()
                outputs.append(self._attend(query, key, value, start, own_lists, accumulate))
                start += part.shape[1]
        if backward:
            torch.autograd.backward(outputs, list(self.inputs.grad.chunk(self.chunks, 1)))
