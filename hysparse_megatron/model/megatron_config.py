"""Our configuration sections translated into megatron-core's transformer configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from hysparse_megatron.architecture.model import Balancing, ModelConfig
from hysparse_megatron.architecture.stages import PipelinePlan, plan_pipeline
from hysparse_megatron.config.schema import (
    Config,
    Precision,
    Recompute,
    RecomputeModule,
    TrainConfig,
)
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.model.layers import LOCAL, LayerChoice, LayerModules, fusions, groups_experts
from hysparse_megatron.model.offload import Offload
from hysparse_megatron.model.sharing import SharedWidths


@dataclass
class HySparseConfig(TransformerConfig):
    """megatron-core's configuration plus what the attention layers and the stack need."""

    plan: PipelinePlan = field(kw_only=True)
    """Kind, oracle and stage of every layer."""
    architecture: ModelConfig = field(kw_only=True)
    """What the layers are."""
    cp_keep_kv: bool = True
    """Whether gathered keys and values are kept for the backward pass."""
    init_seed: int = 0
    """Seed from which all initial weights are derived."""

    compiled_inputs: bool = False
    """Whether torch compiles what makes attention's inputs of the projection: on GPUs the cut into
    parts, and the rotation if Transformer Engine has none for it."""

    grouped_experts: bool = False
    """Whether all experts of a rank run at once, by torch's grouped matrix products; else those of
    Transformer Engine do, or each runs alone. Decided by `layers.groups_experts`."""

    recomputes_norms: bool = False
    """Whether the backward pass makes the outputs of the layers' norms again."""

    offload: Offload | None = None
    """Keeps what layers save for the backward pass in host memory, for all stacks of a rank; None
    keeps it on the device."""

    @property
    def recomputes_attention(self) -> bool:
        """Whether it runs attention alone again."""
        modules = self.recompute_modules or ()
        return self.recompute_granularity == "selective" and "core_attn" in modules

    def recomputes_layer(self, place: int) -> bool:
        """Whether it runs all of a layer again, by its place in its stage."""
        if self.recompute_granularity != "full":
            return False
        return self.recompute_method == "uniform" or place < int(self.recompute_num_layers or 0)

    def is_moe_layer(self, index: int) -> bool:
        """Whether the layer with this index from 0 has experts."""
        frequency = self.moe_layer_freq
        return bool(self.num_moe_experts and isinstance(frequency, list) and frequency[index])

    def groups_per_rank(self) -> int:
        """KV groups on one tensor-parallel rank; 1 where a group is shared by several ranks."""
        return max(1, int(self.num_query_groups or 1) // self.tensor_model_parallel_size)

    def shared_widths(self) -> SharedWidths:
        """Sizes of key, value and indices on one rank."""
        sequence_parallel = self.sequence_parallel and self.tensor_model_parallel_size > 1
        return SharedWidths(
            num_query_groups=self.groups_per_rank(),
            key_dim=self.architecture.head_dim,
            value_dim=self.architecture.value_dim,
            num_selected_blocks=self.architecture.num_selected_blocks,
            tokens_per_row=self.tensor_model_parallel_size if sequence_parallel else 1,
        )

    def payload_width(self, stage: int) -> int:
        """Elements per token row of the tensor that enters `stage` from the stage before it."""
        if self.plan.oracle_into(stage) is None:
            return self.hidden_size
        return self.hidden_size + sum(self.shared_widths().columns(self.pipeline_dtype))


def _point_to_point(vpp: int | None) -> dict[str, bool]:
    """How pipeline neighbours talk.

    With interleaving the next chunk computes while the last one's output travels. A batch of sends
    and receives would wait for it; and where the previous and the next rank are the same process,
    with two ranks, it would silently mix the two directions.
    """
    interleaved = vpp is not None
    return {"overlap_p2p_comm": interleaved, "batch_p2p_comm": not interleaved}


_MODULES = {
    RecomputeModule.attention: "core_attn",
    RecomputeModule.feed_forward: "mlp",
    RecomputeModule.experts: "moe",
}
"""megatron-core's names; for its recompute of norms it needs Transformer Engine and a compiler."""


def _recompute(train: TrainConfig, layers: LayerChoice) -> dict[str, object]:
    """Raises ConfigError for norms that are part of linear layers."""
    if train.recompute is Recompute.full:
        some = train.recompute_layers
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform" if some is None else "block",
            "recompute_num_layers": 1 if some is None else some,
        }
    if train.recompute is Recompute.none:
        return {}
    is_fused = LayerModules.of(layers).norm_and_column_linear is not None
    if is_fused and train.recomputes(RecomputeModule.norm):
        raise ConfigError(
            "train.recompute_modules: norm, but Transformer Engine's norms are part of its linear "
            "layers; leave it out, or take model.layers=local"
        )
    chosen = [_MODULES[module] for module in train.recompute_modules if module in _MODULES]
    return {
        "recompute_granularity": "selective",
        "recompute_modules": chosen,
    }


