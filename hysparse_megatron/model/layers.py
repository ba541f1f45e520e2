"""Which implementation of linear layers, norms and experts a model is built from.

`te` is Transformer Engine through megatron-core's wrappers: norm and linear layer in one, RMSNorm,
grouped GEMM for experts, fused rotation and loss, FP8. `local` is megatron-core's own layers and
our norm, with torch's grouped products for experts where it has them; it runs anywhere. Weights,
their names in checkpoints and what they are drawn from are the same, so that a run may change from
one to the other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules

from hysparse_megatron.architecture.model import Fp8, Layers, ModelConfig
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.model.norm import CompiledRMSNorm, RMSNorm


@dataclass(frozen=True)
class LayerChoice:
    """What `resolve_layers` chose."""

    transformer_engine: bool
    reason: str
    apex_weight_gradients: bool = False
    """Whether apex adds weight gradients to the fp32 sum inside the matrix product."""
    on_cuda: bool = False
    sums_weight_gradients: bool = True
    """Whether matrix products may add weight gradients to their sum; not where weights come out of
    hooks, see `TrainConfig.saves_weights_by_hooks`."""
    grouped_products: bool = False
    """Whether torch multiplies many bf16 matrices in one launch here."""

    @property
    def apex_sums(self) -> bool:
        """Whether megatron-core's own layers add weight gradients to their sum, with apex."""
        return self.apex_weight_gradients and self.sums_weight_gradients

    @property
    def name(self) -> str:
        """As `model.layers` calls it."""
        return "te" if self.transformer_engine else "local"


LOCAL = LayerChoice(False, "megatron-core's own layers run anywhere")


def resolve_layers(model: ModelConfig, device: torch.device) -> LayerChoice:
    """The layers of this run. Raises ConfigError if those asked for cannot run here."""
    missing = _why_no_transformer_engine(device)
    if missing is not None and model.layers is Layers.te:
        raise ConfigError(f"model.layers: te cannot run: {missing}; use auto or local")
    if model.layers is Layers.local:
        missing = "model.layers is local"
    if missing is not None and model.fp8 is not Fp8.none:
        raise ConfigError(
            f"model.fp8: {model.fp8.value} needs Transformer Engine, but {missing}; use none"
        )
    facts = {
        "apex_weight_gradients": _has_apex(device),
        "on_cuda": device.type == "cuda",
        "grouped_products": _has_grouped_products(device),
    }
    if missing is None:
        version = importlib.metadata.version("transformer-engine")
        return LayerChoice(True, f"Transformer Engine {version}", **facts)
    return LayerChoice(False, missing, **facts)


