"""Outputs of norms that the backward pass makes again instead of keeping them.

A linear layer keeps its input for the gradient of its weight. After a norm that is as much as the
residual stream, and the norm keeps what it can be made of anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hysparse_megatron.model.offload import ON_DEVICE, Keep


@contextmanager
def remade(norm: torch.nn.Module, keep: Keep = ON_DEVICE) -> Iterator[None]:
    """Within, whoever saves what `norm` made of its input for the backward pass keeps nothing.

    It is made again for each that reads it, by the same operations: equal to the last bit. All else
    is kept as `keep` does.
    """
    watched = Remade(keep)
    hook = norm.register_forward_hook(watched.made)
    try:
        with torch.autograd.graph.saved_tensors_hooks(watched._pack, watched._unpack):
            yield
    finally:
        hook.remove()
        watched.forget()


class Remade:
    """What a norm has made, and how it is made again, until `forget`."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._make: Callable[[], Tensor] | None = None
        self._storage: torch.UntypedStorage | None = None

    def made(self, norm: torch.nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        """A forward hook: this is the output that is not saved."""
        keep, kept = self._keep, self._keep.pack(given[0])
        self._make = lambda: norm.forward(keep.unpack(kept))
        self._storage = output.untyped_storage()

    def forget(self) -> None:
        """What is saved from now on is kept."""
        self._make = self._storage = None

    def _pack(self, saved: Tensor) -> Any:
        storage, make = self._storage, self._make
        if storage is None or make is None:
            return self._keep.pack(saved)
        if saved.untyped_storage().data_ptr() != storage.data_ptr():
            return self._keep.pack(saved)
        size, stride, offset = saved.size(), saved.stride(), saved.storage_offset()

        def again() -> Tensor:
            with torch.no_grad():
                return make().as_strided(size, stride, offset)

        return again

    def _unpack(self, packed: Any) -> Tensor:
        return packed() if callable(packed) else self._keep.unpack(packed)
