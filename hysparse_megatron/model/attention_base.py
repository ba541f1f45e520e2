"""What the three attention layers have in common: projections, rotation, sinks, checkpoints.

Shapes: S sequence, B batch, HQ query heads and HKV KV groups on this rank, D query/key head dim,
DV value head dim, C channels, T tensor-parallel size.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from hysparse_megatron.model.attend import Attend, Projected
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.norm import RMSNorm
from hysparse_megatron.model.projection import GroupedProjection
from hysparse_megatron.model.rotary import Rotation
from hysparse_megatron.model.sharing import Shared
from hysparse_megatron.runtime.process_groups import RunGroups


@dataclass
class AttentionSubmodules:
    """What an attention layer is built of."""

    linear_qkv: type
    linear_proj: type
    head_norm: type
    """Of queries and keys, if the model has such norms."""


class BaseAttention(MegatronModule):
    """What the three layers have in common: projections, rotation, sinks, checkpoints."""

    def __init__(
        self,
        config: HySparseConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        pg_collection: RunGroups,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.config: HySparseConfig = config
        self.layer_number = layer_number
        self.index = layer_number - 1
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        described = config.architecture.attention(config.plan.layout.kinds[self.index])
        self.linear_qkv = GroupedProjection(
            config, submodules.linear_qkv, described.parts, pg_collection
        )
        self.linear_proj = submodules.linear_proj(
            described.output_width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )
        self.q_layernorm: RMSNorm | None = None
        self.k_layernorm: RMSNorm | None = None
        if config.qk_layernorm:
            # megatron-core sums the gradients of parameters with these names over tensor ranks.
            width = config.architecture.head_dim
            self.q_layernorm = submodules.head_norm(config, width, config.layernorm_epsilon)
            self.k_layernorm = submodules.head_norm(config, width, config.layernorm_epsilon)
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.sink_names = described.sinks
        for sink in self.sink_names:
            # One logit per head, in fp32 whatever the model's precision, split like the heads.
            parameter = torch.nn.Parameter(torch.zeros(heads, dtype=torch.float32))
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            parameter.is_sink = True  # type: ignore[attr-defined] # a parameter group of its own
            self.register_parameter(sink, parameter)

    def forward(
        self,
        hidden_states: Tensor,
        shared: Shared | None,
        rotary_pos_emb: Tensor | None,
        attend: Attend,
    ) -> tuple[tuple[Tensor, Tensor | None], Shared | None]:
        """[S / T or S, B, C] -> ((output of the same shape, no bias), what is shared or None).

        A layer that is no oracle returns `shared` untouched.
        """
        parts = self.linear_qkv(hidden_states)
        own = Projected(*self._query_and_key(parts, rotary_pos_emb), parts["value"])
        attention, shared = self._attend(own, parts, shared, attend)
        return self.linear_proj(attention.transpose(0, 1).flatten(2)), shared

    @abc.abstractmethod
    def _attend(
        self, own: Projected, parts: dict[str, Tensor], shared: Shared | None, attend: Attend
    ) -> tuple[Tensor, Shared | None]:
        """Attention [B, S, HQ, DV] of what the layer has projected, and what is shared after it."""

    def _query_and_key(
        self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Normalised (if so configured) and rotated query [S, B, HQ, D] and key [S, B, HKV, D]."""
        query, key = parts["query"], parts["key"]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if rotary_pos_emb is None:
            return query, key
        if self.config.apply_rope_fusion:
            return tuple(  # type: ignore[return-value]
                apply_rotary_pos_emb(tensor, rotary_pos_emb, self.config, cp_group=self.cp_group)
                for tensor in (query, key)
            )
        turn = (*rotary_pos_emb.unbind(), self.config.compiled_inputs)
        return Rotation.apply(query, *turn), Rotation.apply(key, *turn)

    def _sinks(self) -> list[Tensor | None]:
        """Learnable sinks [HQ], by branch; a single one serves all branches, None without any."""
        return [getattr(self, name) for name in self.sink_names] or [None]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Sinks are split over tensor-parallel ranks along their heads; the rest is as usual."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return result | make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name) for name in self.sink_names},
            prefix,
            tensor_parallel_layers_axis_map=dict.fromkeys(self.sink_names, 0),
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
