"""RMSNorm that knows about sequence parallelism (megatron-core's torch norm refuses it)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.jit import jit_fuser
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # The weight is replicated over tensor-parallel ranks. With sequence parallelism each rank
        # sees other tokens, and megatron-core sums the gradients of parameters marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] -> [..., C] in the input's dtype."""
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class CompiledRMSNorm(RMSNorm):
    """The same for GPUs, with its gradients in one compiled pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] -> [..., C] in the input's dtype."""
        return _WithCompiledBackward.apply(hidden_states, self.weight, self.eps)


class _WithCompiledBackward(torch.autograd.Function):
    """PyTorch's norm, whose own gradient of the weight takes longer than all the rest of it."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
        output, scale = torch.ops.aten._fused_rms_norm(hidden_states, weight.shape, weight, eps)
        ctx.save_for_backward(hidden_states, weight, scale)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_gradients(*ctx.saved_tensors, grad), None


@jit_fuser
def _gradients(
    hidden_states: Tensor, weight: Tensor, scale: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the input and of the weight; `scale` is 1 over the root mean square, [..., 1]."""
    normed, grad = hidden_states.float() * scale, grad.float()
    of_normed = grad * weight.float()
    along = (of_normed * normed).mean(dim=-1, keepdim=True)
    of_weight = (grad * normed).flatten(0, -2).sum(dim=0)
    return (
        ((of_normed - normed * along) * scale).to(hidden_states.dtype),
        of_weight.to(weight.dtype),
    )
