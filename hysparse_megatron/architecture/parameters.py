"""How many parameters a model has, layer by layer, and how many of them each rank holds.

Pure arithmetic: nothing is allocated. The numbers equal those of the built model to the last one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.stages import PipelinePlan

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, whatever the tensor-parallel size.

(megatron-core's own habit pads to a multiple that grows with it, and then neither losses nor
checkpoints agree between layouts.)"""


def padded_vocab_size(vocab_size: int) -> int:
    """`vocab_size` rounded up to `VOCAB_MULTIPLE`."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def with_vocabulary(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """`model` with the data's vocabulary, unless it has one of its own."""
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)


def parameters_of(model: ModelConfig, vocab_size: int) -> ModelParameters:
    """Those of a run's model, tied and replicated ones once; `vocab_size` is the data's."""
    return count_parameters(with_vocabulary(model, vocab_size), parse_layout(model.layout).kinds)


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one whole layer, by how they are split over ranks."""

    attention: int
    """Projections, their biases and sinks, split over tensor-parallel ranks."""
    feed_forward: int
    """The dense feed-forward layer, or the shared expert; split over tensor-parallel ranks."""
    experts: int
    """Routed experts, split over expert-parallel ranks."""
    router: int
    """Replicated on every rank of the stage."""
    norms: int
    """Replicated on every rank of the stage."""
    active_experts: int
    """Those of `experts` that compute for one token."""
    attention_vectors: int
    """Those of `attention` that are no matrix: biases and sinks."""
    largest_matrix: int
    """The largest weight that is split over tensor-parallel ranks."""
    largest_expert_matrix: int
    """The largest weight of one expert; 0 in a dense layer."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.feed_forward + self.experts + self.router + self.norms

    @property
    def matrices(self) -> int:
        """Weights that one token is multiplied with: 2 FLOPs each in the forward pass."""
        return self.attention + self.feed_forward + self.active_experts + self.router

    def matrices_on_rank(self, tp: int) -> int:
        """Those of `dense_on_rank` that are weights of linear layers, the router's among them."""
        return (self.attention - self.attention_vectors + self.feed_forward) // tp + self.router

    def largest_on_rank(self, tp: int) -> int:
        """The largest of these weights on one rank."""
        return max(self.largest_matrix // tp, self.router)

    def dense_on_rank(self, tp: int) -> int:
        """Parameters of one rank that data-parallel ranks replicate."""
        return (self.attention + self.feed_forward) // tp + self.router + self.norms

    def experts_on_rank(self, ep: int) -> int:
        """Parameters of one rank that expert-data-parallel ranks replicate."""
        return self.experts // ep


@dataclass(frozen=True)
class RankParameters:
    """Parameters of one rank. The two kinds are reduced over different data-parallel groups."""

    dense: int
    experts: int
    matrices: int
    """Those of `dense` that are weights of linear layers inside the model; experts all are."""
    largest_matrix: int
    """The largest of these weights, summed over model chunks."""
    largest_expert_matrix: int
    """The largest weight of one expert, summed over model chunks."""

    @property
    def total(self) -> int:
        """All of them; a tied output projection counts on its stage too."""
        return self.dense + self.experts


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of a whole model."""

    layers: tuple[LayerParameters, ...]
    embedding: int
    output: int
    """The output projection; 0 where it is the embedding itself."""
    final_norm: int

    @property
    def total(self) -> int:
        """Every parameter once."""
        rest = self.embedding + self.output + self.final_norm
        return rest + sum(layer.total for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters that take part in computing one token: all but the experts not chosen."""
        return self.total - sum(layer.experts - layer.active_experts for layer in self.layers)

    @property
    def matrices(self) -> int:
        """Weights one token is multiplied with, the output projection included."""
        return sum(layer.matrices for layer in self.layers) + (self.output or self.embedding)


@lru_cache(maxsize=64)
def count_parameters(model: ModelConfig, layout: tuple[LayerKind, ...]) -> ModelParameters:
    """The parameters of `model` with one layer per entry of `layout`.

    Raises ValueError without `model.vocab_size`: only a tokenizer would know it.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is not set: the planner needs the size of the embedding")
    table = padded_vocab_size(model.vocab_size) * model.hidden_size
    return ModelParameters(
        layers=tuple(_layer(model, kind, index) for index, kind in enumerate(layout)),
        embedding=table,
        output=0 if model.tie_embeddings else table,
        final_norm=model.hidden_size,
    )


def _layer(model: ModelConfig, kind: LayerKind, index: int) -> LayerParameters:
    hidden, moe = model.hidden_size, model.moe
    attention = model.attention(kind)
    feed_forward, experts, active, router = 3 * hidden * model.ffn_hidden_size, 0, 0, 0
    if model.is_moe_layer(index):
        one = 3 * hidden * model.expert_width
        experts, active = moe.num_experts * one, moe.num_active_experts * one
        router = moe.num_experts * hidden
        feed_forward = 3 * hidden * moe.shared_expert_ffn_hidden_size
    vectors = attention.num_vector_parameters
    widest = max(
        attention.projection_rows,
        attention.output_width,
        2 * (moe.shared_expert_ffn_hidden_size if experts else model.ffn_hidden_size),
    )
    return LayerParameters(
        attention=attention.num_matrix_parameters + vectors,
        feed_forward=feed_forward,
        experts=experts,
        router=router,
        norms=2 * hidden + attention.num_norm_parameters,
        active_experts=active,
        attention_vectors=vectors,
        largest_matrix=hidden * widest,
        largest_expert_matrix=2 * hidden * model.expert_width if experts else 0,
    )


def parameters_on_rank(
    counted: ModelParameters, plan: PipelinePlan, tp: int, ep: int, pp_rank: int
) -> RankParameters:
    """What one rank of pipeline rank `pp_rank` holds, all its model chunks together."""
    dense = experts = matrices = largest = largest_expert = 0
    last = len(plan.stages) - 1
    for chunk in range(plan.num_chunks):
        stage = plan.stage_index(pp_rank, chunk)
        layers = [counted.layers[layer] for layer in plan.stages[stage]]
        dense += sum(layer.dense_on_rank(tp) for layer in layers)
        experts += sum(layer.experts_on_rank(ep) for layer in layers)
        matrices += sum(layer.matrices_on_rank(tp) for layer in layers)
        largest += max(layer.largest_on_rank(tp) for layer in layers)
        largest_expert += max(layer.largest_expert_matrix for layer in layers)
        if stage == 0:
            dense += counted.embedding // tp
        if stage == last:
            # A tied output projection is a second copy unless it stands beside the embedding.
            copied = counted.embedding if stage > 0 else 0
            dense += (counted.output or copied) // tp + counted.final_norm
    return RankParameters(dense, experts, matrices, largest, largest_expert)
