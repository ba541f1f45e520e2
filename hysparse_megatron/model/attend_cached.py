"""What attention layers compute with in a step of generation; see attend.py.

A step that brings more than one token to a row, a prompt or a chunk of it, runs on the kernels of
training, which take its tokens for a range of queries among the keys in the cache.

Shapes: S tokens of the step, B sequences, HQ query heads and HKV KV groups on this rank, D
query/key head dim, DV value head dim. Tensors come in megatron-core's layout [S, B, heads, width]
and attention leaves in the kernels', [B, S, HQ, DV].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from hysparse_kernels import (
    Chunk,
    TokenCache,
    WindowCache,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
    prepare_cached_selection,
)
from torch import Tensor

from hysparse_megatron.model.attend import Branches, Projected, kernel_layout, selection_rule
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.sharing import CachedSelection, Shared
from hysparse_megatron.runtime.process_groups import RunGroups


@dataclass(frozen=True, kw_only=True)
class CachedAttend:
    """The tokens of one step of generation, which follow on those in the layers' caches."""

    config: HySparseConfig
    groups: RunGroups
    caches: Sequence[TokenCache | WindowCache]
    """By layer: of all tokens for a full layer, of a window for the others."""
    chunk: Chunk

    def full(self, layer: int, own: Projected) -> tuple[Tensor, CachedSelection | None]:
        """See `Attend`."""
        cache = cast(TokenCache, self.caches[layer])
        output, indices = cached_full_attention(
            *own.in_kernel_layout,
            cache,
            self.chunk,
            **selection_rule(self.config.architecture, self.groups),
            select=self.config.plan.is_read(layer),
            backend=self.config.architecture.backend.value,
        )
        return output, None if indices is None else CachedSelection(cache, indices)

    def sparse(self, layer: int, own: Projected, branches: Branches, shared: Shared) -> Tensor:
        """See `Attend`."""
        model = self.config.architecture
        selection = cast(CachedSelection, shared)
        return cached_sparse_attention(
            *own.in_kernel_layout,
            kernel_layout(branches.gates[0]),
            kernel_layout(branches.gates[1]),
            selection.cache,
            selection.block_indices,
            cast(WindowCache, self.caches[layer]),
            self.chunk,
            block_size=model.block_size,
            window=model.window,
            sparse_sink=branches.sinks[0],
            window_sink=branches.sinks[1],
            prepared=selection.rows,
            backend=model.backend.value,
        )

    def window(self, layer: int, own: Projected, sink: Tensor | None) -> Tensor:
        """See `Attend`."""
        return cached_window_attention(
            *own.in_kernel_layout,
            cast(WindowCache, self.caches[layer]),
            self.chunk,
            window=self.config.architecture.window,
            sink=sink,
            backend=self.config.architecture.backend.value,
        )

    def prepared(self, shared: Shared) -> Shared:
        """With key and value as the readers of a chunk read them, and the selection as kernels walk
        it."""
        selection = cast(CachedSelection, shared)
        if self.chunk.width == 1:
            return selection
        rows = prepare_cached_selection(
            *selection[:2],
            self.chunk,
            query_heads=self.config.num_attention_heads // self.groups.tp.size(),
            dtype=self.config.params_dtype,
            block_size=self.config.architecture.block_size,
            backend=self.config.architecture.backend.value,
        )
        return selection._replace(rows=rows)
