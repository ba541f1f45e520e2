"""Bytes of feed-forward layers and experts, for `memory`; its names of shapes.

Shapes: S sequence, B micro-batch, T tensor-parallel size; `tokens` = S B, `rows` = S B / T with
sequence parallelism, else S B.
"""

from __future__ import annotations

from collections import Counter

from hysparse_megatron.architecture.model import Layers
from hysparse_megatron.config.schema import Config, Precision
from hysparse_megatron.plan.traffic import element_bytes, rank_tokens, token_rows


def feed_forward_activations(config: Config, layer: int) -> Counter[str]:
    """Bytes that the feed-forward part of a layer and its norm keep, by what they are."""
    model, parallel = config.model, config.parallel
    element, rows = element_bytes(config), token_rows(config)
    tokens = rank_tokens(config)
    kept: Counter[str] = Counter()
    kept["residual stream and norms"] += 2 * rows * model.hidden_size * element
    # Both halves of the first projection and their product; on a CPU each half once more
    # (activated; plus an offset that is 0), which megatron-core's fused activation makes again.
    widths = 3 if on_gpus(config) else 5
    if not model.is_moe_layer(layer):
        kept["feed-forward"] += tokens * widths * (model.ffn_hidden_size // parallel.tp) * element
        return kept
    moe = model.moe
    shared_width = moe.shared_expert_ffn_hidden_size // parallel.tp
    kept["feed-forward"] += tokens * widths * shared_width * element
    # Logits, scores and probabilities of the router in fp32.
    kept["routing"] += rows * moe.num_experts * 3 * 4
    routed = rows * moe.num_active_experts
    # As above, and the product weighted by the router, with which it is fused too.
    widths = 3 if on_gpus(config) else 6
    kept["experts"] += routed * (model.hidden_size + widths * model.expert_width) * element
    return kept


def on_gpus(config: Config) -> bool:
    """Whether the run is: functions are fused there. It may be a CPU where no machine is known."""
    return config.cluster.peak_tflops is not None


def gradient_of_activation(config: Config, layer: int) -> int:
    """Bytes that the backward pass of a layer holds beside what is kept: the gradient of the first
    projection's halves, which take no more than the parts that unfused activations keep."""
    if not on_gpus(config):
        return 0
    model, element = config.model, element_bytes(config)
    if not model.is_moe_layer(layer):
        width = model.ffn_hidden_size // config.parallel.tp
        return rank_tokens(config) * 2 * width * element
    shared_width = model.moe.shared_expert_ffn_hidden_size // config.parallel.tp
    routed = token_rows(config) * model.moe.num_active_experts
    return (rank_tokens(config) * 2 * shared_width + routed * 3 * model.expert_width) * element


def expert_matrices(config: Config, layer: int) -> int:
    """Bytes of the first projections of all experts of a rank side by side, or of their gradients.

    So torch's grouped products want and give them, one layer at a time (`model.local_experts`).
    Where nothing is known of the machine, its Transformer Engine included, they are counted.
    """
    model = config.model
    grouped = model.layers is not Layers.te and config.train.precision is Precision.bf16
    if not (grouped and on_gpus(config) and model.is_moe_layer(layer)):
        return 0
    experts = model.moe.num_experts // config.parallel.ep
    return experts * 2 * model.expert_width * model.hidden_size * element_bytes(config)
