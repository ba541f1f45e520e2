"""What attention layers compute with: one interface, and its implementation for training.

A layer projects, normalises and rotates; an `Attend` does the rest from query, key and value to the
weighted values, by the kernels of `hysparse_kernels`. One is made for every forward pass and handed
from layer to layer. That of generation stands in attend_cached.py.

Shapes: S sequence, B batch, HQ query heads and HKV KV groups on this rank, D query/key head dim,
DV value head dim, K selected blocks. Tensors come in megatron-core's layout [S, B, heads, width]
and attention leaves in the kernels', [B, S, HQ, DV]. Layers are counted from 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from hysparse_kernels import (
    BlockLists,
    KeyValueGradients,
    block_sparse_attention,
    gated_sum,
    oracle_attention,
    prepare_selection,
    sliding_window_attention,
)
from megatron.core import tensor_parallel
from torch import Tensor
from torch.profiler import record_function

from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.model.context_parallel import (
    Shard,
    Windows,
    documents_between,
    gather_key_value,
)
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.regather import Regather
from hysparse_megatron.model.sharing import Shared, SharedAttention
from hysparse_megatron.runtime.annotations import FULL_ATTENTION, SPARSE_ATTENTION
from hysparse_megatron.runtime.process_groups import RunGroups


class Projected(NamedTuple):
    """What a layer has projected and rotated."""

    query: Tensor
    """[S, B, HQ, D]"""
    key: Tensor
    """[S, B, HKV, D]"""
    value: Tensor
    """[S, B, HKV, DV]"""

    @property
    def in_kernel_layout(self) -> Projected:
        """All three as [B, S, heads, width]."""
        return Projected(*map(kernel_layout, self))


class Branches(NamedTuple):
    """How a sparse layer weighs its two branches, the oracle's blocks and its own window."""

    gates: tuple[Tensor, Tensor]
    """Logits [S, B, HQ, 1 or DV]."""
    sinks: tuple[Tensor | None, Tensor | None]
    """[HQ] each; one tensor twice where they share it."""


class Attend(Protocol):
    """The attention of every layer in one forward pass."""

    def full(self, layer: int, own: Projected) -> tuple[Tensor, Shared | None]:
        """Causal attention over all keys, and what the sparse layers read; None if none does."""

    def sparse(self, layer: int, own: Projected, branches: Branches, shared: Shared) -> Tensor:
        """Gated sum of the oracle's selected blocks and the layer's own window."""

    def window(self, layer: int, own: Projected, sink: Tensor | None) -> Tensor:
        """Attention over the layer's own window."""

    def prepared(self, shared: Shared) -> Shared:
        """`shared` with what all sparse layers of a stage that read it have in common."""


