"""One transformer layer that passes on what oracles share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from hysparse_megatron.model.attend import Attend
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.remade import Remade
from hysparse_megatron.model.sharing import Shared


class HySparseLayer(TransformerLayer):
    """megatron-core's layer with `shared` as an explicit argument and result.

    Norms, residual, dropout, feed-forward and checkpoint keys are megatron-core's.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        shared: Shared | None,
        rotary_pos_emb: Tensor | None,
        attend: Attend,
    ) -> tuple[Tensor, Shared | None]:
        """[S / T or S, B, C] and what the last oracle shared -> the same pair after this layer."""
        with self._norm_remade() as apply:
            normed = apply(self.input_layernorm, hidden_states)
            attention, shared = self.self_attention(normed, shared, rotary_pos_emb, attend)
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add(attention, hidden_states, self.hidden_dropout)
        with self._norm_remade() as self._apply_norm:
            output = self._forward_mlp(hidden_states)
        del self._apply_norm
        return output, shared

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        return self._apply_norm(self.pre_mlp_layernorm, hidden_states)

    @contextlib.contextmanager
    def _norm_remade(self) -> Iterator[Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]]:
        """What applies the norm of what is computed within, whose output is kept or made again."""
        if not (cast(HySparseConfig, self.config).recomputes_norms and self.training):
            yield lambda norm, hidden: norm(hidden)
            return
        remade = Remade()
        with remade.watching():
            yield remade.apply
