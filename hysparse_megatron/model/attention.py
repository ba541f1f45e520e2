"""The three attention layers: full (the oracle), sparse, and sliding window only.

Each is a self-attention in megatron-core's sense, built from a `ModuleSpec`, with two differences:
`forward` takes and returns what oracle and sparse layers share, as arguments and results, and the
attention math comes from `hysparse_kernels`. With a `step` of generation the math reads and
extends the layer's cache, and nothing else changes.

Shapes: S sequence, B batch, HQ query heads and HKV KV groups on this rank, D query/key head dim,
DV value head dim, K selected blocks, C channels, T tensor-parallel size.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from hysparse_kernels import (
    BlockLists,
    KeyValueGradients,
    TokenCache,
    WindowCache,
    block_sparse_attention,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
    gated_sum,
    oracle_attention,
    sliding_window_attention,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hysparse_megatron.model.attention_base import AttentionSubmodules, BaseAttention
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.sharing import CachedSelection, CachedStep, Shared, SharedAttention
from hysparse_megatron.runtime.process_groups import groups_sharing_a_kv_head


def _kernel_layout(tensor: Tensor) -> Tensor:
    """megatron-core's [S, B, heads, width] seen as the kernels' [B, S, heads, width]."""
    return tensor.transpose(0, 1)


class FullAttention(BaseAttention):
    """Causal full attention that also picks, for every query, the blocks its sparse layers read.

    HySparse (arXiv 2602.03560) Eq. 1-3. Key, value and the picks are returned for sharing if any
    layer reads them. With `full_gate` a sigmoid gate scales the output per head or channel (gated
    attention, arXiv 2505.06708), as in the paper's 80B full-attention baseline.
    """

    def __init__(
        self,
        config: HySparseConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **kwargs,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        self.is_read = config.plan.is_read(layer_number - 1)
        # With fewer KV groups than ranks each rank sees some heads of its group only, and all
        # must agree on the blocks: the scores are reduced over these ranks before the top-k.
        self.score_group = groups_sharing_a_kv_head(
            self.tp_group, int(config.num_query_groups or 1)
        )

    def forward(
        self,
        hidden_states: Tensor,
        shared: Shared | None,
        rotary_pos_emb: Tensor | None,
        documents: Tensor | None = None,
        select: bool = True,
        step: CachedStep | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], Shared | None]:
        """[S / T or S, B, C] -> ((output of the same shape, no bias), what is shared or None).

        `shared` of an earlier oracle is not used. With `select=False` (activation recompute, whose
        first pass has already made the selection) the shared indices are None.
        """
        parts = self.linear_qkv(hidden_states)
        query, key = self._query_and_key(parts, rotary_pos_emb)
        value = parts["value"]
        if step is not None:
            attention, selection = self._attend_cached(step, query, key, value)
            return self._project(self._gated(attention, parts)), selection
        if self.is_read:
            # Copies, because views would keep the whole fused projection alive with them.
            key, value = key.contiguous(), value.contiguous()
        attend = self._attend_and_select(documents, select and self.is_read)
        attention, indices = self._run(attend, query, key, value)
        output = self._project(self._gated(attention, parts))
        return output, SharedAttention(key, value, indices) if self.is_read else None

    def _gated(self, attention: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """`attention` [B, S, HQ, DV] scaled by its gate, if the layer has one."""
        if "gate" not in parts:
            return attention
        return (_gate(parts["gate"]) * attention).to(attention.dtype)

    def _attend_and_select(self, documents: Tensor | None, select: bool):
        recomputed = self.training and self.config.recompute_granularity == "selective"

        def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
            # Activation recompute runs this a first time without and a second time with gradient.
            # A selection is made once, so that recompute cannot change it.
            second_time = recomputed and torch.is_grad_enabled()
            result = oracle_attention(
                _kernel_layout(query),
                _kernel_layout(key),
                _kernel_layout(value),
                **self._selection_rule(),
                select=select and not second_time,
                cu_seqlens=documents,
                backend=self.config.architecture.backend.value,
            )
            return result.output, result.block_indices

        return attend

    def _attend_cached(
        self, step: CachedStep, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, CachedSelection | None]:
        """Attention of a step's tokens [B, S, HQ, DV], and what the sparse layers read."""
        cache = cast(TokenCache, step.cache)
        output, indices = cached_full_attention(
            _kernel_layout(query),
            _kernel_layout(key),
            _kernel_layout(value),
            cache,
            step.chunk,
            **self._selection_rule(),
            select=self.is_read,
            backend=self.config.architecture.backend.value,
        )
        return output, None if indices is None else CachedSelection(cache, indices)

    def _selection_rule(self) -> dict[str, Any]:
        """The same in training and generation."""
        return {
            "block_size": self.config.architecture.block_size,
            "num_selected": self.config.architecture.num_selected_blocks,
            "reduce_scores": self._reduce_scores if self.score_group is not None else None,
            "forced_first_blocks": self.config.architecture.forced_first_blocks,
            "forced_recent_blocks": self.config.architecture.forced_recent_blocks,
        }

    def _reduce_scores(self, scores: Tensor) -> Tensor:
        torch.distributed.all_reduce(
            scores, op=torch.distributed.ReduceOp.MAX, group=self.score_group
        )
        return scores


