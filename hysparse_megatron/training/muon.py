"""What megatron-core's Muon must be told about our models.

Muon orthogonalises whole matrices. megatron-core's layer-wise optimizer therefore deals whole
matrices out to the data-parallel ranks, where AdamW's distributed optimizer cuts anywhere. Both run
side by side: the layer-wise one for the hidden matrices (weights of linear layers, experts and
routers included), the distributed one for embeddings, output projection, norms and sinks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.layer_wise_optimizer import (
    LayerWiseDistributedOptimizer,
    tag_params_for_buffer_routing,
)
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.config.schema import MuonConfig
from hysparse_megatron.model.projection import GroupedProjection


def megatron_settings(muon: MuonConfig) -> dict[str, object]:
    """Arguments of megatron-core's `OptimizerConfig`."""
    return {
        "muon_momentum": muon.momentum,
        "muon_nesterov": muon.nesterov,
        "muon_num_ns_steps": muon.num_ns_steps,
        "muon_coefficient_type": muon.coefficients.value,
        "muon_scale_mode": muon.scale_mode.value,
        "muon_extra_scale_factor": muon.extra_scale_factor,
        "muon_fp32_matmul_prec": muon.matmul_precision.value,
        "muon_tp_mode": muon.tp_mode.value,
        "muon_split_qkv": muon.split_qkv,
    }


def matrix_layouts(
    models: Sequence[torch.nn.Module],
    ddp_config: DistributedDataParallelConfig,
    groups: ProcessGroupCollection,
) -> list[FullParamLayout]:
    """Where the gradient buffers of each model chunk hold what, no matrix cut in two.

    Marks the parameters, so it comes before the chunks are wrapped for data parallelism.
    """
    tag_params_for_buffer_routing(models)
    return [
        LayerWiseDistributedOptimizer.compute_full_param_layout(
            list(model.parameters()),
            None,
            groups.dp_cp.size(),
            ddp_config,
            expert_data_parallel_world_size=groups.expt_dp.size(),
        )
        for model in models
    ]


def mark_projections(chunks: Sequence[torch.nn.Module]) -> None:
    """Say how the rows of fused input projections are split into matrices.

    Query, key, value and gates are matrices of their own that share an input, and as one their
    updates would depend on each other. megatron-core knows one split for the whole model, of query,
    key and value under another name than ours; but it takes a parameter's own. Ours is of the same
    form, group by group, with the gates behind the value.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, GroupedProjection):
                weight = module.linear.weight
                weight.is_qkv = True
                weight.qkv_split_shapes = module.widths()


def allow_checkpoints_in_fp32(optimizer: MegatronOptimizer) -> None:
    """Make megatron-core save and load the momentum of fp32 weights.

    Its optimizer for bf16, the only one that deals out matrices, looks up names and slices in the
    list of weights that have an fp32 copy. In fp32 none has one; as that list then serves nothing
    else, it may name all.
    """
    for part in matrix_parts(optimizer):
        if not any(part.float16_groups):
            part.float16_groups = part.fp32_from_fp32_groups


def matrix_parts(optimizer: MegatronOptimizer) -> list[Float16OptimizerWithFloat16Params]:
    """Muon's part of `optimizer`; none with AdamW for everything."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else []
    return [
        inner
        for part in parts
        if isinstance(part, LayerWiseDistributedOptimizer)
        for inner in part.chained_optimizers
    ]


def is_matrix(parameter: torch.nn.Parameter) -> bool:
    """Whether Muon updates this parameter; false before `matrix_layouts`."""
    return getattr(parameter, "is_managed_by_layer_wise_optimizer", False)
