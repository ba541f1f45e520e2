"""The three attention layers: full (the oracle), sparse, and sliding window only.

Each is a self-attention in megatron-core's sense, built from a `ModuleSpec`, with two differences:
`forward` takes and returns what oracle and sparse layers share, as arguments and results, and the
attention math comes from `hysparse_kernels`.

Shapes: S sequence, B batch, HQ query heads and HKV KV groups on this rank, D query/key head dim,
DV value head dim, K selected blocks, C channels, T tensor-parallel size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from hysparse_kernels import (
    BlockLists,
    KeyValueGradients,
    block_sparse_attention,
    gated_sum,
    oracle_attention,
    sliding_window_attention,
)
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from hysparse_megatron.config.schema import FullGate, GateKind, SinkKind
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.norm import RMSNorm
from hysparse_megatron.model.projection import GroupedProjection, Part
from hysparse_megatron.model.sharing import SharedAttention
from hysparse_megatron.runtime.process_groups import groups_sharing_a_kv_head


@dataclass
class AttentionSubmodules:
    """The linear layers of an attention layer, from megatron-core or Transformer Engine."""

    linear_qkv: type
    linear_proj: type


class _Attention(MegatronModule):
    """What the three layers have in common: projections, rotation, recompute, checkpoints."""

    def __init__(
        self,
        config: HySparseConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.config: HySparseConfig = config
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.linear_qkv = GroupedProjection(
            config, submodules.linear_qkv, self._parts(config), pg_collection
        )
        self.linear_proj = submodules.linear_proj(
            config.num_attention_heads * config.value_dim,
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
            self.q_layernorm = RMSNorm(
                config, int(config.kv_channels or 0), config.layernorm_epsilon
            )
            self.k_layernorm = RMSNorm(
                config, int(config.kv_channels or 0), config.layernorm_epsilon
            )
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.sink_names = self._sinks(config)
        for sink in self.sink_names:
            # One logit per head, in fp32 whatever the model's precision, split like the heads.
            parameter = torch.nn.Parameter(torch.zeros(heads, dtype=torch.float32))
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            parameter.is_sink = True  # type: ignore[attr-defined] # a parameter group of its own
            self.register_parameter(sink, parameter)

    @staticmethod
    def _parts(config: HySparseConfig) -> tuple[Part, ...]:
        """What the input projection computes."""
        head_dim = int(config.kv_channels or 0)
        return (
            Part("query", head_dim, per_head=True),
            Part("key", head_dim, per_head=False),
            Part("value", config.value_dim, per_head=False),
        )

    @staticmethod
    def _sinks(config: HySparseConfig) -> tuple[str, ...]:
        """Names of the learnable sinks."""
        return ()

    def _query_and_key(
        self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Normalised (if so configured) and rotated query [S, B, HQ, D] and key [S, B, HKV, D]."""
        query, key = parts["query"], parts["key"]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if rotary_pos_emb is None:
            return query, key
        return tuple(  # type: ignore[return-value]
            apply_rotary_pos_emb(tensor, rotary_pos_emb, config=self.config, cp_group=self.cp_group)
            for tensor in (query, key)
        )

    def _run(self, attend, *tensors: Tensor | None):
        """`attend(*tensors)`, recomputed in the backward pass with selective recompute."""
        if self.training and self.config.recompute_granularity == "selective":
            return tensor_parallel.checkpoint(attend, False, *tensors)
        return attend(*tensors)

    def _project(self, attention: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, S, HQ, DV] -> [S / T or S, B, C] and no bias."""
        return self.linear_proj(attention.transpose(0, 1).flatten(2))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict | None = None,
    ) -> dict:
        """Sinks are split over tensor-parallel ranks along their heads; the rest is as usual."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result = make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name) for name in self.sink_names},
            prefix,
            tensor_parallel_layers_axis_map=dict.fromkeys(self.sink_names, 0),
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            result.update(
                sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        return result


def _kernel_layout(tensor: Tensor) -> Tensor:
    """megatron-core's [S, B, heads, width] seen as the kernels' [B, S, heads, width]."""
    return tensor.transpose(0, 1)


class FullAttention(_Attention):
    """Causal full attention that also picks, for every query, the blocks its sparse layers read.

    HySparse (arXiv 2602.03560) Eq. 1-3. Key, value and the picks are returned for sharing if any
    layer reads them. With `full_gate` a sigmoid gate scales the output per head or channel (gated
    attention, arXiv 2505.06708), as in the paper's 80B full-attention baseline.
    """

    @staticmethod
    def _parts(config: HySparseConfig) -> tuple[Part, ...]:
        parts = _Attention._parts(config)
        if config.full_gate is FullGate.none:
            return parts
        width = 1 if config.full_gate is FullGate.head else config.value_dim
        return (*parts, Part("gate", width, per_head=True))

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
        shared: SharedAttention | None,
        rotary_pos_emb: Tensor | None,
        documents: Tensor | None = None,
        select: bool = True,
    ) -> tuple[tuple[Tensor, Tensor | None], SharedAttention | None]:
        """[S / T or S, B, C] -> ((output of the same shape, no bias), what is shared or None).

        `shared` of an earlier oracle is not used. With `select=False` (activation recompute, whose
        first pass has already made the selection) the shared indices are None.
        """
        parts = self.linear_qkv(hidden_states)
        query, key = self._query_and_key(parts, rotary_pos_emb)
        value = parts["value"]
        if self.is_read:
            # Copies, because views would keep the whole fused projection alive with them.
            key, value = key.contiguous(), value.contiguous()
        attend = self._attend_and_select(documents, select and self.is_read)
        attention, indices = self._run(attend, query, key, value)
        if "gate" in parts:
            attention = (_gate(parts["gate"]) * attention).to(query.dtype)
        output = self._project(attention)
        return output, SharedAttention(key, value, indices) if self.is_read else None

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
                block_size=self.config.block_size,
                num_selected=self.config.num_selected_blocks,
                reduce_scores=self._reduce_scores if self.score_group is not None else None,
                forced_first_blocks=self.config.forced_first_blocks,
                forced_recent_blocks=self.config.forced_recent_blocks,
                select=select and not second_time,
                cu_seqlens=documents,
                backend=self.config.attention_backend_name,
            )
            return result.output, result.block_indices

        return attend

    def _reduce_scores(self, scores: Tensor) -> Tensor:
        torch.distributed.all_reduce(
            scores, op=torch.distributed.ReduceOp.MAX, group=self.score_group
        )
        return scores


