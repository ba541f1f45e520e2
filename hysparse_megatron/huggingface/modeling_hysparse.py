"""A HySparse model for transformers.

Licensed under Apache-2.0: see LICENSE.code beside it.

Stands alone: it is copied into every exported folder and needs torch and transformers.
Shapes: B batch, S tokens of this call, C channels, H query heads, G KV groups, D head dim.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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

_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
"""The name under which this version of transformers passes caches."""
_OTHER_CACHE = (
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
                raise ValueError(_OTHER_CACHE)

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
    """Rotary embedding of [B, heads, S, D]: channel i turns with channel i + half."""
    width = cosine.shape[-1]
    turned, rest = tensor[..., :width], tensor[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned, rest], dim=-1)


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


class HySparseLayer(GradientCheckpointingLayer):
    """One transformer layer that passes on what oracles share."""

    def __init__(self, config: HySparseConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = HySparseAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.is_moe_layer(layer):
            self.mlp: nn.Module = HySparseExperts(config)
        else:
            self.mlp = HySparseMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        picks: Tensor | None,
        places: Places,
        rotation: tuple[Tensor, Tensor],
        cache: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """[B, S, C] and what the last oracle shared -> the same after this layer.

        All tensors are arguments and results, so that gradients of key and value find their way
        where a layer is recomputed in the backward pass.
        """
        normed = self.input_layernorm(hidden)
        attention, shared = self.self_attn(normed, (key, value, picks), places, rotation, cache)
        hidden = hidden + self._drop(attention)
        hidden = hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))
        return hidden, *shared

    def _drop(self, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, self.dropout, self.training)


class HySparsePreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = HySparseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HySparseLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "sparse_sink",
        "window_sink",
        "shared_sink",
        "expert_bias",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HySparseRouter):
            nn.init.normal_(module.weight, std=std)
            if self.config.balancing == "bias":
                nn.init.zeros_(module.expert_bias)
        elif isinstance(module, HySparseExperts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, HySparseAttention):
            for name in sink_names(self.config, module.kind):
                nn.init.zeros_(getattr(module, name))


class HySparseModel(HySparsePreTrainedModel):
    """Embedding, layers and the final norm."""

    def __init__(self, config: HySparseConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HySparseLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, S, C] of token ids [B, S].

        `attention_mask` [B, tokens so far] may leave out tokens on the left, or on the right of a
        row that is not continued. `position_ids` may only count up by one. Raises ValueError for
        what is not supported: other masks, packed documents, attention weights, static caches.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not supported: no attention weights are kept")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        check_cache(cache)
        recomputes = self.gradient_checkpointing and self.training
        if cache is None and not recomputes:
            wanted = self.config.use_cache if use_cache is None else use_cache
            cache = DynamicCache(config=self.config) if wanted else None
        past = 0 if cache is None else cache.get_seq_length()
        places = Places(past, hidden.shape[1], row_starts(attention_mask, past + hidden.shape[1]))
        check_positions(position_ids, attention_mask)

        rotation = self._rotation(places, hidden)
        states = [hidden]
        shared: Shared = (None, None, None)
        for layer in self.layers:
            hidden, *shared = layer(hidden, *shared, places, rotation, cache=cache)
            if output_hidden_states:
                states.append(hidden)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
            **{_CACHE: cache},
        )

    def _rotation(self, places: Places, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles, both [B or 1, 1, S, rotated channels]."""
        # Not kept in a buffer, which transformers would not fill when it loads a model.
        frequency, scale = rotary_frequencies(self.config)
        frequency = frequency.to(like.device)
        angle = places.positions(like.device).float().unsqueeze(-1) * frequency
        angle = torch.cat([angle, angle], dim=-1).unsqueeze(1)
        return (angle.cos() * scale).to(like.dtype), (angle.sin() * scale).to(like.dtype)


def rotary_frequencies(config: HySparseConfig) -> tuple[Tensor, float]:
    """Radians per token, fp32 [rotated channels / 2] on the CPU, and a factor on both waves."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    width = round(config.head_dim * rope["partial_rotary_factor"])
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return 1.0 / rope["rope_theta"] ** exponent, 1.0


def check_cache(cache: Any) -> None:
    """Raise ValueError for a static or paged cache.

    Before masks are read: for a static cache `generate` makes masks of another shape.
    """
    if cache is None:
        return
    if not hasattr(cache, "get_seq_length") or getattr(cache, "is_compileable", False):
        raise ValueError(_OTHER_CACHE)


def row_starts(attention_mask: Tensor | None, total: int) -> Tensor | None:
    """int64 [B]: the first token of every row that is no padding; None if all are the first.

    Raises ValueError if a row has padding between its tokens, or the mask another shape than
    [B, `total`].
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
        raise ValueError(
            f"attention_mask: got shape {list(attention_mask.shape)}, expected [batch, {total}]: "
            "one entry per token so far, those in the cache included"
        )
    mask = attention_mask.bool()
    begins = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if bool((begins > 1).any()):
        raise ValueError(
            "attention_mask: padding between tokens is not supported; pad a prompt on its left"
        )
    start = mask.int().argmax(dim=1)
    return start if bool(start.any()) else None


def check_positions(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise ValueError unless the positions of a row's tokens count up by one."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return
    jumps = position_ids[..., 1:] - position_ids[..., :-1] != 1
    if attention_mask is not None:
        mask = attention_mask[:, -position_ids.shape[-1] :].bool()
        jumps = jumps & mask[:, 1:] & mask[:, :-1]
    if bool(jumps.any()):
        raise ValueError(
            "position_ids: got positions that do not count up by one; several documents packed "
            "into a row are not supported"
        )


class HySparseForCausalLM(HySparsePreTrainedModel, GenerationMixin):
    """A language model: logits, loss and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HySparseConfig) -> None:
        super().__init__(config)
        self.model = HySparseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [B, S, ids], of the last `logits_to_keep` tokens if not 0; the rest see the model.

        `labels` int64 [B, S] are the tokens themselves, -100 where none is to be predicted.
        """
        attentions = kwargs.pop("output_attentions", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=attentions,
            past_key_values=past_key_values,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{_CACHE: getattr(outputs, _CACHE)},
        )
        return result if return_dict is not False else result.to_tuple()
