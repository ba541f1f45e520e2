"""What attention layers compute with: one interface, for training and for generation.

A layer projects, normalises and rotates; an `Attend` does the rest from query, key and value to the
weighted values, by the kernels of `hysparse_kernels`. One is made for every forward pass and handed
from layer to layer.

Shapes: S sequence, B batch, HQ query heads and HKV KV groups on this rank, D query/key head dim,
DV value head dim, K selected blocks. Tensors come in megatron-core's layout [S, B, heads, width]
and attention leaves in the kernels', [B, S, HQ, DV]. Layers are counted from 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from hysparse_kernels import (
    BlockLists,
    Chunk,
    KeyValueGradients,
    TokenCache,
    WindowCache,
    block_sparse_attention,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
    gated_sum,
    oracle_attention,
    prepare_selection,
    sliding_window_attention,
)
from megatron.core import tensor_parallel
from torch import Tensor
from torch.profiler import record_function

from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.sharing import CachedSelection, Shared, SharedAttention
from hysparse_megatron.runtime.annotations import FULL_ATTENTION, SPARSE_ATTENTION
from hysparse_megatron.runtime.process_groups import RunGroups

type Sinks = tuple[Tensor | None, Tensor | None]
"""Of the sparse branch and of the window, each [HQ]; one tensor twice where they share it."""


class Attend(Protocol):
    """The attention of every layer in one forward pass."""

    def full(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Shared | None]:
        """Causal attention over all keys, and what the sparse layers read; None if none does."""

    def sparse(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: tuple[Tensor, Tensor],
        shared: Shared,
        sinks: Sinks,
    ) -> Tensor:
        """Gated sum of the oracle's selected blocks and the layer's own window.

        `gates` are logits [S, B, HQ, 1 or DV] of the two branches.
        """

    def window(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None
    ) -> Tensor:
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


def _kernel_layout(tensor: Tensor) -> Tensor:
    """megatron-core's [S, B, heads, width] seen as the kernels' [B, S, heads, width]."""
    return tensor.transpose(0, 1)


def _kernel_layouts(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _kernel_layout(query), _kernel_layout(key), _kernel_layout(value)


def _selection_rule(model: ModelConfig, groups: RunGroups) -> dict[str, Any]:
    """The same in training and generation."""
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
    """All tokens of the sequences at once, as in training and evaluation."""

    config: HySparseConfig
    groups: RunGroups
    documents: Tensor | None
    """int32 [documents + 1]: where they start in all B * S tokens; None is one a row."""
    training: bool
    """Whether a backward pass follows that may recompute."""
    again: bool = False
    """Whether whole layers are recomputed in the backward pass, and this is the second time."""

    @property
    def _backend(self) -> str:
        return self.config.architecture.backend.value

    def full(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, SharedAttention | None]:
        """See `Attend`. In the second run of recompute the shared indices are None.

        A selection is made once, so that recompute cannot change it.
        """
        is_read = self.config.plan.is_read(layer)
        if is_read:
            # Copies, because views would keep the whole fused projection alive with them.
            key, value = key.contiguous(), value.contiguous()
        output, indices = self._run(
            functools.partial(self._full, is_read and not self.again), query, key, value
        )
        return output, SharedAttention(key, value, indices) if is_read else None

    def _full(
        self, select: bool, again: bool, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with record_function(FULL_ATTENTION):
            result = oracle_attention(
                *_kernel_layouts(query, key, value),
                **_selection_rule(self.config.architecture, self.groups),
                select=select and not again,
                cu_seqlens=self.documents,
                backend=self._backend,
            )
        return result.output, result.block_indices

    def sparse(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: tuple[Tensor, Tensor],
        shared: Shared,
        sinks: Sinks,
    ) -> Tensor:
        """See `Attend`."""
        shared = cast(SharedAttention, shared)
        attend = functools.partial(self._sparse, layer, shared.lists, shared.gradients)
        # One by one, as what is recomputed sees gradients of tensors that are its own arguments.
        return self._run(attend, query, key, value, *gates, *shared.tensors, *sinks)

    def _sparse(
        self,
        layer: int,
        lists: BlockLists | None,
        gradients: KeyValueGradients | None,
        again: bool,
        query: Tensor,
        window_key: Tensor,
        window_value: Tensor,
        sparse_gate: Tensor,
        window_gate: Tensor,
        key: Tensor,
        value: Tensor,
        block_indices: Tensor,
        sparse_sink: Tensor | None,
        window_sink: Tensor | None,
    ) -> Tensor:
        with record_function(SPARSE_ATTENTION):
            sparse = block_sparse_attention(
                *_kernel_layouts(query, key, value),
                block_indices,
                block_size=self.config.architecture.block_size,
                sink=sparse_sink,
                lists=lists,
                accumulate=gradients,
                cu_seqlens=self.documents,
                backend=self._backend,
            )
            window = self._window(layer, again, query, window_key, window_value, window_sink)
            gates = (_kernel_layout(sparse_gate), _kernel_layout(window_gate))
            return gated_sum(sparse, window, *gates, backend=self._backend).to(query.dtype)

    def window(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None
    ) -> Tensor:
        """See `Attend`."""
        return self._run(functools.partial(self._window, layer), query, key, value, sink)

    def _window(
        self,
        layer: int,
        again: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
    ) -> Tensor:
        with record_function(SPARSE_ATTENTION):
            return sliding_window_attention(
                *_kernel_layouts(query, key, value),
                window=self.window_of(layer),
                sink=sink,
                cu_seqlens=self.documents,
                backend=self._backend,
            )

    def window_of(self, layer: int) -> int:
        """Tokens that a query of this layer sees in its window."""
        return self.config.architecture.window

    def _run(self, attend: Callable[..., Any], *tensors: Tensor | None) -> Any:
        """`attend(again, *tensors)`, recomputed in the backward pass with selective recompute."""
        if self.training and self.config.recompute_granularity == "selective":
            return recomputed(attend, *tensors)
        return attend(self.again, *tensors)

    def prepared(self, shared: Shared) -> SharedAttention:
        """With the selection as kernels walk it, and the sum of its readers' gradients."""
        shared = cast(SharedAttention, shared)
        assert shared.block_indices is not None
        with record_function(SPARSE_ATTENTION):
            lists = prepare_selection(
                shared.block_indices,
                self.config.num_attention_heads // self.groups.tp.size(),
                block_size=self.config.architecture.block_size,
                cu_seqlens=self.documents,
                backend=self._backend,
            )
        shared = shared._replace(lists=lists)
        recomputes = self.config.recompute_granularity is not None
        if not (self.training and torch.is_grad_enabled()) or recomputes:
            return shared
        gradients = KeyValueGradients()
        # In the kernels' layout, in which the layers will add.
        key, value = gradients.attach(_kernel_layout(shared.key), _kernel_layout(shared.value))
        return shared._replace(
            key=_kernel_layout(key), value=_kernel_layout(value), gradients=gradients
        )


