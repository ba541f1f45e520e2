"""Gathered keys and values that the backward pass gathers again instead of keeping them.

What attention saves of them is replaced by this rank's part, `parallel.cp_keep_kv=false`: of every
hybrid block a rank keeps S / P tokens and not S. The first reader whose backward pass comes gathers
all of them once more, for all readers of the block, and they go with the last one's.

Shapes: as in context_parallel.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hysparse_megatron.model.context_parallel import Shard, gathered
from hysparse_megatron.model.offload import ON_DEVICE, Keep


class Regather:
    """The tensors that one forward pass of a stage has gathered and still reads.

    With `keeps_all` it knows none, and autograd saves them like all else, which is as `keep` does.
    """

    def __init__(self, *, keeps_all: bool = True, keep: Keep = ON_DEVICE) -> None:
        self.keep = keep
        self._keeps_all = keeps_all
        self._known: dict[int, _Known] = {}

    def add(
        self,
        own: tuple[Tensor, Tensor],
        whole: tuple[Tensor, Tensor],
        shard: Shard,
        group: dist.ProcessGroup,
    ) -> None:
        """Key and value as this rank has them, [R, B, HKV, D or DV], and as they were gathered.

        Nothing else may take the place of `whole` in memory before `forget` lets go of it: that is
        how it is recognized, whatever views attention saves.
        """
        if self._keeps_all:
            return
        block = _Block(self.keep, shard, group)
        for index, tensor in enumerate(whole):
            self._known[_place(tensor)] = _Known(tensor, block, own, index)

    def forget(self) -> None:
        """Their last reader is through."""
        self._known.clear()

    def saving(self) -> AbstractContextManager[object]:
        """Within, autograd saves `_Saved` in place of what is known."""
        if self._keeps_all:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        known = self._known.get(_place(tensor))
        if known is None:
            return self.keep.pack(tensor)
        # Packed by every reader, so that it is there with what else the reader has saved.
        own = (self.keep.pack(known.own[0]), self.keep.pack(known.own[1]))
        view = (tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return _Saved(known.block, own, known.which, *view)

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return self.keep.unpack(saved)
        whole = saved.block.whole(saved.own)[saved.which]
        return whole.as_strided(saved.size, saved.stride, saved.offset)


class _Block:
    """Key and value of one block: all of it once it was asked for.

    Autograd frees what a node saved behind its backward pass, and this with the last of them.
    """

    def __init__(self, keep: Keep, shard: Shard, group: dist.ProcessGroup) -> None:
        self._keep, self._shard, self._group = keep, shard, group
        self._whole: tuple[Tensor, Tensor] | None = None

    def whole(self, own: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Gathered by the first who asks, from this rank's part of both as it is kept."""
        if self._whole is None:
            key, value = (self._keep.unpack(part) for part in own)
            self._whole = gathered(key, value, self._shard, self._group)
        return self._whole


class _Known(NamedTuple):
    """A gathered key (which = 0) or value (1)."""

    tensor: Tensor
    block: _Block
    own: tuple[Tensor, Tensor]
    which: int


class _Saved(NamedTuple):
    """A view of a block's key (which = 0) or value (1)."""

    block: _Block
    own: tuple[Any, Any]
    """This rank's part of both, packed."""
    which: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