_BALANCING = {
    Balancing.none: "none",
    Balancing.bias: "none",
    Balancing.aux_loss: "aux_loss",
    Balancing.sequence_aux_loss: "seq_aux_loss",
}


def _experts(model: ModelConfig, num_layers: int) -> dict[str, object]:
    """megatron-core's settings of a mixture of experts; none for a dense model."""
    moe = model.moe
    if moe.num_experts == 0:
        return {}
    by_bias = moe.balancing is Balancing.bias
    with_loss = not by_bias and moe.balancing is not Balancing.none
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(model.is_moe_layer(layer)) for layer in range(num_layers)],
        "moe_ffn_hidden_size": model.expert_width,
        "moe_shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size or None,
        "moe_router_topk": moe.num_active_experts,
        "moe_router_score_function": moe.router_score.value,
        # Scores and the weighted sum in fp32: with hundreds of experts bf16 has too many ties.
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": None if moe.router_scaling == 1.0 else moe.router_scaling,
        "moe_router_load_balancing_type": _BALANCING[moe.balancing],
        "moe_aux_loss_coeff": moe.aux_loss_coefficient if with_loss else 0.0,
        "moe_router_enable_expert_bias": by_bias,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_z_loss_coeff": moe.z_loss_coefficient or None,
        "moe_token_dispatcher_type": "alltoall",
    }


def _offload(train: TrainConfig) -> Offload | None:
    return Offload(train.offload_min_bytes) if train.offload_activations else None


def make_megatron_config(config: Config, layers: LayerChoice = LOCAL) -> HySparseConfig:
    """The configuration that all layers of all stages are built from.

    Layers are built without initial weights, on the CUDA device if `layers` are for one: draw them
    with `initialization.draw_weights`, or load them.
    """
    model: ModelConfig = config.model
    parallel = config.parallel
    dtype = torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32
    plan = plan_pipeline(model.layout, parallel.pp, parallel.vpp)
    num_layers = plan.layout.num_layers
    return HySparseConfig(
        num_layers=num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=0.0,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        expert_model_parallel_size=parallel.ep,
        # An expert is never split: tokens travel to it, also between tensor-parallel ranks.
        expert_tensor_parallel_size=1,
        **_experts(model, num_layers),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        # `initialization.draw_weights` does it, where they are built.
        perform_initialization=False,
        use_cpu_initialization=not layers.on_cuda,
        masked_softmax_fusion=False,
        deterministic_mode=config.debug.deterministic,
        **fusions(layers, model, config.debug.deterministic),
        **_point_to_point(parallel.vpp),
        **_recompute(config.train, layers),
        compiled_inputs=layers.on_cuda,
        grouped_experts=groups_experts(layers, model, dtype),
        recomputes_norms=config.train.recomputes(RecomputeModule.norm),
        offload=_offload(config.train),
        plan=plan,
        architecture=model,
        cp_keep_kv=parallel.cp_keep_kv,
        init_seed=config.train.seed,
    )