class WindowAttention(_Attention):
    """Sliding-window attention with a sink per head: Eq. 5, the hybrid baseline's layer."""

    @staticmethod
    def _sinks(config: HySparseConfig) -> tuple[str, ...]:
        return () if config.sink is SinkKind.none else ("window_sink",)

    def forward(
        self,
        hidden_states: Tensor,
        shared: SharedAttention | None,
        rotary_pos_emb: Tensor | None,
        documents: Tensor | None = None,
        select: bool = True,
    ) -> tuple[tuple[Tensor, Tensor | None], SharedAttention | None]:
        """[S / T or S, B, C] -> ((output of the same shape, no bias), `shared` untouched)."""
        parts = self.linear_qkv(hidden_states)
        query, key = self._query_and_key(parts, rotary_pos_emb)
        sink = self.window_sink if self.sink_names else None
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
            window=self.config.window,
            sink=sink,
            cu_seqlens=documents,
            backend=self.config.attention_backend_name,
        )


_SINKS = {
    SinkKind.branch: ("sparse_sink", "window_sink"),
    SinkKind.shared: ("shared_sink",),
    SinkKind.none: (),
}


class SparseAttention(_Attention):
    """Two gated branches with one query: the oracle's blocks, and a window of its own (Eq. 4-9)."""

    @staticmethod
    def _parts(config: HySparseConfig) -> tuple[Part, ...]:
        gate_width = 1 if config.gate is GateKind.head else config.value_dim
        return (
            *_Attention._parts(config),
            Part("sparse_gate", gate_width, per_head=True),
            Part("window_gate", gate_width, per_head=True),
        )

    @staticmethod
    def _sinks(config: HySparseConfig) -> tuple[str, ...]:
        return _SINKS[config.sink]

    def forward(
        self,
        hidden_states: Tensor,
        shared: SharedAttention | None,
        rotary_pos_emb: Tensor | None,
        documents: Tensor | None = None,
        select: bool = True,
    ) -> tuple[tuple[Tensor, Tensor | None], SharedAttention | None]:
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
        backend = self.config.attention_backend_name
        sparse = block_sparse_attention(
            _kernel_layout(query),
            _kernel_layout(key),
            _kernel_layout(value),
            block_indices,
            block_size=self.config.block_size,
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
            window=self.config.window,
            sink=window_sink,
            cu_seqlens=documents,
            backend=backend,
        )
        gates = (_kernel_layout(sparse_gate), _kernel_layout(window_gate))
        return gated_sum(sparse, window, *gates, backend=backend).to(query.dtype)


def _gate(logits: Tensor) -> Tensor:
    """Sigmoid in fp32 of gate logits [S, B, HQ, 1 or DV], in the kernels' layout (Eq. 8)."""
    return torch.sigmoid(_kernel_layout(logits).float())
