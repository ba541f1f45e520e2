"""Megatron-core layer specs: which modules make up each kind of layer.

A spec names classes only; swap one to swap an implementation. Here all of them are megatron-core's
local layers, our attention and our norm.
"""

from __future__ import annotations

import functools

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from hysparse_megatron.layout import LayerKind
from hysparse_megatron.model.attention import (
    AttentionSubmodules,
    FullAttention,
    SparseAttention,
    WindowAttention,
)
from hysparse_megatron.model.experts import moe_layer
from hysparse_megatron.model.layer import HySparseLayer
from hysparse_megatron.model.norm import RMSNorm
from hysparse_megatron.model.stack import HySparseStack, HySparseStackSubmodules

_ATTENTION = {
    LayerKind.FULL: FullAttention,
    LayerKind.SPARSE: SparseAttention,
    LayerKind.WINDOW: WindowAttention,
}


def layer_spec(kind: LayerKind, has_experts: bool) -> ModuleSpec:
    """The spec of one transformer layer, with a dense SwiGLU feed-forward or a mixture of them."""
    dense = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=HySparseLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=_ATTENTION[kind],
                submodules=AttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, linear_proj=RowParallelLinear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=moe_layer() if has_experts else dense,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def stack_spec() -> ModuleSpec:
    """The spec of the decoder: `HybridModel(hybrid_stack_spec=stack_spec(), ...)`."""
    return ModuleSpec(
        module=HySparseStack,
        submodules=HySparseStackSubmodules(
            layers={
                (kind, has_experts): layer_spec(kind, has_experts)
                for kind in LayerKind
                for has_experts in (False, True)
            },
            final_norm=RMSNorm,
        ),
    )
