"""Configuration of a HySparse model for transformers.

Licensed under Apache-2.0: see LICENSE.code beside it.

Stands alone: it is copied into every exported folder. HySparse: arXiv 2602.03560.
"""

from typing import Any

from transformers import PretrainedConfig

FULL, SPARSE, WINDOW = "F", "S", "W"
_ALLOWED = {
    "gate": ("head", "channel"),
    "sink": ("branch", "shared", "none"),
    "full_gate": ("none", "head", "channel"),
    "scoring_func": ("softmax", "sigmoid"),
}
_SETTINGS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "value_head_dim": 64,
    "block_size": 64,
    "num_selected_blocks": 16,
    "sliding_window": 128,
    "gate": "head",
    "sink": "branch",
    "full_gate": "none",
    "forced_first_blocks": 0,
    "forced_recent_blocks": 0,
    "qkv_bias": False,
    "qk_norm": False,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "num_experts": 0,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 0,
    "num_dense_first_layers": 0,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "balancing": "none",
    "use_cache": True,
}
"""Settings with their defaults, beside the layout, the embedding's ties and what rotates."""
_ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
"""What counts where `rope_parameters` say nothing."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class HySparseConfig(PretrainedConfig):
    """Sizes and choices of a HySparse model.

    `layout` has one letter per layer: F full attention (an oracle), S sparse (reads keys, values
    and picks of the nearest F before it, beside a window of its own), W sliding window alone.
    `sliding_window`, `block_size` in tokens; `num_selected_blocks` are picked per query and group.
    `gate` head or channel; `sink` branch, shared or none; `full_gate` none, head or channel.
    `qkv_bias`: queries, keys, values and gates have a bias.
    With `num_experts` > 0 the layers from `num_dense_first_layers` on have experts;
    `scoring_func` softmax or sigmoid, and `balancing` "bias" means a learnt bias of the choice.
    `rope_parameters` as in other models, of type default, linear, llama3 or yarn. A `rope_scaling`
    beside them, as model cards give one, counts instead; base and share stay those of the model.
    """

    model_type = "hysparse"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (Trainer adds to it)
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}  # noqa: RUF012

    def __init__(
        self,
        layout: str = "FSSSF",
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if (
            not layout
            or set(layout) - {FULL, SPARSE, WINDOW}
            or layout.lstrip(WINDOW)[:1] == SPARSE
        ):
            raise ValueError(
                f"layout: got {layout!r}, expected letters F, S and W with an F before the first S"
            )
        self.layout = layout
        self.num_hidden_layers = len(layout)
        # What a cache keeps of each layer: all tokens, or a window.
        self.layer_types = [
            "full_attention" if kind == FULL else "sliding_attention" for kind in layout
        ]
        for derived in ("num_hidden_layers", "layer_types"):
            settings.pop(derived, None)
        flat = {name: settings.pop(name, default) for name, default in _ROPE.items()}
        for name, default in _SETTINGS.items():
            setattr(self, name, settings.pop(name, default))
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")
        rope = dict(rope_scaling or rope_parameters or {})
        kind = rope.setdefault("rope_type", rope.pop("type", "default"))
        if kind not in _ROPE_TYPES:
            raise ValueError(f"rope_type: got {kind!r}, expected one of {_ROPE_TYPES}")
        for name, value in flat.items():
            rope.setdefault(name, (rope_parameters or {}).get(name, value))
        if kind in ("llama3", "yarn"):
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        self.rope_parameters = rope
        tied = settings.pop("tie_word_embeddings", False)
        super().__init__(tie_word_embeddings=tied, **settings)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer with this index from 0 has experts instead of one feed-forward."""
        return self.num_experts > 0 and layer >= self.num_dense_first_layers
