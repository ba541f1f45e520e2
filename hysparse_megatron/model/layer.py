"""One transformer layer that passes on what oracles share."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from hysparse_megatron.model.attend import Attend
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
        normed = self.input_layernorm(hidden_states)
        attention, shared = self.self_attention(normed, shared, rotary_pos_emb, attend)
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add(attention, hidden_states, self.hidden_dropout)
        return self._forward_mlp(hidden_states), shared