def recomputed(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """`function(again, *tensors)`, run in the backward pass again instead of kept.

    `again` is False in the forward pass and True in the backward pass.
    """
    runs = itertools.count()
    return tensor_parallel.checkpoint(
        lambda *given: function(next(runs) > 0, *given), False, *tensors
    )


def kernel_layout(tensor: Tensor) -> Tensor:
    """megatron-core's [S, B, heads, width] seen as the kernels' [B, S, heads, width]."""
    return tensor.transpose(0, 1)


def selection_rule(model: ModelConfig, groups: RunGroups) -> dict[str, Any]:
    """How oracles select, as arguments of the kernels: the same in training and generation."""
    shared_heads = groups.kv_sharing is not None
    return {
        "block_size": model.block_size,
        "num_selected": model.num_selected_blocks,
        "reduce_scores": functools.partial(_reduce_scores, groups) if shared_heads else None,
        "forced_first_blocks": model.forced_first_blocks,
        "forced_recent_blocks": model.forced_recent_blocks,
    }


def _reduce_scores(groups: RunGroups, scores: Tensor) -> Tensor:
    """With fewer KV groups than ranks each sees some heads of its group only, and all must agree
    on the blocks."""
    torch.distributed.all_reduce(scores, op=torch.distributed.ReduceOp.MAX, group=groups.kv_sharing)
    return scores


@dataclass(frozen=True, kw_only=True)
class TrainingAttend:
    """All tokens of the sequences at once, as in training and evaluation.

    With context parallelism queries are those of this rank's chunks, and every operation runs once
    a chunk; see context_parallel.py.
    """

    config: HySparseConfig
    groups: RunGroups
    documents: Tensor | None
    """int32 [documents + 1]: where they start in all B * S tokens; None is one a row."""
    training: bool
    """Whether a backward pass follows that may recompute."""
    again: bool = False
    """Whether whole layers are recomputed in the backward pass, and this is the second time."""
    regather: Regather = field(default_factory=Regather)
    """Saves what is gathered for the backward pass as it is, or as this rank's part of it."""

    @property
    def _backend(self) -> str:
        return self.config.architecture.backend.value

    @property
    def _accumulates(self) -> bool:
        """Whether readers add up the gradients of a shared key and value by themselves.

        Recompute detaches both from their producer: autograd has to add them up.
        """
        full = self.config.recompute_granularity == "full"
        recomputes = full or self.config.recomputes_attention
        return self.training and torch.is_grad_enabled() and not recomputes

    def _shard(self, own: Tensor) -> Shard:
        """What of the sequences a tensor [R, ...] of this rank's tokens is."""
        return Shard.of(self.groups.cp, own.shape[0] * self.groups.cp.size())

    def full(self, layer: int, own: Projected) -> tuple[Tensor, SharedAttention | None]:
        """See `Attend`. In the second run of recompute the shared indices are None.

        A selection is made once, so that recompute cannot change it.
        """
        is_read = self.config.plan.is_read(layer)
        shared = self.whole(SharedAttention(own.key, own.value, None))
        attend = functools.partial(self._full, is_read and not self.again, shared.gradients)
        output, indices = self._run(attend, own.query, shared.key, shared.value)
        return output, shared._replace(block_indices=indices) if is_read else None

    def whole(self, own: SharedAttention) -> SharedAttention:
        """`own` with key and value of all tokens, gathered where ranks hold a part of them each."""
        shard = self._shard(own.key)
        if shard.ranks == 1:
            return own
        gradients = KeyValueGradients() if self._accumulates else None
        key, value = gather_key_value(own.key, own.value, shard, self.groups.cp, gradients)
        self.regather.add((own.key, own.value), (key, value), shard, self.groups.cp)
        return own._replace(key=key, value=value, gradients=gradients)

    def _full(
        self,
        select: bool,
        gradients: KeyValueGradients | None,
        again: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        parts = []
        with record_function(FULL_ATTENTION):
            for rows, start in self._shard(query).chunks:
                result = oracle_attention(
                    *Projected(query[rows], key, value).in_kernel_layout,
                    **selection_rule(self.config.architecture, self.groups),
                    select=select and not again,
                    accumulate=gradients,
                    query_start=start,
                    cu_seqlens=self.documents,
                    backend=self._backend,
                )
                parts.append(result)
            indices = [part.block_indices for part in parts if part.block_indices is not None]
            output = _joined([part.output for part in parts], 1)
            return output, _joined(indices, 2) if indices else None

    def sparse(self, layer: int, own: Projected, branches: Branches, shared: Shared) -> Tensor:
        """See `Attend`."""
        shared = cast(SharedAttention, shared)
        attend = functools.partial(self._sparse, layer, shared.lists, shared.gradients)
        # One by one, as what is recomputed sees gradients of tensors that are its own arguments.
        rest = (*shared.tensors, *branches.sinks, *self._windows(layer, own))
        return self._run(attend, own.query, *branches.gates, *rest)

    def _sparse(
        self,
        layer: int,
        lists: Sequence[BlockLists | None],
        gradients: KeyValueGradients | None,
        again: bool,
        query: Tensor,
        sparse_gate: Tensor,
        window_gate: Tensor,
        key: Tensor,
        value: Tensor,
        block_indices: Tensor,
        sparse_sink: Tensor | None,
        window_sink: Tensor | None,
        *windows: Tensor | Windows,
    ) -> Tensor:
        parts = []
        with record_function(SPARSE_ATTENTION):
            chunks = self._shard(query).chunks
            for (rows, start), chunk_lists in zip(chunks, lists, strict=True):
                part = block_sparse_attention(
                    *Projected(query[rows], key, value).in_kernel_layout,
                    block_indices[:, :, rows],
                    block_size=self.config.architecture.block_size,
                    sink=sparse_sink,
                    lists=chunk_lists,
                    accumulate=gradients,
                    query_start=start,
                    cu_seqlens=self.documents,
                    backend=self._backend,
                )
                parts.append(part)
            sparse = _joined(parts, 1)
            window = self._window(layer, again, query, window_sink, *windows)
            gates = (kernel_layout(sparse_gate), kernel_layout(window_gate))
            return gated_sum(sparse, window, *gates, backend=self._backend).to(query.dtype)

    def window(self, layer: int, own: Projected, sink: Tensor | None) -> Tensor:
        """See `Attend`."""
        attend = functools.partial(self._window, layer)
        return self._run(attend, own.query, sink, *self._windows(layer, own))

    def _windows(self, layer: int, own: Projected) -> tuple[Tensor | Windows, ...]:
        """Key and value, of each chunk, of all tokens that its windows see, or on their way."""
        shard = self._shard(own.key)
        if shard.ranks == 1:
            return own.key, own.value
        windows = Windows(own.key, own.value, self.window_of(layer) - 1, shard, self.groups.cp)
        # What is recomputed takes tensors alone.
        return windows.received() if self._recomputes_attention else (windows,)

    def _window(
        self,
        layer: int,
        again: bool,
        query: Tensor,
        sink: Tensor | None,
        *windows: Tensor | Windows,
    ) -> Tensor:
        shard = self._shard(query)
        if isinstance(windows[0], Windows):
            windows = windows[0].received()
        tensors = cast(tuple[Tensor, ...], windows)
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        parts = []
        with record_function(SPARSE_ATTENTION):
            for (rows, start), (key, value) in zip(shard.chunks, pairs, strict=True):
                tokens = rows.stop - rows.start
                before = key.shape[0] - tokens
                documents = self.documents
                if documents is not None and shard.ranks > 1:
                    among = (start - before, start + tokens)
                    documents = documents_between(documents, query.shape[1], shard.sequence, *among)
                part = sliding_window_attention(
                    *Projected(query[rows], key, value).in_kernel_layout,
                    window=self.window_of(layer),
                    sink=sink,
                    query_start=before,
                    cu_seqlens=documents,
                    backend=self._backend,
                )
                parts.append(part)
            return _joined(parts, 1)

    def window_of(self, layer: int) -> int:
        """Tokens that a query of this layer sees in its window."""
        return self.config.architecture.window

    @property
    def _recomputes_attention(self) -> bool:
        return self.training and self.config.recomputes_attention

    def _run(self, attend: Callable[..., Any], *tensors: Tensor | Windows | None) -> Any:
        """`attend(again, *tensors)`, recomputed in the backward pass where that is set."""
        with self.regather.saving():
            if self._recomputes_attention:
                return recomputed(attend, *cast(tuple[Tensor | None, ...], tensors))
            return attend(self.again, *tensors)

    def prepared(self, shared: Shared) -> SharedAttention:
        """With key and value of all tokens, the selection as kernels walk it, and the sum of its
        readers' gradients."""
        shared = self.with_lists(cast(SharedAttention, shared))
        indices = cast(Tensor, shared.block_indices)
        if shared.key.shape[0] < indices.shape[2] * self.groups.cp.size():
            shared = self.whole(shared)  # what came over a pipeline cut is this rank's
        if shared.gradients is not None or not self._accumulates:
            return shared
        gradients = KeyValueGradients()
        # In the kernels' layout, in which the layers will add.
        key, value = gradients.attach(kernel_layout(shared.key), kernel_layout(shared.value))
        return shared._replace(
            key=kernel_layout(key), value=kernel_layout(value), gradients=gradients
        )

    def with_lists(self, shared: SharedAttention) -> SharedAttention:
        """`shared` with its selection as kernels walk it."""
        indices = shared.block_indices
        assert indices is not None
        shard = Shard.of(self.groups.cp, indices.shape[2] * self.groups.cp.size())
        with record_function(SPARSE_ATTENTION):
            lists = tuple(
                prepare_selection(
                    indices[:, :, rows],
                    self.config.num_attention_heads // self.groups.tp.size(),
                    block_size=self.config.architecture.block_size,
                    query_start=start,
                    key_length=shard.sequence,
                    cu_seqlens=self.documents,
                    backend=self._backend,
                )
                for rows, start in shard.chunks
            )
        return shared._replace(lists=lists)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
