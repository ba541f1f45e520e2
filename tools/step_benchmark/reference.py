"""The full layout in megatron-core's own layers: Transformer Engine's where it can be imported."""

from __future__ import annotations

import copy

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.profiler import record_function

from hysparse_megatron.architecture.parameters import padded_vocab_size
from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.layers import LayerChoice
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.rotary import rotary_frequencies
from hysparse_megatron.runtime import megatron_on_cpu
from hysparse_megatron.runtime.annotations import LOSS
from hysparse_megatron.runtime.random import seed_step


def has_transformer_engine() -> bool:
    """Whether megatron-core's Transformer Engine layers can be built here."""
    if megatron_on_cpu.is_active():
        return False
    try:
        import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def describe() -> str:
    """Which of its layers run."""
    name = "Transformer Engine" if has_transformer_engine() else "local"
    return f"megatron-core's GPTModel, {name} layers"


class _ReferenceModel(GPTModel):
    """Names its loss in traces, as ours does."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        with record_function(LOSS):
            return super().compute_language_model_loss(labels, logits)


def build_reference_chunks(
    config: Config,
    megatron: HySparseConfig,
    vocab_size: int,
    groups: ProcessGroupCollection,
    _layers: LayerChoice,
) -> list[GPTModel]:
    """What stands in for `model.builder.build_chunks`; all else is built as in training."""
    model = config.model
    own = _as_by_default(megatron)
    # Layers that draw their weights on the GPU ask for its random streams.
    seed_step(config.train.seed, 0, groups)
    chunk = _ReferenceModel(
        config=own,
        transformer_layer_spec=_layer_spec(own),
        vocab_size=padded_vocab_size(vocab_size),
        max_sequence_length=config.train.seq_length,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        pg_collection=groups,
    )
    chunk.rotary_pos_emb.inv_freq = rotary_frequencies(model)
    return [chunk]


def _as_by_default(megatron: HySparseConfig) -> HySparseConfig:
    """With what megatron-core does by default and our layers may not: fusions, weights on the GPU.

    On the CPU neither: fused functions are compiled, which its adaptation there does not reach.
    """
    own = copy.copy(megatron)
    on_gpu = not megatron_on_cpu.is_active()
    own.use_cpu_initialization = not on_gpu
    own.perform_initialization = True
    own.bias_activation_fusion = on_gpu
    own.bias_dropout_fusion = on_gpu
    own.apply_rope_fusion = has_transformer_engine()
    own.cross_entropy_loss_fusion = on_gpu
    own.cross_entropy_fusion_impl = "te" if has_transformer_engine() else "native"
    own.moe_grouped_gemm = has_transformer_engine() and bool(own.num_moe_experts)
    return own


def _layer_spec(megatron: HySparseConfig) -> ModuleSpec:
    if has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=megatron.num_moe_experts,
            moe_grouped_gemm=megatron.moe_grouped_gemm,
            qk_layernorm=megatron.qk_layernorm,
        )
    return get_gpt_layer_local_spec(
        num_experts=megatron.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=megatron.qk_layernorm,
        normalization="RMSNorm",
    )
