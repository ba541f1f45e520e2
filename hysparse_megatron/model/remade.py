"""Outputs of norms that the backward pass makes again instead of keeping them.

A linear layer keeps its input for the gradient of its weight. After a norm that is as much as the
residual stream, and the norm keeps what it can be made of anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Remade:
    """Inside `watching`, whoever saves the output of `apply` for the backward pass keeps nothing.

    It is made again for each that reads it, by the same operations: equal to the last bit.
    """

    def __init__(self) -> None:
        self._make: Callable[[], Tensor] | None = None
        self._storage: torch.UntypedStorage | None = None

    def apply(self, norm: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """`norm(hidden)`; the one output that is not saved."""
        output = norm(hidden)
        kept = hidden.detach()
        self._make = lambda: norm(kept)
        self._storage = output.untyped_storage()
        return output

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What is computed within may save the output."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._make = self._storage = None

    def _pack(self, saved: Tensor) -> Tensor | Callable[[], Tensor]:
        storage, make = self._storage, self._make
        if storage is None or make is None:
            return saved.detach()  # itself, an output would hold what holds it
        if saved.untyped_storage().data_ptr() != storage.data_ptr():
            return saved.detach()
        size, stride, offset = saved.size(), saved.stride(), saved.storage_offset()

        def again() -> Tensor:
            with torch.no_grad():
                return make().as_strided(size, stride, offset)

        return again


def _unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()
