"""The three attention layers: full (the oracle), sparse, and sliding window only.

Each is a self-attention in megatron-core's sense, built from a `ModuleSpec`, with two differences:
what oracle and sparse layers share comes and goes as arguments and results, and the attention math
is that of an `Attend`, of training or of generation. attention_base.py has what all three do.

Shapes: S sequence, B batch, HQ query heads and HKV KV groups on this rank, D query/key head dim,
DV value head dim, C channels, T tensor-parallel size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.model.attend import Attend, Branches, Projected
from hysparse_megatron.model.attention_base import BaseAttention
from hysparse_megatron.model.sharing import Shared


class FullAttention(BaseAttention):
    """Causal full attention that also selects, for every query, the blocks its sparse layers read.

    HySparse (arXiv 2602.03560) Eq. 1-3. Key, value and selection are returned for sharing if any
    layer reads them; what an earlier oracle shared is not used. With `full_gate` a sigmoid gate
    scales the output per head or channel (gated attention, arXiv 2505.06708), as in the paper's 80B
    full-attention baseline.
    """

    def _attend(
        self, own: Projected, parts: dict[str, Tensor], shared: Shared | None, attend: Attend
    ) -> tuple[Tensor, Shared | None]:
        attention, shared = attend.full(self.index, own)
        if "gate" in parts:
            # Sigmoid in fp32 of logits [S, B, HQ, 1 or DV], in the kernels' layout (Eq. 8).
            gate = torch.sigmoid(parts["gate"].transpose(0, 1).float())
            attention = (gate * attention).to(attention.dtype)
        return attention, shared


class WindowAttention(BaseAttention):
    """Sliding-window attention with a sink per head: Eq. 5, the hybrid baseline's layer."""

    def _attend(
        self, own: Projected, parts: dict[str, Tensor], shared: Shared | None, attend: Attend
    ) -> tuple[Tensor, Shared | None]:
        return attend.window(self.index, own, self._sinks()[0]), shared


class SparseAttention(BaseAttention):
    """Two gated branches with one query: the oracle's blocks, and a window of its own (Eq. 4-9).

    Raises ValueError if no oracle has shared anything: the layer has nothing to read.
    """

    def _attend(
        self, own: Projected, parts: dict[str, Tensor], shared: Shared | None, attend: Attend
    ) -> tuple[Tensor, Shared | None]:
        if shared is None:
            raise ValueError(
                f"sparse layer {self.index} got no key, value and indices of an oracle"
            )
        gates = (parts["sparse_gate"], parts["window_gate"])
        sinks = self._sinks()
        branches = Branches(gates, (sinks[0], sinks[-1]))
        return attend.sparse(self.index, own, branches, shared), shared


ATTENTION = {
    LayerKind.FULL: FullAttention,
    LayerKind.SPARSE: SparseAttention,
    LayerKind.WINDOW: WindowAttention,
}
"""By the kind of the layer."""