@dataclass(frozen=True, kw_only=True)
class CachedAttend:
    """The tokens of one step of generation, which follow on those in the layers' caches."""

    config: HySparseConfig
    groups: RunGroups
    caches: Sequence[TokenCache | WindowCache]
    """By layer: of all tokens for a full layer, of a window for the others."""
    chunk: Chunk

    def full(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, CachedSelection | None]:
        """See `Attend`."""
        cache = cast(TokenCache, self.caches[layer])
        output, indices = cached_full_attention(
            *_kernel_layouts(query, key, value),
            cache,
            self.chunk,
            **_selection_rule(self.config.architecture, self.groups),
            select=self.config.plan.is_read(layer),
            backend=self.config.architecture.backend.value,
        )
        return output, None if indices is None else CachedSelection(cache, indices)

    def sparse(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: tuple[Tensor, Tensor],
        shared: Shared,
        sinks: Sinks,
    ) -> Tensor:
        """See `Attend`."""
        model = self.config.architecture
        return cached_sparse_attention(
            *_kernel_layouts(query, key, value),
            _kernel_layout(gates[0]),
            _kernel_layout(gates[1]),
            *cast(CachedSelection, shared),
            cast(WindowCache, self.caches[layer]),
            self.chunk,
            block_size=model.block_size,
            window=model.window,
            sparse_sink=sinks[0],
            window_sink=sinks[1],
            backend=model.backend.value,
        )

    def window(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None
    ) -> Tensor:
        """See `Attend`."""
        return cached_window_attention(
            *_kernel_layouts(query, key, value),
            cast(WindowCache, self.caches[layer]),
            self.chunk,
            window=self.config.architecture.window,
            sink=sink,
            backend=self.config.architecture.backend.value,
        )

    def prepared(self, shared: Shared) -> Shared:
        """`shared` as it is: the cache has all that its readers need."""
        return shared
