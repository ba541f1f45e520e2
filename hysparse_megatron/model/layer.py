"""One transformer layer that passes on what oracles share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from hysparse_megatron.model.attend import Attend, TrainingAttend
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.remade import remade
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
        """[S / T or S, B, C] and what the last oracle shared -> the same pair after this layer.

        `rotary_pos_emb`: cosines and sines [2, S, 1 or B, 1, D], or angles [S, 1, 1, D] with
        `apply_rope_fusion`.
        """
        with self._remade(self.input_layernorm, attend):
            normed = self.input_layernorm(hidden_states)
            attention, shared = self.self_attention(normed, shared, rotary_pos_emb, attend)
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add(attention, hidden_states, self.hidden_dropout)
        with self._remade(self.pre_mlp_layernorm, attend):
            output = self._forward_mlp(hidden_states)
        return output, shared

    def _remade(self, norm: torch.nn.Module, attend: Attend) -> AbstractContextManager[None]:
        """Within, what reads the output of `norm` keeps it, or nothing that is made again."""
        if cast(HySparseConfig, self.config).recomputes_norms and self.training:
            return remade(norm, cast(TrainingAttend, attend).regather.keep)
        return nullcontext()
