"""A HySparse model for transformers.

Licensed under Apache-2.0: see LICENSE.code beside it.

Stands alone: it is copied into every exported folder and needs torch and transformers.
Shapes: B batch, S tokens of this call, C channels, H query heads, G KV groups, D head dim.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple

from .attention_hysparse import Places
from .configuration_hysparse import HySparseConfig
from .layers_hysparse import (
    OTHER_CACHE,
    HySparseAttention,
    HySparseExperts,
    HySparseMLP,
    HySparseRouter,
    Shared,
    sink_names,
)

_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
"""The name under which this version of transformers passes caches."""
_PACKED = "several documents packed into a row are not supported"


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

    @can_return_tuple
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
        if _chosen(kwargs.get("output_attentions"), self.config.output_attentions):
            raise ValueError("output_attentions is not supported: no attention weights are kept")
        check_documents(kwargs)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        check_cache(cache)
        recomputes = self.gradient_checkpointing and self.training
        if cache is None and not recomputes:
            wanted = _chosen(use_cache, self.config.use_cache)
            cache = DynamicCache(config=self.config) if wanted else None
        keeps_states = _chosen(output_hidden_states, self.config.output_hidden_states)
        past = 0 if cache is None else cache.get_seq_length()
        places = Places(past, hidden.shape[1], row_starts(attention_mask, past + hidden.shape[1]))
        check_positions(position_ids, attention_mask)

        rotation = self._rotation(places, hidden.device)
        states = [hidden]
        shared: Shared = (None, None, None)
        for layer in self.layers:
            hidden, *shared = layer(hidden, *shared, places, rotation, cache=cache)
            if keeps_states:
                states.append(hidden)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*states[:-1], hidden) if keeps_states else None,
            **{_CACHE: cache},
        )

    def _rotation(self, places: Places, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles, both fp32 [B or 1, 1, S, rotated channels]."""
        # Not kept in a buffer, which transformers would not fill when it loads a model.
        frequency, scale = rotary_frequencies(self.config)
        angle = places.positions(device).float().unsqueeze(-1) * frequency.to(device)
        angle = torch.cat([angle, angle], dim=-1).unsqueeze(1)
        return angle.cos() * scale, angle.sin() * scale


def _chosen(given: bool | None, configured: bool) -> bool:
    """What the caller says, or else the configuration."""
    return configured if given is None else given


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
        raise ValueError(OTHER_CACHE)


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
        raise ValueError(f"position_ids: got positions that do not count up by one; {_PACKED}")


def check_documents(options: dict[str, Any]) -> None:
    """Raise ValueError where collators mark several documents of a row by other keywords."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        bounds = options.get(name)
        if bounds is not None and int((bounds.diff() > 0).sum()) > 1:
            raise ValueError(f"{name}: got bounds of more than one document; {_PACKED}")
    numbers = options.get("seq_idx")
    if numbers is not None and bool((numbers.diff(dim=-1) != 0).any()):
        raise ValueError(f"seq_idx: got more than one number in a row; {_PACKED}")


class HySparseForCausalLM(HySparsePreTrainedModel, GenerationMixin):
    """A language model: logits, loss and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HySparseConfig) -> None:
        super().__init__(config)
        self.model = HySparseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
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
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, ids], of the last `logits_to_keep` tokens if not 0; the rest see the model.

        `labels` int64 [B, S] are the tokens themselves, -100 where none is to be predicted.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{_CACHE: getattr(outputs, _CACHE)},
        )
