"""FLOPs per token, split by what they are spent on.

One multiply-add counts 2. Attention is counted causally: a query is charged for the keys it sees,
on average over the positions of a sequence (HySparse2's comparison, arXiv 2609.26368, Fig. 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hysparse_megatron.architecture.layers import Branch, LayerKind
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.parameters import ModelParameters, count_parameters
from hysparse_megatron.architecture.stages import PipelinePlan
from hysparse_megatron.config.schema import Config, RecomputeModule


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the forward pass per token."""

    linear: float
    """Projections, feed-forward layers and routers: 2 per active weight."""
    output: float
    """The output projection onto the vocabulary."""
    branches: dict[Branch, float]
    """Attention by the keys it goes over."""

    @property
    def attention(self) -> float:
        """Attention of all kinds."""
        return sum(self.branches.values())

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.output + self.attention


def forward_flops(model: ModelConfig, layout: Sequence[LayerKind], sequence: int) -> ForwardFlops:
    """FLOPs per token of a forward pass over sequences of `sequence` tokens."""
    counted = count_parameters(model, tuple(layout))
    branches = dict.fromkeys(Branch, 0.0)
    for kind, count in Counter(layout).items():
        for branch, flops in model.attention(kind).flops(sequence).items():
            branches[branch] += count * flops
    return ForwardFlops(
        linear=2.0 * sum(layer.matrices for layer in counted.layers),
        output=2.0 * (counted.output or counted.embedding),
        branches=branches,
    )


def training_flops(forward: ForwardFlops, recomputed: float = 0.0) -> float:
    """FLOPs per token that the hardware does in one training step.

    The backward pass counts two forward passes, and what of `recomputed_flops` it makes again.
    """
    return 3 * forward.total + recomputed


def recomputed_flops(
    config: Config, plan: PipelinePlan, counted: ModelParameters, forward: ForwardFlops
) -> float:
    """FLOPs per token of the forward pass that the backward pass does again.

    The output projection is outside of all layers: it is done again with `train.loss_chunk` alone.
    """
    train, model = config.train, config.model
    again = 0.0 if train.loss_chunk is None else forward.output
    for index, layer in enumerate(counted.layers):
        is_whole = train.recomputes_layer(plan.place_of(index))
        if is_whole or train.recomputes(RecomputeModule.attention):
            attention = model.attention(plan.layout.kinds[index])
            again += sum(attention.flops(train.seq_length).values())
        if is_whole:
            again += 2.0 * layer.matrices
        elif train.recomputes(feed_forward_of(model, index)):
            again += 2.0 * (layer.matrices - layer.attention)
    return again


def feed_forward_of(model: ModelConfig, layer: int) -> RecomputeModule:
    """What selective recompute calls the part of a layer after its attention."""
    has_experts = model.is_moe_layer(layer)
    return RecomputeModule.experts if has_experts else RecomputeModule.feed_forward
