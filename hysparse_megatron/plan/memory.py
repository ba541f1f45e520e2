"""Bytes of one rank at the peak of a training step: weights, gradients, optimizer, activations.

Activations are what autograd keeps from the forward to the backward pass of every micro-batch in
flight, plus what the most expensive moment needs for itself. Shapes: S sequence, B micro-batch, T
tensor-parallel size; `tokens` = S B, `rows` = S B / T with sequence parallelism, else S B.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hysparse_megatron.architecture.layers import Branch, LayerKind
from hysparse_megatron.architecture.parameters import RankParameters, padded_vocab_size
from hysparse_megatron.architecture.stages import PipelinePlan
from hysparse_megatron.config.schema import Config, OptimizerName, Precision, RecomputeModule
from hysparse_megatron.plan.feed_forward import (
    expert_matrices,
    feed_forward_activations,
    gradient_of_activation,
    on_gpus,
)
from hysparse_megatron.plan.flops import feed_forward_of
from hysparse_megatron.plan.offload import ON_ITS_WAY, HostCopies, leaving, on_its_way, travels
from hysparse_megatron.plan.traffic import (
    batch_tokens,
    element_bytes,
    gradient_element_bytes,
    groups_on_rank,
    key_value_elements,
    rank_tokens,
    shared_bytes,
    token_rows,
)

GIB = 2**30

SCORE_CHUNK_BYTES = 256 * 2**20
"""Kernels score the oracle's blocks in chunks of queries: their workspace stays about this."""

