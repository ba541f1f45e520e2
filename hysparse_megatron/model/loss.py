"""Cross-entropy over a vocabulary that tensor-parallel ranks share, a few passes over the logits.

For GPUs without Transformer Engine. megatron-core's own keeps probabilities in fp32, twice the
logits in bf16, and reads and writes them some ten times; here the logits are what is kept.

Shapes: S sequence, B batch, V vocabulary, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.jit import jit_fuser
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


class CompiledCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each token, computed in fp32 and the same in every run."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
        """Losses, fp32 [S, B], of this rank's columns of the logits [S, B, V / T] and the labels,
        ids of the whole vocabulary [S, B]. Collective over `group`."""
        columns = labels - group.rank() * logits.shape[-1]
        largest = _largest(logits)
        if group.size() > 1:
            torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=group)
        sums = _sums(logits, columns, largest)
        if group.size() > 1:
            torch.distributed.all_reduce(sums, op=ReduceOp.SUM, group=group)
        total, labelled = sums.unbind()
        ctx.save_for_backward(logits, columns, largest + total.log())
        return total.log() - labelled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Probabilities without the label's 1, times the loss's gradient, in the logits' dtype."""
        return _gradient(*ctx.saved_tensors, grad), None, None


@jit_fuser
def _largest(logits: Tensor) -> Tensor:
    """Of this rank's columns, fp32 [S, B]."""
    return logits.amax(dim=-1).float()


@jit_fuser
def _sums(logits: Tensor, columns: Tensor, largest: Tensor) -> Tensor:
    """[2, S, B]: exponentials of all columns, and the label's logit if it is here, both beside the
    largest logit."""
    total = (logits.float() - largest.unsqueeze(-1)).exp().sum(dim=-1)
    here = (columns >= 0) & (columns < logits.shape[-1])
    own = logits.gather(-1, columns.where(here, 0).unsqueeze(-1)).squeeze(-1)
    return torch.stack((total, (own.float() - largest).where(here, 0.0)))


@jit_fuser
def _gradient(logits: Tensor, columns: Tensor, log_total: Tensor, grad: Tensor) -> Tensor:
    """[S, B, V / T] in the logits' dtype; the others are fp32 and ids [S, B]."""
    probabilities = (logits.float() - log_total.unsqueeze(-1)).exp()
    is_label = torch.arange(logits.shape[-1], device=logits.device) == columns.unsqueeze(-1)
    return ((probabilities - is_label.float()) * grad.unsqueeze(-1)).to(logits.dtype)
