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
