"""Bytes that ranks send: over every pipeline cut, and in every kind of collective.

Per rank, per micro-batch unless said otherwise. Ring algorithms are assumed: a reduce-scatter or an
all-gather of n bytes over r ranks sends n (r - 1) / r from each, an all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from hysparse_megatron.architecture.layers import Branch
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.architecture.parameters import RankParameters
from hysparse_megatron.architecture.stages import PipelinePlan, live_oracle
from hysparse_megatron.config.schema import Config, Precision
from hysparse_megatron.plan.flops import feed_forward_of


@dataclass(frozen=True)
class Cut:
    """What crosses one pipeline cut, in one direction."""

    before_layer: int
    oracle: int | None
    """The oracle whose key, value and indices cross with the hidden state, if any."""
    hidden_bytes: int
    shared_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the one tensor that is sent."""
        return self.hidden_bytes + self.shared_bytes


@dataclass(frozen=True)
class Collectives:
    """Bytes one rank sends in collectives."""

    tensor_bytes: float
    """Tensor (and sequence) parallelism, forward and backward of one micro-batch."""
    expert_bytes: float
    """Dispatch and combine of tokens between experts, forward and backward of one micro-batch."""
    context_bytes: float
    """Keys and values of other ranks' tokens, and their gradients, of one micro-batch."""
    gradient_bytes: float
    """Gradients within an instance of the optimizer, once per step."""
    instance_bytes: float
    """The same of a rank's share, between instances."""
    weight_bytes: float
    """Updated weights, once per step."""

    @property
    def data_bytes(self) -> float:
        """All that data parallelism sends in a step."""
        return self.gradient_bytes + self.instance_bytes + self.weight_bytes


def element_bytes(config: Config) -> int:
    """Bytes of one activation or model weight."""
    return 2 if config.train.precision is Precision.bf16 else 4


def gradient_element_bytes(config: Config) -> int:
    """Bytes of one element of the buffers in which gradients are summed."""
    return 4 if config.parallel.grad_reduce_in_fp32 else element_bytes(config)