class WindowAttention(BaseAttention):
    """Sliding-window attention with a sink per head: Eq. 5, the hybrid baseline's layer."""

    def forward(
        self,
        hidden_states: Tensor,
        shared: Shared | None,
        rotary_pos_emb: Tensor | None,
        documents: Tensor | None = None,
        select: bool = True,
        step: CachedStep | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], Shared | None]:
        """[S / T or S, B, C] -> ((output of the same shape, no bias), `shared` untouched)."""
        parts = self.linear_qkv(hidden_states)
        query, key = self._query_and_key(parts, rotary_pos_emb)
        sink = self.window_sink if self.sink_names else None
        if step is not None:
            attention = cached_window_attention(
                _kernel_layout(query),
                _kernel_layout(key),
                _kernel_layout(parts["value"]),
                cast(WindowCache, step.cache),
                step.chunk,
                window=self.config.architecture.window,
                sink=sink,
                backend=self.config.architecture.backend.value,
            )
            return self._project(attention), shared
        attend = functools.partial(self._attend, documents)
        attention = self._run(attend, query, key, parts["value"], sink)
        return self._project(attention), shared

    def _attend(
        self,
        documents: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
    ) -> Tensor:
        return sliding_window_attention(
            _kernel_layout(query),
            _kernel_layout(key),
            _kernel_layout(value),
            window=self.config.architecture.window,
            sink=sink,
            cu_seqlens=documents,
            backend=self.config.architecture.backend.value,
        )


class SparseAttention(BaseAttention):
    """Two gated branches with one query: the oracle's blocks, and a window of its own (Eq. 4-9)."""

    def forward(
        self,
        hidden_states: Tensor,
        shared: Shared | None,
        rotary_pos_emb: Tensor | None,
        documents: Tensor | None = None,
        select: bool = True,
        step: CachedStep | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], Shared | None]:
        """[S / T or S, B, C] -> ((output of the same shape, no bias), `shared` untouched).

        Raises ValueError if no oracle has shared anything: the layer has nothing to read.
        """
        if shared is None:
            raise ValueError(
                f"sparse layer {self.layer_number - 1} got no key, value and indices of an oracle"
            )
        parts = self.linear_qkv(hidden_states)
        query, key = self._query_and_key(parts, rotary_pos_emb)
        sinks = [getattr(self, name) for name in self.sink_names] or [None]
        if step is not None:
            selection = cast(CachedSelection, shared)
            attention = self._attend_cached(step, selection, parts, query, key, sinks)
            return self._project(attention), shared
        shared = cast(SharedAttention, shared)
        attention = self._run(
            functools.partial(self._attend, documents, shared.lists, shared.gradients),
            query,
            key,
            parts["value"],
            parts["sparse_gate"],
            parts["window_gate"],
            *shared.tensors,
            sinks[0],
            sinks[-1],
        )
        return self._project(attention), shared

    def _attend(
        self,
        documents: Tensor | None,
        lists: BlockLists | None,
        gradients: KeyValueGradients | None,
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
        """Gated sum of both branches, [B, S, HQ, DV]; gates [S, B, HQ, 1 or DV]."""
        backend = self.config.architecture.backend.value
        sparse = block_sparse_attention(
            _kernel_layout(query),
            _kernel_layout(key),
            _kernel_layout(value),
            block_indices,
            block_size=self.config.architecture.block_size,
            sink=sparse_sink,
            lists=lists,
            accumulate=gradients,
            cu_seqlens=documents,
            backend=backend,
        )
        window = sliding_window_attention(
            _kernel_layout(query),
            _kernel_layout(window_key),
            _kernel_layout(window_value),
            window=self.config.architecture.window,
            sink=window_sink,
            cu_seqlens=documents,
            backend=backend,
        )
        gates = (_kernel_layout(sparse_gate), _kernel_layout(window_gate))
        return gated_sum(sparse, window, *gates, backend=backend).to(query.dtype)

    def _attend_cached(
        self,
        step: CachedStep,
        selection: CachedSelection,
        parts: dict[str, Tensor],
        query: Tensor,
        window_key: Tensor,
        sinks: list[Tensor | None],
    ) -> Tensor:
        """`_attend` of a step's tokens."""
        return cached_sparse_attention(
            _kernel_layout(query),
            _kernel_layout(window_key),
            _kernel_layout(parts["value"]),
            _kernel_layout(parts["sparse_gate"]),
            _kernel_layout(parts["window_gate"]),
            *selection,
            cast(WindowCache, step.cache),
            step.chunk,
            block_size=self.config.architecture.block_size,
            window=self.config.architecture.window,
            sparse_sink=sinks[0],
            window_sink=sinks[-1],
            backend=self.config.architecture.backend.value,
        )


def _gate(logits: Tensor) -> Tensor:
    """Sigmoid in fp32 of gate logits [S, B, HQ, 1 or DV], in the kernels' layout (Eq. 8)."""
    return torch.sigmoid(_kernel_layout(logits).float())
