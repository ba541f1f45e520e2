"""Megatron-core layer specs: which modules make up each kind of layer.

A spec names classes only; swap one to swap an implementation. Attention and the layer around it are
ours, the rest is what `layers.LayerModules` names.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.model.attention import ATTENTION
from hysparse_megatron.model.attention_base import AttentionSubmodules
from hysparse_megatron.model.experts import moe_layer
from hysparse_megatron.model.layer import HySparseLayer
from hysparse_megatron.model.layers import LOCAL, LayerChoice, LayerModules
from hysparse_megatron.model.stack import HySparseStack, HySparseStackSubmodules

_FUSED_NORMS = {
    "self_attention.linear_qkv.linear.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Where a norm lives that is part of a linear layer, and its name in checkpoints."""


def layer_spec(kind: LayerKind, has_experts: bool, modules: LayerModules) -> ModuleSpec:
    """The spec of one transformer layer, with a dense SwiGLU feed-forward or a mixture of them."""
    fused = modules.norm_and_column_linear
    norm: Any = IdentityOp if fused else modules.norm
    after_norm = fused or modules.column_linear
    dense = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=after_norm, linear_fc2=modules.row_linear),
    )
    return ModuleSpec(
        module=HySparseLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=ATTENTION[kind],
                submodules=AttentionSubmodules(
                    linear_qkv=after_norm,
                    linear_proj=modules.row_linear,
                    head_norm=modules.head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # The router reads the normalised tokens too.
            pre_mlp_layernorm=modules.norm if has_experts else norm,
            mlp=moe_layer(modules) if has_experts else dense,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_checkpoint_names(has_experts) if fused else {},
        ),
    )


def _checkpoint_names(has_experts: bool) -> dict[str, str]:
    found = dict(_FUSED_NORMS)
    if has_experts:
        del found["mlp.linear_fc1.layer_norm_"]
    return found


def hysparse_stack_spec(layers: LayerChoice = LOCAL) -> ModuleSpec:
    """The spec of the decoder: `HybridModel(config, hysparse_stack_spec(layers), ...)`.

    `layers` is of `resolve_layers`, by default what runs anywhere. The model's `config` must be one
    of `make_megatron_config`, and its `hybrid_layer_pattern` the `plan.megatron_pattern` of that.
    """
    modules = LayerModules.of(layers)
    return ModuleSpec(
        module=HySparseStack,
        submodules=HySparseStackSubmodules(
            layers={
                (kind, has_experts): layer_spec(kind, has_experts, modules)
                for kind in LayerKind
                for has_experts in (False, True)
            },
            final_norm=modules.norm,
        ),
    )