def groups_on_rank(model: ModelConfig, tp: int) -> int:
    """KV groups of one tensor-parallel rank; 1 where several ranks share a group."""
    return max(1, model.num_query_groups // tp)


def batch_tokens(config: Config) -> int:
    """Tokens of one micro-batch."""
    return config.train.seq_length * config.train.micro_batch_size


def rank_tokens(config: Config) -> int:
    """Those of them that a context-parallel rank attends for."""
    return batch_tokens(config) // config.parallel.cp


def token_rows(config: Config) -> int:
    """Tokens of one micro-batch in one rank's residual stream."""
    parallel = config.parallel
    return rank_tokens(config) // (parallel.tp if parallel.sequence_parallel else 1)


def key_value_elements(config: Config) -> int:
    """Elements of one token's key and value in one layer of a rank."""
    model = config.model
    return groups_on_rank(model, config.parallel.tp) * (model.head_dim + model.value_dim)


def shared_bytes(config: Config) -> tuple[int, int]:
    """(key and value, block indices) of one oracle on one rank for one micro-batch, as sent."""
    model, tokens = config.model, rank_tokens(config)
    groups = groups_on_rank(model, config.parallel.tp)
    element = element_bytes(config)
    return (
        tokens * key_value_elements(config) * element,
        # An index travels as the bits of one element.
        tokens * groups * model.num_selected_blocks * element,
    )


def cuts(config: Config, plan: PipelinePlan) -> list[Cut]:
    """Every cut in model order."""
    hidden = token_rows(config) * config.model.hidden_size * element_bytes(config)
    found = []
    for stage in range(1, len(plan.stages)):
        oracle = plan.oracle_into(stage)
        shared = 0 if oracle is None else sum(shared_bytes(config))
        found.append(Cut(plan.stages[stage].start, oracle, hidden, shared))
    return found


def collectives(
    config: Config, plan: PipelinePlan, pp_rank: int, held: RankParameters, dp_cp: int, edp: int
) -> Collectives:
    """What one rank of pipeline rank `pp_rank` sends, with `held` parameters."""
    layers = [layer for chunk in range(plan.num_chunks) for layer in _stage(plan, pp_rank, chunk)]
    instances = config.parallel.num_distributed_optimizer_instances
    dp_cp, edp = dp_cp // instances, edp // instances
    shared = held.dense * _ring(dp_cp) + held.experts * _ring(edp)
    shares = 2 * _ring(instances) * (held.dense / dp_cp + held.experts / edp)
    return Collectives(
        tensor_bytes=sum(_tensor_bytes(config, plan, layer) for layer in layers),
        expert_bytes=sum(_expert_bytes(config, plan, layer) for layer in layers),
        context_bytes=_context_bytes(config, plan, pp_rank),
        gradient_bytes=gradient_element_bytes(config) * shared,
        instance_bytes=gradient_element_bytes(config) * shares,
        weight_bytes=element_bytes(config) * shared,
    )


def _stage(plan: PipelinePlan, pp_rank: int, chunk: int) -> range:
    return plan.stages[plan.stage_index(pp_rank, chunk)]


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _passes(config: Config, plan: PipelinePlan, layer: int) -> int:
    """Forward passes of a layer and one micro-batch in training."""
    return 2 if config.train.recomputes_layer(plan.place_of(layer)) else 1


def _feed_forward_passes(config: Config, plan: PipelinePlan, layer: int) -> int:
    """The same of its feed-forward part."""
    again = config.train.recomputes(feed_forward_of(config.model, layer))
    return 2 if again else _passes(config, plan, layer)


def _tensor_bytes(config: Config, plan: PipelinePlan, layer: int) -> float:
    model, parallel = config.model, config.parallel
    if parallel.tp == 1:
        return 0.0
    tokens = rank_tokens(config)
    whole = tokens * model.hidden_size * element_bytes(config) * _ring(parallel.tp)
    has_dense = not model.is_moe_layer(layer) or model.moe.shared_expert_ffn_hidden_size > 0
    passes = [_passes(config, plan, layer)]
    if has_dense:
        passes.append(_feed_forward_passes(config, plan, layer))
    # Two operations of this size per block and direction: all-gather and reduce-scatter with
    # sequence parallelism, which gathers once more for the weight gradient; else one all-reduce.
    backward = 3 if parallel.sequence_parallel else 2
    total = sum(whole * (2 * count + backward) for count in passes)
    return total + _sharing_bytes(config, plan, layer)


def _sharing_bytes(config: Config, plan: PipelinePlan, layer: int) -> float:
    """What ranks that share a KV group send each other."""
    model, train = config.model, config.train
    ranks_per_group = config.parallel.tp // model.num_query_groups
    if ranks_per_group <= 1:
        return 0.0
    tokens = rank_tokens(config)
    # Key and value are gathered forward and summed backward.
    total = tokens * key_value_elements(config) * element_bytes(config)
    total *= _passes(config, plan, layer) + 1
    if plan.is_read(layer):
        # All must agree on the blocks: fp32 scores are max-reduced.
        total += 2 * tokens * -(-train.seq_length // model.block_size) * 4
    return total * _ring(ranks_per_group)


def gather_bytes(config: Config) -> tuple[float, float]:
    """What a rank sends of the key and value of one layer: gathered, and summed back in fp32."""
    elements = batch_tokens(config) * key_value_elements(config) * _ring(config.parallel.cp)
    return elements * element_bytes(config), elements * 4


def tail_bytes(config: Config) -> tuple[float, float]:
    """The same of the tails that windows need of the chunks before."""
    tokens = 2 * config.parallel.cp * (config.model.window - 1) * config.train.micro_batch_size
    elements = tokens * key_value_elements(config) * _ring(config.parallel.cp)
    return elements * element_bytes(config), elements * 4


def _context_bytes(config: Config, plan: PipelinePlan, pp_rank: int) -> float:
    if config.parallel.cp == 1:
        return 0.0
    stages = [plan.stage_index(pp_rank, chunk) for chunk in range(plan.num_chunks)]
    layers = [layer for stage in stages for layer in plan.stages[stage]]
    passes = {layer: _passes(config, plan, layer) for layer in layers}
    # What comes over a cut is gathered again.
    again = sum(plan.oracle_into(stage) is not None for stage in stages)
    full = [layer for layer in layers if Branch.FULL in plan.layout.kinds[layer].branches]
    gathers, sums = sum(passes[layer] for layer in full) + again, len(full) + again
    if not config.parallel.cp_keep_kv:
        # Layers that are recomputed save what they are handed, not what they make.
        handed = {layer - 1 for layer in layers if live_oracle(plan.layout, layer) == layer - 1}
        gathers += len(handed.union(layer for layer in full if passes[layer] == 1)) + again
    windows = [layer for layer in layers if Branch.WINDOW in plan.layout.kinds[layer].branches]
    gathered, summed = gather_bytes(config)
    tail, returned = tail_bytes(config)
    tails = sum(passes[layer] * tail + returned for layer in windows)
    return gathers * gathered + sums * summed + tails


def _expert_bytes(config: Config, plan: PipelinePlan, layer: int) -> float:
    model, parallel = config.model, config.parallel
    if not model.is_moe_layer(layer) or parallel.ep == 1:
        return 0.0
    routed = token_rows(config) * model.moe.num_active_experts * model.hidden_size
    sent = routed * element_bytes(config) * _ring(parallel.ep)
    # Dispatch and combine, in every forward pass and in the backward pass.
    return 2 * sent * (1 + _feed_forward_passes(config, plan, layer))