def _why_no_transformer_engine(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"Transformer Engine needs a CUDA device, this is {device.type}"
    if importlib.util.find_spec("transformer_engine") is None:
        return "the package transformer-engine is not installed"
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return None if HAVE_TE else "transformer_engine.pytorch cannot be imported"


def _has_apex(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    )


def _has_grouped_products(device: torch.device) -> bool:
    """Elsewhere `grouped_mm` is a loop on the host, which waits for the device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def groups_experts(choice: LayerChoice, model: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether experts run at once by torch's grouped products; see `HySparseConfig`.

    Those give weight gradients of their own, where apex adds to the fp32 sum: then, as where they
    are not there, experts run one after another.
    """
    if choice.transformer_engine or choice.apex_sums or model.moe.num_experts == 0:
        return False
    # Rows of all matrices begin at multiples of 16 bytes, and there is a limit of matrices.
    fits = model.hidden_size % 8 == model.expert_width % 8 == 0 and model.moe.num_experts < 1024
    return choice.grouped_products and dtype is torch.bfloat16 and fits


def describe_layers(choice: LayerChoice, model: ModelConfig, grouped_experts: bool = False) -> str:
    """For the start-up log; `grouped_experts` is that of `HySparseConfig`."""
    extras = [f"FP8 linears ({model.fp8.value})"] if model.fp8 is not Fp8.none else []
    if choice.on_cuda and not choice.transformer_engine:
        extras.append("projections' parts, rotation, loss and the gradients of norms compiled")
    elif choice.on_cuda:
        rotation = "" if _engine_rotates(choice, model) else " and rotation"
        extras.append(f"projections' parts{rotation} compiled")
    if model.moe.num_experts and not choice.transformer_engine:
        how = "in torch's grouped products" if grouped_experts else "one after another"
        extras.append(f"experts {how}")
    if not choice.sums_weight_gradients:
        extras.append("weight gradients added to their sum after the matrix products")
    elif choice.transformer_engine:
        extras.append("weight gradients added to their sum inside the matrix products")
    elif choice.apex_weight_gradients:
        extras.append("apex's fused accumulation of weight gradients")
    return ", ".join([f"layers {choice.name}: {choice.reason}", *extras])


def fuse_weight_gradients(choice: LayerChoice, model: torch.nn.Module) -> None:
    """Let Transformer Engine's linear layers add weight gradients to `main_grad` as they make them.

    It saves a gradient in the model's precision and a pass over both. megatron-core's setting of
    the name is one for all layers and wants apex for the output projection, which is its own. For
    training alone: a backward pass without gradient buffers would have nothing to add to.
    """
    if not (choice.transformer_engine and choice.sums_weight_gradients):
        return
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def fusions(choice: LayerChoice, model: ModelConfig, deterministic: bool = False) -> dict[str, Any]:
    """megatron-core's settings of fused operations for these layers.

    Those that compile with torch (activation, residual, loss) are for CUDA: on a CPU compiling
    takes longer than a test. megatron-core's deterministic mode refuses Transformer Engine's loss.
    """
    engine = choice.transformer_engine
    settings: dict[str, Any] = {
        "gradient_accumulation_fusion": choice.apex_sums,
        "bias_dropout_fusion": choice.on_cuda,
        "bias_activation_fusion": choice.on_cuda,
        "apply_rope_fusion": _engine_rotates(choice, model),
        "cross_entropy_loss_fusion": choice.on_cuda,
        "cross_entropy_fusion_impl": "te" if engine and not deterministic else "native",
        "moe_grouped_gemm": engine and model.moe.num_experts > 0,
        "moe_permute_fusion": engine and model.moe.num_experts > 0,
    }
    if model.fp8 is not Fp8.none:
        # Scales from the tensor at hand: no history that a checkpoint would have to keep.
        settings |= {"fp8": "hybrid", "fp8_recipe": model.fp8.value}
    return settings


def _engine_rotates(choice: LayerChoice, model: ModelConfig) -> bool:
    """Whether Transformer Engine has a rotation for it: without a factor on cosines and sines."""
    return choice.transformer_engine and model.rope_scaling.attention_scale == 1.0


@dataclass(frozen=True)
class LayerModules:
    """The classes that a spec names."""

    norm: type
    head_norm: type
    """Of queries and keys: ours, whose gradients tensor-parallel ranks sum."""
    column_linear: type
    row_linear: type
    norm_and_column_linear: type | None
    """Both in one, where the implementation has that."""
    grouped_experts: GroupedMLPSubmodules | None
    """The linear layers of all experts of a rank at once, likewise."""

    @property
    def expert_linears(self) -> MLPSubmodules:
        """Of shared experts, and of experts without `grouped_experts`."""
        return MLPSubmodules(linear_fc1=self.column_linear, linear_fc2=self.row_linear)

    @classmethod
    def of(cls, choice: LayerChoice) -> LayerModules:
        """Those of an implementation; imports Transformer Engine only if it is the one."""
        norm = CompiledRMSNorm if choice.on_cuda else RMSNorm
        if not choice.transformer_engine:
            return cls(norm, norm, ColumnParallelLinear, RowParallelLinear, None, None)
        from megatron.core.extensions import transformer_engine as te

        return cls(
            te.TENorm,
            norm,
            te.TEColumnParallelLinear,
            te.TERowParallelLinear,
            te.TELayerNormColumnParallelLinear,
            GroupedMLPSubmodules(
                linear_fc1=te.TEColumnParallelGroupedLinear,
                linear_fc2=te.TERowParallelGroupedLinear,
            ),
        )
