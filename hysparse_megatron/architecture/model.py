"""What a model is: every setting of its architecture, with type, default and why that default.

The members of the enumerations are lower case because they are written in YAML and on the command
line. Fields without a default must be given by a preset or by the user.
"""

from dataclasses import dataclass, field
from enum import Enum

from hysparse_megatron.architecture.bounds import above_zero, at_least, fraction
from hysparse_megatron.architecture.layers import (
    AttentionLayer,
    AttentionSizes,
    FullGate,
    GateKind,
    LayerKind,
    SinkKind,
)
from hysparse_megatron.architecture.rope import RopeScalingConfig


class RouterScore(Enum):
    """How a router turns logits into the weights of the chosen experts."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class Balancing(Enum):
    """What keeps the experts of a layer about equally busy."""

    none = "none"
    aux_loss = "aux_loss"
    sequence_aux_loss = "sequence_aux_loss"
    bias = "bias"


class Backend(Enum):
    """Which implementation of the attention math runs."""

    auto = "auto"
    reference = "reference"
    triton = "triton"


class Layers(Enum):
    """Whose linear layers, norms and experts are used."""

    auto = "auto"
    te = "te"
    local = "local"


class Fp8(Enum):
    """How linear layers scale what they compute in FP8: per tensor, or per block of 128."""

    none = "none"
    tensorwise = "tensorwise"
    blockwise = "blockwise"


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts in the feed-forward layers; the paper gives 512 experts, 8 active."""

    num_experts: int = at_least(0, default=0)
    """Routed experts of every layer, of all expert-parallel ranks together; 0 makes it dense, and
    the settings below unused."""
    num_active_experts: int = at_least(1, default=8)
    """Experts that compute for each token (top-k), out of `num_experts`."""
    expert_ffn_hidden_size: int | None = at_least(1, default=None)
    """Inner width of one expert, in channels; null means `model.ffn_hidden_size`."""
    shared_expert_ffn_hidden_size: int = at_least(0, default=0)
    """Inner width of an expert that sees every token; 0 for none, which fits the paper's counts."""
    num_dense_first_layers: int = at_least(0, default=0)
    """Layers at the start that stay dense, `model.ffn_hidden_size` wide; the paper names none."""
    router_score: RouterScore = RouterScore.softmax
    """softmax or sigmoid over the experts; the chosen weights are normalised to one either way."""
    router_scaling: float = above_zero(default=1.0)
    """Factor on the normalised weights of the chosen experts; sigmoid routers often use 2.5."""
    balancing: Balancing = Balancing.aux_loss
    """aux_loss per micro-batch or per sequence; bias moves the choice with one learnt number per
    expert and needs sigmoid; none leaves the router alone. (megatron-core's loss over the global
    batch depends on the data-parallel size and is left out.)"""
    aux_loss_coefficient: float = at_least(0, default=1e-3)
    """Weight of the auxiliary loss in the total; unused with bias and none."""
    bias_update_rate: float = at_least(0, default=1e-3)
    """Step by which an expert's bias moves after every batch, with balancing = bias."""
    z_loss_coefficient: float = at_least(0, default=0.0)
    """Weight of the squared log-sum-exp of the router's logits (ST-MoE); 0 turns it off."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. Baselines are other layouts of the same model."""

    layout: str
    """One letter per layer in the layout language: F full, S sparse, W window, `|` a cut."""
    hidden_size: int = at_least(1)
    """Width of the residual stream, in channels."""
    ffn_hidden_size: int = at_least(1)
    """Inner width of the gated feed-forward layer, in channels."""
    num_attention_heads: int = at_least(1)
    """Query heads of every layer, of all tensor-parallel ranks together."""
    num_query_groups: int = at_least(1)
    """Key and value heads; the query heads of one group share keys, values and indices."""
    head_dim: int = at_least(1)
    """Channels of one query or key head."""
    value_head_dim: int | None = at_least(1, default=None)
    """Channels of one value head; null means `head_dim`, as in the paper."""
    vocab_size: int | None = at_least(1, default=None)
    """Number of token ids; null takes the tokenizer's, which is right unless weights are loaded."""
    block_size: int = at_least(1, default=64)
    """Tokens in one block that is scored and selected as a whole (the paper's B = 64)."""
    num_selected_blocks: int = at_least(1, default=16)
    """Blocks a query reads in a sparse layer (the paper's 1024 tokens / 64 = 16)."""
    window: int = at_least(1, default=128)
    """Tokens a query sees in the sliding window, itself included (the paper's w = 128)."""
    gate: GateKind = GateKind.head
    """One gate per head or per channel; the paper is silent, its parameter counts favour head."""
    sink: SinkKind = SinkKind.branch
    """One sink per head and branch, one shared by both branches, or none; the paper is silent."""
    full_gate: FullGate = FullGate.none
    """Gate on full layers' output; the paper's 80B full-attention baseline alone has one."""
    forced_first_blocks: int = at_least(0, default=0)
    """Blocks at the start that are always selected, out of `num_selected_blocks`; paper: none."""
    forced_recent_blocks: int = at_least(0, default=0)
    """Blocks up to the current one that are always selected; the paper forces none."""
    rotary_base: float = above_zero(default=10000.0)
    """Base of the rotary position embedding; 640000 in the paper's 32k-token stage."""
    rotary_fraction: float = 1.0
    """Share of a head's channels that is rotated; the rest carries no position."""
    tie_embeddings: bool = False
    """Use the input embedding as the output projection; saves most parameters of small models."""
    qkv_bias: bool = False
    """Add a learnt bias to all that attention projects its input to: queries, keys and values, as
    in Qwen2, and gates; it begins at zero, and the paper mentions none."""
    qk_norm: bool = False
    """Normalise queries and keys per head before rotation; the paper does not mention it."""
    norm_epsilon: float = above_zero(default=1e-5)
    """Added to the mean square inside RMSNorm."""
    init_std: float = above_zero(default=0.02)
    """Standard deviation of the initial weights."""
    hidden_dropout: float = fraction(default=0.0)
    """Probability of dropping a channel after attention and feed-forward; 0 for one-epoch runs."""
    backend: Backend = Backend.auto
    """Attention implementation; auto picks by device and logs what it picked and why."""
    layers: Layers = Layers.auto
    """Linear layers, norms and experts; auto takes Transformer Engine where it is and can run."""
    fp8: Fp8 = Fp8.none
    """Matrix products of Transformer Engine's linear layers in FP8; attention stays in bf16."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)

    def attention(self, kind: LayerKind) -> AttentionLayer:
        """What the attention of a layer of this kind is."""
        sizes = AttentionSizes(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_groups=self.num_query_groups,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            window=self.window,
            selected_tokens=self.num_selected_blocks * self.block_size,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            gate=self.gate,
            full_gate=self.full_gate,
            sink=self.sink,
        )
        return AttentionLayer(kind, sizes)

    @property
    def expert_width(self) -> int:
        """Inner width of one routed expert, with the default resolved."""
        width = self.moe.expert_ffn_hidden_size
        return self.ffn_hidden_size if width is None else width

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer with this index from 0 has experts instead of a dense feed-forward."""
        return self.moe.num_experts > 0 and layer >= self.moe.num_dense_first_layers

    @property
    def value_dim(self) -> int:
        """Channels of one value head, with the default resolved."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of one head that are rotated."""
        return round(self.head_dim * self.rotary_fraction)
