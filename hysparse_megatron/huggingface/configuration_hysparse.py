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
        vocab_size: int = 32000,
        layout: str = "FSSSF",
        hidden_size: int = 512,
        intermediate_size: int = 1536,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        head_dim: int = 64,
        value_head_dim: int = 64,
        block_size: int = 64,
        num_selected_blocks: int = 16,
        sliding_window: int = 128,
        gate: str = "head",
        sink: str = "branch",
        full_gate: str = "none",
        forced_first_blocks: int = 0,
        forced_recent_blocks: int = 0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_theta: float = 10000.0,
        partial_rotary_factor: float = 1.0,
        max_position_embeddings: int = 4096,
        hidden_dropout: float = 0.0,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 8,
        moe_intermediate_size: int = 512,
        shared_expert_intermediate_size: int = 0,
        num_dense_first_layers: int = 0,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        balancing: str = "none",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if (
            not layout
            or set(layout) - {FULL, SPARSE, WINDOW}
            or layout.lstrip(WINDOW)[:1] == SPARSE
        ):
            raise ValueError(
                f"layout: got {layout!r}, expected letters F, S and W with an F before the first S"
            )
        self.vocab_size = vocab_size
        self.layout = layout
        self.num_hidden_layers = len(layout)
        # What a cache keeps of each layer: all tokens, or a window.
        self.layer_types = [
            "full_attention" if kind == FULL else "sliding_attention" for kind in layout
        ]
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        self.block_size = block_size
        self.num_selected_blocks = num_selected_blocks
        self.sliding_window = sliding_window
        self.gate = gate
        self.sink = sink
        self.full_gate = full_gate
        self.forced_first_blocks = forced_first_blocks
        self.forced_recent_blocks = forced_recent_blocks
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.rms_norm_eps = rms_norm_eps
        rope = dict(rope_scaling or rope_parameters or {})
        kind = rope.setdefault("rope_type", rope.pop("type", "default"))
        if kind not in _ROPE_TYPES:
            raise ValueError(f"rope_type: got {kind!r}, expected one of {_ROPE_TYPES}")
        flat = {"rope_theta": rope_theta, "partial_rotary_factor": partial_rotary_factor}
        for name, value in flat.items():
            rope.setdefault(name, (rope_parameters or {}).get(name, value))
        if kind in ("llama3", "yarn"):
            rope.setdefault("original_max_position_embeddings", max_position_embeddings)
        self.rope_parameters = rope
        self.max_position_embeddings = max_position_embeddings
        self.hidden_dropout = hidden_dropout
        self.initializer_range = initializer_range
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.num_dense_first_layers = num_dense_first_layers
        self.scoring_func = scoring_func
        self.routed_scaling_factor = routed_scaling_factor
        self.balancing = balancing
        self.use_cache = use_cache
        for derived in ("num_hidden_layers", "layer_types"):
            kwargs.pop(derived, None)
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer with this index from 0 has experts instead of one feed-forward."""
        return self.num_experts > 0 and layer >= self.num_dense_first_layers
