"""Experts without Transformer Engine: one after another, or all of a rank in grouped products.

Shapes: T rows, a token once for each of its experts on this rank, sorted by expert; E experts of
the rank, C channels, F width of an expert, N and K any widths of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn.functional import grouped_mm

from hysparse_megatron.model.megatron_config import HySparseConfig


class LocalExperts(SequentialMLP):
    """megatron-core's experts, which run at once with `HySparseConfig.grouped_experts`.

    Parameters, their names and their places in checkpoints are the same either way.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, C], int64 [E] on the device or the host and fp32 [T] -> [T, C] and no bias."""
        assert isinstance(self.config, HySparseConfig)
        if not self.config.grouped_experts:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        # A few bytes, which the driver copies before it returns: nothing waits for the device.
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32).to(
            permuted_local_hidden_states.device, non_blocking=True
        )
        first, second = self._weights()
        gate_and_up = GroupedLinear.apply(permuted_local_hidden_states, ends, *first)
        weighted = weighted_bias_swiglu_impl(gate_and_up, None, permuted_probs.unsqueeze(-1))
        return GroupedLinear.apply(weighted, ends, *second), None

    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """E of [2F, C] and E of [C, F].

        No linear layer is called, so its hooks are called here: they wait for what other ranks have
        updated (`parallel.overlap`), in the order of the parameters.
        """
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for expert in self.local_experts:
            for weights, linear in zip(found, (expert.linear_fc1, expert.linear_fc2), strict=True):
                assert isinstance(linear, torch.nn.Module)
                for hook in linear._forward_pre_hooks.values():
                    hook(linear, ())
                weights.append(linear.get_parameter("weight"))
        return found


class GroupedLinear(torch.autograd.Function):
    """Rows [T, K] by the weights [N, K] of their experts -> [T, N].

    Weights are laid side by side for each product and kept as the parameters that they are: a copy
    of all layers' weights would have to wait for the backward pass otherwise.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        """`ends`: where the rows of every expert end, int32 [E] on the device."""
        rows = rows.contiguous()
        ctx.save_for_backward(rows, ends, *weights)
        return _of_rows(rows, _transposed(weights), ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows, and of every weight, zeros where its expert has no row."""
        rows, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        of_rows = None
        if ctx.needs_input_grad[0]:
            of_rows = _of_rows(grad, torch.stack(weights), ends)
        if not any(ctx.needs_input_grad[2:]):
            return of_rows, None, *(None for _ in weights)
        if not rows.shape[0]:
            return of_rows, None, *(torch.zeros_like(weight) for weight in weights)
        return of_rows, None, *grouped_mm(grad.t(), rows, offs=ends).unbind()


def _transposed(weights: Iterable[Tensor]) -> Tensor:
    """E of [N, K] -> [E, K, N]."""
    return torch.stack(tuple(weights)).transpose(1, 2)


def _of_rows(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """[T, K] by [E, K, N] -> [T, N]; a rank may get no row at all."""
    if not rows.shape[0]:
        return rows.new_empty(0, matrices.shape[-1])
    return grouped_mm(rows, matrices, offs=ends)
