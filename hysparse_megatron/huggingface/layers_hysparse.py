"""The parts of a layer: attention of every kind, feed-forward and experts.

Licensed under Apache-2.0: see LICENSE.code beside it.

Stands alone: it is copied into every exported folder and needs torch.
Shapes: B batch, S tokens of this call, C channels, H query heads, G KV groups, D head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention_hysparse import (
    Places,
    SelectionRule,
    full_attention,
    gated_sum,
    sparse_attention,
    window_attention,
)
from .configuration_hysparse import FULL, SPARSE, HySparseConfig

Shared = Sequence[Any]
"""What the last oracle shares, or three times None: key [B, G, L, D], value [B, G, L, V] and picks
int64 [B, G, S, K]."""

OTHER_CACHE = (
    "a cache with more entries than tokens, such as a StaticCache, is not supported: use "
    "DynamicCache(config=model.config), or generate without cache_implementation"
)


class HySparseAttention(nn.Module):
    """The attention of one layer, of any kind."""

    def __init__(self, config: HySparseConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.kind = config.layout[layer]
        self.is_read = SPARSE in config.layout[layer + 1 :].split(FULL)[0]
        heads, groups = config.num_attention_heads, config.num_key_value_heads

        def linear(width: int) -> nn.Linear:
            return nn.Linear(config.hidden_size, width, bias=config.qkv_bias)

        self.q_proj = linear(heads * config.head_dim)
        self.k_proj = linear(groups * config.head_dim)
        self.v_proj = linear(groups * config.value_head_dim)
        self.o_proj = nn.Linear(heads * config.value_head_dim, config.hidden_size, bias=False)
        widths = {"none": 0, "head": heads, "channel": heads * config.value_head_dim}
        if self.kind == SPARSE:
            self.sparse_gate = linear(widths[config.gate])
            self.window_gate = linear(widths[config.gate])
        elif self.kind == FULL and widths[config.full_gate]:
            self.output_gate = linear(widths[config.full_gate])
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        for name in sink_names(config, self.kind):
            self.register_parameter(name, nn.Parameter(torch.zeros(heads)))

    def forward(
        self,
        hidden: Tensor,
        shared: Shared,
        places: Places,
        rotation: tuple[Tensor, Tensor],
        cache: Any,
    ) -> tuple[Tensor, Shared]:
        """[B, S, C] and what the last oracle shared -> the same pair after this layer."""
        config = self.config
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, width)).transpose(1, 2)
            for projection, width in (
                (self.q_proj, config.head_dim),
                (self.k_proj, config.head_dim),
                (self.v_proj, config.value_head_dim),
            )
        )
        if config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
            if key.shape[2] > places.total:
                raise ValueError(OTHER_CACHE)

        if self.kind == FULL:
            rule = None
            if self.is_read:
                rule = SelectionRule(
                    config.block_size,
                    config.num_selected_blocks,
                    config.forced_first_blocks,
                    config.forced_recent_blocks,
                )
            mixed, picks = full_attention(query, key, value, places, rule)
            if config.full_gate != "none":
                mixed = (self._gate(self.output_gate, hidden).float().sigmoid() * mixed).to(
                    mixed.dtype
                )
            shared = (key, value, picks) if self.is_read else shared
        else:
            names = sink_names(config, self.kind)
            sinks = [getattr(self, name) for name in names] or [None]
            mixed = window_attention(query, key, value, places, config.sliding_window, sinks[-1])
            if self.kind == SPARSE:
                sparse = sparse_attention(
                    query, shared[0], shared[1], shared[2], places, config.block_size, sinks[0]
                )
                gates = (self._gate(gate, hidden) for gate in (self.sparse_gate, self.window_gate))
                mixed = gated_sum(sparse, mixed, *gates)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), shared

    def _gate(self, projection: nn.Linear, hidden: Tensor) -> Tensor:
        """Logits [B, H, S, 1 or V]."""
        heads = self.config.num_attention_heads
        return projection(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)


def sink_names(config: HySparseConfig, kind: str) -> tuple[str, ...]:
    """Names of a layer's learnable sinks: of its sparse branch, then of its window."""
    if kind == FULL or config.sink == "none":
        return ()
    if kind == SPARSE:
        return ("sparse_sink", "window_sink") if config.sink == "branch" else ("shared_sink",)
    return ("window_sink",)


def rotate(tensor: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, S, D]: channel i turns with channel i + half, in fp32."""
    width = cosine.shape[-1]
    first, second = tensor[..., :width].chunk(2, dim=-1)
    turned = tensor[..., :width] * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned.to(tensor.dtype), tensor[..., width:]], dim=-1)


class HySparseMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class HySparseRouter(nn.Module):
    """Chooses the experts of every token and weighs them, in fp32."""

    def __init__(self, config: HySparseConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.balancing == "bias":
            self.expert_bias: Tensor
            self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, C] -> weights fp32 and experts int64, both [tokens, experts per token]."""
        config = self.config
        with torch.autocast(tokens.device.type, enabled=False):
            logits = nn.functional.linear(tokens.float(), self.weight.float())
        count = config.num_experts_per_tok
        if config.scoring_func == "softmax":
            best, experts = logits.topk(count, dim=-1)
            weights = best.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            biased = scores + self.expert_bias.float() if config.balancing == "bias" else scores
            experts = biased.topk(count, dim=-1).indices
            weights = scores.gather(-1, experts)
            if count > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, experts


class HySparseExperts(nn.Module):
    """Routed experts, and one that sees every token if the model has it."""

    def __init__(self, config: HySparseConfig) -> None:
        super().__init__()
        count, hidden = config.num_experts, config.hidden_size
        width, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
        self.router = HySparseRouter(config)
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        if shared:
            self.shared_expert = HySparseMLP(hidden, shared)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        tokens = hidden.flatten(0, -2)
        weights, experts = self.router(tokens)
        result = torch.zeros_like(tokens)
        for expert in experts.unique().tolist():
            rows, slots = (experts == expert).nonzero(as_tuple=True)
            gate, up = nn.functional.linear(tokens[rows], self.gate_up_proj[expert]).chunk(2, -1)
            inner = nn.functional.silu(gate) * up
            inner = (inner * weights[rows, slots, None]).to(inner.dtype)
            output = nn.functional.linear(inner, self.down_proj[expert])
            result = result.index_add(0, rows, output.to(result.dtype))
        result = result.view_as(hidden)
        if hasattr(self, "shared_expert"):
            result = result + self.shared_expert(hidden)
        return result
