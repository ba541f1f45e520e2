"""RMSNorm that knows about sequence parallelism (megatron-core's torch norm refuses it)."""

from __future__ import annotations

import torch
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
