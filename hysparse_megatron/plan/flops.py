"""FLOPs per token, split by what they are spent on.

One multiply-add counts 2. Attention is counted causally: a query is charged for the keys it sees,
on average over the positions of a sequence (HySparse2's comparison, arXiv 2609.26368, Fig. 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.parameters import count_parameters
from hysparse_megatron.config.schema import Recompute


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the forward pass per token."""

    linear: float
    """Projections, feed-forward layers and routers: 2 per active weight."""
    output: float
    """The output projection onto the vocabulary."""
    full_attention: float
    sparse_attention: float
    """The block-sparse branch of sparse layers."""
    window_attention: float
    """The window branch of sparse layers, and window layers."""

    @property
    def attention(self) -> float:
        """Attention of all kinds."""
        return self.full_attention + self.sparse_attention + self.window_attention

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.output + self.attention


def mean_keys_seen(sequence_length: int, limit: int | None = None) -> float:
    """Keys a causal query sees, averaged over a sequence, if it may see `limit` at most."""
    if limit is None or limit >= sequence_length:
        return (sequence_length + 1) / 2
    return limit - limit * (limit - 1) / (2 * sequence_length)


def attention_flops(model: ModelConfig, keys_seen: float) -> float:
    """Scores and weighted values of all query heads for one query that sees `keys_seen` keys."""
    return 2 * model.num_attention_heads * (model.head_dim + model.value_dim) * keys_seen


def layer_flops(model: ModelConfig, kind: LayerKind, matrices: int, sequence: int) -> float:
    """Forward FLOPs per token of one layer with `matrices` active weights."""
    total = 2.0 * matrices
    if kind is LayerKind.FULL:
        return total + attention_flops(model, mean_keys_seen(sequence))
    total += attention_flops(model, mean_keys_seen(sequence, model.window))
    if kind is LayerKind.SPARSE:
        total += attention_flops(model, mean_keys_seen(sequence, _selected_tokens(model)))
    return total


def forward_flops(model: ModelConfig, layout: Sequence[LayerKind], sequence: int) -> ForwardFlops:
    """FLOPs per token of a forward pass over sequences of `sequence` tokens."""
    counted = count_parameters(model, tuple(layout))
    full = sum(kind is LayerKind.FULL for kind in layout)
    sparse = sum(kind is LayerKind.SPARSE for kind in layout)
    window_keys = mean_keys_seen(sequence, model.window)
    selected_keys = mean_keys_seen(sequence, _selected_tokens(model))
    return ForwardFlops(
        linear=2.0 * sum(layer.matrices for layer in counted.layers),
        output=2.0 * (counted.output or counted.embedding),
        full_attention=full * attention_flops(model, mean_keys_seen(sequence)),
        sparse_attention=sparse * attention_flops(model, selected_keys),
        window_attention=(len(layout) - full) * attention_flops(model, window_keys),
    )


def training_flops(forward: ForwardFlops, recompute: Recompute) -> float:
    """FLOPs per token that the hardware does in one training step, recompute included.

    The backward pass counts two forward passes.
    """
    again = {
        Recompute.none: 0.0,
        Recompute.selective: forward.attention,
        Recompute.full: forward.total,
    }
    return 3 * forward.total + again[recompute]


def _selected_tokens(model: ModelConfig) -> int:
    return model.num_selected_blocks * model.block_size
