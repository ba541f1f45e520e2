"""Tiny models of every kind of attention, what they compute, and how the plain model is told."""

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from plain_model import PlainSettings
from tiny_models import SEQUENCE, VOCABULARY
from torch import Tensor

from hysparse_megatron.architecture.layers import GateKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.attention import FullAttention
from tests.unit.single_process import DEVICE

BATCH = 2
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


def plain_settings(config: Config) -> PlainSettings:
    model = config.model
    return PlainSettings(
        kinds=parse_layout(model.layout).letters,
        heads=model.num_attention_heads,
        groups=model.num_query_groups,
        head_dim=model.head_dim,
        value_dim=model.value_head_dim or model.head_dim,
        block_size=model.block_size,
        window=model.window,
        gate_width=1 if model.gate is GateKind.head else (model.value_head_dim or model.head_dim),
        rotary_dim=int(model.head_dim * model.rotary_fraction),
        rotary_base=model.rotary_base,
        ids=VOCABULARY,
        epsilon=model.norm_epsilon,
    )


def losses_and_picks(model: HybridModel, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The model's losses [B, S], and what each oracle picked, seen on its way out."""
    picks: dict[int, Tensor] = {}
    handles = []
    for index, layer in enumerate(model.decoder.layers):
        if isinstance(layer.self_attention, FullAttention):

            def keep(module: object, given: object, result: tuple, index: int = index) -> None:
                if result[1] is not None:
                    picks[index] = result[1].block_indices

            handles.append(layer.self_attention.register_forward_hook(keep))
    positions = torch.arange(SEQUENCE, device=tokens.device).expand(BATCH, SEQUENCE)
    losses = model(tokens, positions, None, labels=tokens.roll(-1, dims=1))
    for handle in handles:
        handle.remove()
    return losses, picks


def random_tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, SEQUENCE)).to(DEVICE)