RUNTIME_BYTES = 3 * GIB
"""CUDA context, NCCL buffers, libraries and fragmentation: what no arithmetic on tensors sees."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the peak."""

    weights: int
    gradients: int
    """fp32, accumulated over micro-batches."""
    optimizer: int
    """fp32 main weights (with bf16 training) and moments, split over data-parallel ranks (of an
    instance of the optimizer)."""
    activations: dict[str, int]
    """Kept for the backward pass by all micro-batches in flight, by what they are."""
    micro_batches_in_flight: float
    """Forward passes of this rank's layers whose activations are kept at the peak."""
    working_set: int
    """What the most expensive moment needs besides: loss, recomputed layer, kernel workspace."""
    runtime: int
    host: HostCopies | None = None
    """What waits for the backward pass on the host; None without `train.offload_activations`."""

    @property
    def activation_bytes(self) -> int:
        """Sum of the kept activations."""
        return sum(self.activations.values())

    @property
    def total(self) -> int:
        """All of them."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activation_bytes + self.working_set + self.runtime


def state_bytes(
    held: RankParameters,
    precision: Precision,
    dp_cp: int,
    edp: int,
    optimizer: OptimizerName,
    per_gradient: int = 4,
) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) of a rank that holds `held` parameters."""
    bf16 = precision is Precision.bf16
    per_weight = 2 if bf16 else 4
    # In bf16 the fp32 main weights too: in fp32 those are the weights themselves.
    main = 4 if bf16 else 0
    if optimizer is OptimizerName.adamw:
        shares = -(-held.dense // dp_cp) + -(-held.experts // edp)
        return held.total * per_weight, held.total * per_gradient, shares * (main + 8)
    # Muon keeps one mean of a matrix where AdamW keeps two, and deals out whole matrices.
    matrices = _share(held.matrices, held.largest_matrix, dp_cp)
    experts = _share(held.experts, held.largest_expert_matrix, edp)
    rest = held.dense - held.matrices
    # The buffers of weights and gradients have room for as many of the largest share.
    room = rest + dp_cp * matrices + edp * experts
    state = (matrices + experts) * (main + 4) + -(-rest // dp_cp) * (main + 8)
    return room * per_weight, room * per_gradient, state


def _share(matrices: int, largest: int, ranks: int) -> int:
    """Elements of the rank with most, of matrices dealt out whole: at least those of the largest.

    Shares are about even where each has several matrices. Where there are about as many ranks as
    matrices, no deal is even and the largest share is somewhat larger than this.
    """
    return max(-(-matrices // ranks), largest)


def layer_activations(config: Config, plan: PipelinePlan, layer: int) -> Counter[str]:
    """Bytes that one layer keeps of one micro-batch, by what they are, without any recompute."""
    model, tp = config.model, config.parallel.tp
    attention = model.attention(plan.layout.kinds[layer])
    element, rows = element_bytes(config), token_rows(config)
    tokens = rank_tokens(config)
    heads, groups = model.num_attention_heads // tp, groups_on_rank(model, tp)
    output = heads * model.value_dim
    branches = len(attention.kind.branches)
    kept: Counter[str] = Counter()
    # The norm keeps the residual stream, the projection what the norm made of it.
    kept["residual stream and norms"] += 2 * rows * model.hidden_size * element
    # Rotated query and key, and before that their norms' inputs.
    kept["attention"] += tokens * heads * model.head_dim * element
    if model.qk_norm:
        kept["attention"] += tokens * (heads + groups) * model.head_dim * element
    kept["attention"] += branches * tokens * (output * element + heads * 4)
    if attention.gates:
        # What the output projection reads then, and the gates in fp32.
        gates = heads * sum(gate.width for gate in attention.gates)
        kept["attention"] += tokens * (output * element + gates * 4)
    if plan.is_read(layer):
        kept["selections"] += tokens * groups * model.num_selected_blocks * 4
    if plan.is_read(layer) or (config.parallel.cp > 1 and Branch.FULL in attention.kind.branches):
        # Of all tokens, wherever they are, or of this rank's.
        of = batch_tokens(config) if config.parallel.cp_keep_kv else tokens
        kept["shared key and value"] += of * key_value_elements(config) * element
    else:
        kept["attention"] += tokens * key_value_elements(config) * element
    kept += feed_forward_activations(config, layer)
    return kept


def _kept_activations(config: Config, plan: PipelinePlan, layer: int) -> Counter[str]:
    """Bytes that one layer keeps of one micro-batch under the configured recompute."""
    kept = layer_activations(config, plan, layer)
    if not config.train.recomputes_layer(plan.place_of(layer)):
        return kept - _parts_again(config, plan, layer)
    # The layer's input alone, and what it shares with other layers.
    shared = ("shared key and value", "selections") if plan.is_read(layer) else ()
    outputs = Counter({name: kept[name] for name in shared if name in kept})
    outputs["residual stream and norms"] = _residual_bytes(config)
    return outputs


def _residual_bytes(config: Config) -> int:
    return token_rows(config) * config.model.hidden_size * element_bytes(config)


def _parts_again(config: Config, plan: PipelinePlan, layer: int) -> Counter[str]:
    """Bytes of a layer that selective recompute makes again, by what they are."""
    model, train = config.model, config.train
    tokens, element = rank_tokens(config), element_bytes(config)
    heads = model.num_attention_heads // config.parallel.tp
    again: Counter[str] = Counter()
    if train.recomputes(RecomputeModule.attention):
        # What attention and its gates keep for themselves, except the last output.
        branches = len(plan.layout.kinds[layer].branches)
        again["attention"] += branches * tokens * (heads * model.value_dim * element + heads * 4)
        if branches == 1:  # the output projection reads it
            again["attention"] -= tokens * heads * model.value_dim * element
    if train.recomputes(RecomputeModule.norm):
        again["residual stream and norms"] += 2 * _residual_bytes(config)
    if train.recomputes(feed_forward_of(config.model, layer)):
        parts = feed_forward_activations(config, layer)
        del parts["residual stream and norms"]  # its input
        again += parts
    return again


def _working_again(config: Config, plan: PipelinePlan, layer: int) -> int:
    """Bytes that the backward pass of one layer makes again, with what it holds beside them."""
    if config.train.recomputes_layer(plan.place_of(layer)):
        whole = sum(layer_activations(config, plan, layer).values())
        return whole + gradient_of_activation(config, layer)
    if not config.train.recomputes(feed_forward_of(config.model, layer)):
        # A norm's output, or less than is counted as the kernels' workspace.
        return _residual_bytes(config) if config.train.recomputes(RecomputeModule.norm) else 0
    parts = feed_forward_activations(config, layer)
    return sum(parts.values()) + gradient_of_activation(config, layer)


def _beside_experts(config: Config, plan: PipelinePlan, layer: int) -> int:
    """Bytes that the backward pass of experts holds beside what is kept or made again."""
    matrices = expert_matrices(config, layer)
    again = config.train.recomputes_layer(plan.place_of(layer))
    if not matrices or again or config.train.recomputes(RecomputeModule.experts):
        return matrices  # the gradient is counted with what is made again
    return matrices + gradient_of_activation(config, layer)


def _alike(config: Config, plan: PipelinePlan, layers: list[int]) -> dict[int, int]:
    """One layer of every sort among `layers`, and how many there are of it."""
    found: dict[tuple[LayerKind, *tuple[bool, ...]], tuple[int, int]] = {}
    for layer in layers:
        kind = plan.layout.kinds[layer]
        again = config.train.recomputes_layer(plan.place_of(layer))
        last = config.train.offload_activations and layer == plan.layout.num_layers - 1
        sort = (kind, plan.is_read(layer), config.model.is_moe_layer(layer), again, last)
        first, count = found.get(sort, (layer, 0))
        found[sort] = (first, count + 1)
    return dict(found.values())


def head_bytes(config: Config) -> int:
    """Bytes of the loss on the last stage: logits and their gradient, on a CPU probabilities too.

    One copy more than with Transformer Engine, whose loss overwrites the logits: whether a machine
    has it is not known here.
    With `train.loss_chunk` of a chunk of tokens at a time, and the hidden states of all of them.
    """
    model, train, parallel = config.model, config.train, config.parallel
    assert model.vocab_size is not None
    tokens, element = rank_tokens(config), element_bytes(config)
    columns = padded_vocab_size(model.vocab_size) // parallel.tp
    per_token = columns * (2 * element + (0 if on_gpus(config) else 4))
    if train.loss_chunk is None:
        return tokens * per_token
    # Gathered over tensor-parallel ranks, and their gradient.
    hidden = 2 * tokens * model.hidden_size * element
    return min(tokens, train.loss_chunk * train.micro_batch_size) * per_token + hidden


def in_flight(plan: PipelinePlan, pp_rank: int, num_microbatches: int) -> float:
    """Micro-batches whose activations rank `pp_rank` keeps at the peak, in whole-rank units.

    1F1B keeps one per stage from here to the end. Interleaving warms up further: that many chunks.
    """
    behind = plan.pp - pp_rank - 1
    if plan.num_chunks == 1:
        return min(num_microbatches, behind + 1)
    chunks = plan.num_chunks
    warm = 2 * behind + (chunks - 1) * plan.pp + 1
    return min(num_microbatches * chunks, warm) / chunks


def rank_memory(
    config: Config,
    plan: PipelinePlan,
    pp_rank: int,
    held: RankParameters,
    num_microbatches: int,
    dp_cp: int,
    edp: int,
) -> RankMemory:
    """The peak of one rank of pipeline rank `pp_rank` with `held` parameters."""
    stages = [plan.stage_index(pp_rank, chunk) for chunk in range(plan.num_chunks)]
    layers = [layer for stage in stages for layer in plan.stages[stage]]
    flying = in_flight(plan, pp_rank, num_microbatches)
    one, travelling = _kept_and_travelling(config, plan, layers)
    received, more = _received(config, plan, stages)
    one += received
    one["attention"] += len(stages) * _rotation_bytes(config)
    scratch = _workspace(config, plan, layers)
    working = max(
        max(scratch, _beside_experts(config, plan, layer)) + _working_again(config, plan, layer)
        for layer in _alike(config, plan, layers)
    )
    if len(plan.stages) - 1 in stages:
        working = max(working, head_bytes(config))
    activations = {name: round(size * flying) for name, size in one.items() if size}
    host = None
    if travelling:
        last = None
        if len(plan.stages) - 1 in stages:
            last = sum(_kept_activations(config, plan, plan.layout.num_layers - 1).values())
        activations[ON_ITS_WAY] = on_its_way(plan, travelling, last)
        copied = sum(sum(kept.values()) for kept in travelling) + more
        host = HostCopies(round(copied * flying), copied, copied * num_microbatches)
    instances = config.parallel.num_distributed_optimizer_instances
    weights, gradients, optimizer = state_bytes(
        held,
        config.train.precision,
        dp_cp // instances,
        edp // instances,
        config.optim.name,
        gradient_element_bytes(config),
    )
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        micro_batches_in_flight=flying,
        working_set=working,
        runtime=RUNTIME_BYTES,
        host=host,
    )


def _kept_and_travelling(
    config: Config, plan: PipelinePlan, layers: list[int]
) -> tuple[Counter[str], list[Counter[str]]]:
    """Bytes of a micro-batch that `layers` keep on the device, and what of each leaves it."""
    here: Counter[str] = Counter()
    away: list[Counter[str]] = []
    for layer, count in _alike(config, plan, layers).items():
        kept = _kept_activations(config, plan, layer)
        if travels(config, plan, layer, _residual_bytes(config)):
            gone = leaving(kept)
            away += [gone] * count
            kept = kept - gone
        for name, size in kept.items():
            here[name] += count * size
    return here, away


def _rotation_bytes(config: Config) -> int:
    """Cosines and sines of all positions in fp32, which the layers of a stage rotate with."""
    return 2 * config.train.seq_length // config.parallel.cp * config.model.rotary_dim * 4


def _received(config: Config, plan: PipelinePlan, stages: list[int]) -> tuple[Counter[str], int]:
    """Bytes that `stages` hold of what came over their cuts, and what more of it leaves the device.

    The schedule holds what it received until it has sent the gradient.
    """
    here: Counter[str] = Counter()
    away, residual = 0, _residual_bytes(config)
    for stage in stages:
        leaves = stage > 0 and travels(config, plan, plan.stages[stage].start, residual)
        if leaves:
            here["residual stream and norms"] += residual
        if plan.oracle_into(stage) is None:
            away -= residual if leaves else 0  # the first layer's input is what was received
            continue
        # Unpacked from the payload, and the payload itself until it is unpacked.
        key_and_value, indices = shared_bytes(config)
        here["shared key and value"] += key_and_value
        here["selections"] += 2 * indices
        gathers = config.parallel.cp > 1 and config.parallel.cp_keep_kv
        if leaves and gathers:
            away += _gathered_bytes(config)
        elif leaves and config.parallel.sequence_parallel:
            away += key_and_value  # else views of what was received
        elif gathers:
            here["shared key and value"] += _gathered_bytes(config)
    return here, away


def _workspace(config: Config, plan: PipelinePlan, layers: list[int]) -> int:
    """Scratch memory of the attention kernels: gradients in fp32, and scores of oracles."""
    model, train, cp = config.model, config.train, config.parallel.cp
    tokens = rank_tokens(config)
    heads = model.num_attention_heads // config.parallel.tp
    # Gathered again, those of one block at a time.
    again = 0 if cp == 1 or config.parallel.cp_keep_kv else _gathered_bytes(config)
    # With context parallelism the sums of all tokens, and twice as they are put in order and sent.
    copies = 1 if cp == 1 else 3
    gradients = 4 * (
        tokens * heads * model.head_dim + copies * batch_tokens(config) * key_value_elements(config)
    )
    scores = 0
    if any(plan.is_read(layer) for layer in layers):
        blocks = -(-train.seq_length // model.block_size)
        scores = min(SCORE_CHUNK_BYTES, tokens * heads * blocks * 4)
    return gradients + scores + again


def _gathered_bytes(config: Config) -> int:
    """Key and value of one layer, of all tokens of a micro-batch."""
    return batch_tokens(config) * key_value_elements(config) * element_bytes(config)
