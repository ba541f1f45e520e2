"""Which tensors of a checkpoint are which of a Hugging Face folder.

A checkpoint keeps some matrices as one: the input projection of an attention layer, ordered by KV
group (see model/projection.py), and gate and up of a feed-forward layer. A folder keeps each by
itself, as tools for fine-tuning and quantising expect.
Shapes: C channels, F feed-forward width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import Balancing, ModelConfig
from hysparse_megatron.errors import ConfigError

KEPT_IN_FP32 = ("_sink", ".expert_bias")
"""Ends of names of tensors that are fp32 whatever the precision of the rest."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
TABLES = (EMBEDDING, OUTPUT)
"""What has a row for every token id, and more to fill up."""


@dataclass(frozen=True)
class Fused:
    """One tensor of a checkpoint, and what it is made of in a Hugging Face folder.

    With several parts the rows are `groups` times those of all parts in turn.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]
    """Name of each part and its rows in one group."""
    groups: int = 1

    @classmethod
    def alone(cls, name: str, part: str, *shape: int) -> Fused:
        """A tensor that both keep as it is."""
        return cls(name, shape, ((part, shape[0]),))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parts, by name."""
        return {name: (self.groups * rows, *self.shape[1:]) for name, rows in self.parts}

    @property
    def numel(self) -> int:
        """Values of the tensor."""
        return math.prod(self.shape)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor of the checkpoint, each with memory of its own."""
        if len(self.parts) == 1:
            return {self.parts[0][0]: tensor}
        grouped = tensor.unflatten(0, (self.groups, -1))
        pieces = grouped.split([rows for _, rows in self.parts], dim=1)
        names = (name for name, _ in self.parts)
        return {
            name: piece.flatten(0, 1).clone() for name, piece in zip(names, pieces, strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`."""
        if len(self.parts) == 1:
            return parts[self.parts[0][0]]
        pieces = [parts[name].unflatten(0, (self.groups, -1)) for name, _ in self.parts]
        return torch.cat(pieces, dim=1).flatten(0, 1)


def model_weights(model: ModelConfig, vocab_rows: int) -> list[Fused]:
    """All weights of a model whose embedding has `vocab_rows` rows, in its order."""
    hidden = model.hidden_size
    weights = [Fused.alone(EMBEDDING, "model.embed_tokens.weight", vocab_rows, hidden)]
    for index, kind in enumerate(parse_layout(model.layout).kinds):
        weights += _layer(model, kind, index)
    weights.append(Fused.alone("decoder.final_norm.weight", "model.norm.weight", hidden))
    if not model.tie_embeddings:
        weights.append(Fused.alone(OUTPUT, "lm_head.weight", vocab_rows, hidden))
    return weights


def _layer(model: ModelConfig, kind: LayerKind, index: int) -> Iterator[Fused]:
    ours, theirs = f"decoder.layers.{index}", f"model.layers.{index}"
    norms = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    for name, part in norms.items():
        yield Fused.alone(f"{ours}.{name}.weight", f"{theirs}.{part}.weight", model.hidden_size)
    yield from attention_weights(model, kind, f"{ours}.self_attention", f"{theirs}.self_attn")
    feed_forward = _experts if model.is_moe_layer(index) else _dense
    yield from feed_forward(model, f"{ours}.mlp", f"{theirs}.mlp")


def attention_weights(
    model: ModelConfig, kind: LayerKind, ours: str, theirs: str
) -> Iterator[Fused]:
    """Those of one attention layer; `ours` and `theirs` are what their names begin with.

    Raises ConfigError where the layer has a part that the folder's modeling file does not.
    """
    attention = model.attention(kind)
    heads, groups = model.num_attention_heads, model.num_query_groups
    parts = {
        _known(PARTS, part.name, kind): part.width * (heads // groups if part.per_head else 1)
        for part in attention.parts
    }
    rows = attention.projection_rows
    shapes: dict[str, tuple[int, ...]] = {"weight": (rows, model.hidden_size)}
    if model.qkv_bias:
        shapes["bias"] = (rows,)
    for kind_of, shape in shapes.items():
        names = tuple((f"{theirs}.{name}.{kind_of}", count) for name, count in parts.items())
        yield Fused(f"{ours}.linear_qkv.linear.{kind_of}", shape, names, groups)
    yield Fused.alone(
        f"{ours}.linear_proj.weight",
        f"{theirs}.o_proj.weight",
        model.hidden_size,
        attention.output_width,
    )
    if model.qk_norm:
        for which in "qk":
            yield Fused.alone(
                f"{ours}.{which}_layernorm.weight", f"{theirs}.{which}_norm.weight", model.head_dim
            )
    for sink in attention.sinks:
        yield Fused.alone(f"{ours}.{sink}", f"{theirs}.{_known(_SINKS, sink, kind)}", heads)


PARTS = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "gate": "output_gate",
    "sparse_gate": "sparse_gate",
    "window_gate": "window_gate",
}
_SINKS = {name: name for name in ("sparse_sink", "window_sink", "shared_sink")}
"""Names of an attention layer's parts and sinks, and those of modeling_hysparse.py."""


def _known(names: Mapping[str, str], ours: str, kind: LayerKind) -> str:
    if ours not in names:
        raise ConfigError(
            f"a {kind.label} layer has {ours}, for which the Hugging Face model has no place; "
            f"it knows {', '.join(names)}"
        )
    return names[ours]


def _dense(model: ModelConfig, ours: str, theirs: str) -> Iterator[Fused]:
    return _swiglu(model.hidden_size, model.ffn_hidden_size, ours, theirs)


def _swiglu(hidden: int, width: int, ours: str, theirs: str) -> Iterator[Fused]:
    parts = ((f"{theirs}.gate_proj.weight", width), (f"{theirs}.up_proj.weight", width))
    yield Fused(f"{ours}.linear_fc1.weight", (2 * width, hidden), parts)
    yield Fused.alone(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", hidden, width)


def _experts(model: ModelConfig, ours: str, theirs: str) -> Iterator[Fused]:
    """All experts of a layer are one tensor: [E, 2 F, C], gate before up, and [E, C, F]."""
    moe, hidden, width = model.moe, model.hidden_size, model.expert_width
    yield Fused.alone(f"{ours}.router.weight", f"{theirs}.router.weight", moe.num_experts, hidden)
    if moe.balancing is Balancing.bias:
        yield Fused.alone(
            f"{ours}.router.expert_bias", f"{theirs}.router.expert_bias", moe.num_experts
        )
    experts = f"{ours}.experts.experts"
    yield Fused.alone(
        f"{experts}.linear_fc1.weight", f"{theirs}.gate_up_proj", moe.num_experts, 2 * width, hidden
    )
    yield Fused.alone(
        f"{experts}.linear_fc2.weight", f"{theirs}.down_proj", moe.num_experts, hidden, width
    )
    shared = moe.shared_expert_ffn_hidden_size
    if shared:
        yield from _swiglu(hidden, shared, f"{ours}.shared_experts", f"{theirs}.shared_expert")
