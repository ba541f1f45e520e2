"""Tiny models for the tests of attention and initialization."""

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.builder import build_chunks
from hysparse_megatron.model.megatron_config import HySparseConfig, make_megatron_config
from tests.unit.single_process import DEVICE

SEQUENCE = 29
VOCABULARY = 40

_TINY = [
    "model.hidden_size=24",
    "model.ffn_hidden_size=20",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.head_dim=8",
    "model.block_size=4",
    "model.num_selected_blocks=2",
    "model.window=5",
    "model.tie_embeddings=false",
    f"train.seq_length={SEQUENCE}",
]


VARIANTS: dict[str, list[str]] = {
    "as in the paper": ["model.layout=F S S F S W F"],
    "channel gates": ["model.layout=F S F S F", "model.gate=channel"],
    "one sink for both branches": ["model.layout=F S S F", "model.sink=shared"],
    "windows with a sink": ["model.layout=W F S W", "model.sink=shared"],
    "no sinks": ["model.layout=F S W F", "model.sink=none"],
    "wide values": ["model.layout=F S S W F", "model.value_head_dim=12"],
    "narrow values, channel gates": [
        "model.layout=F S S F",
        "model.value_head_dim=3",
        "model.gate=channel",
    ],
    "norm of query and key": ["model.layout=F S W F", "model.qk_norm=true"],
    "one group of heads": ["model.layout=F S S F", "model.num_query_groups=1"],
    "biases": ["model.layout=F S W F", "model.qkv_bias=true", "model.gate=channel"],
    "a group for each head": ["model.layout=F S S F", "model.num_query_groups=4"],
    "partly rotated": [
        "model.layout=F S F",
        "model.rotary_fraction=0.5",
        "model.rotary_base=500",
    ],
    "window and blocks longer than the text": [
        "model.layout=F S F",
        "model.window=100",
        "model.num_selected_blocks=30",
    ],
    "tied embeddings": ["model.layout=F S F", "model.tie_embeddings=true"],
}
"""Of attention, by what is special."""


def tiny_config(*overrides: str) -> Config:
    """A configuration whose last block is a part of one, and whose selection leaves blocks out."""
    return compose([*_TINY, *overrides])


def tiny_megatron_config(config: Config) -> HySparseConfig:
    return make_megatron_config(config)


def tiny_model(config: Config, groups: ProcessGroupCollection) -> HybridModel:
    (model,) = build_chunks(config, tiny_megatron_config(config), VOCABULARY, groups)
    return model.to(DEVICE)


def randomize(model: torch.nn.Module, std: float = 1.2) -> None:
    """Weights large enough that attention is far from uniform; norms, gates, sinks off neutral.

    `std` is that of what a matrix gives of independent inputs of one. Rounding grows with it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "sink" in name:
                parameter.normal_()
            else:
                parameter.normal_(std=std * parameter.shape[-1] ** -0.5)
