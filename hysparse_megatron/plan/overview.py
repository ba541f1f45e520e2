"""Everything the planner knows about a run, computed at once from its configuration.

No GPU, no weights, no torch: seconds for the largest model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hysparse_megatron.architecture.kv_cache import (
    CONTEXT_LENGTHS,
    all_full,
    hybrid_window,
    kv_cache_bytes,
)
from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.parameters import (
    ModelParameters,
    RankParameters,
    count_parameters,
    parameters_on_rank,
)
from hysparse_megatron.architecture.stages import PipelinePlan, plan_pipeline
from hysparse_megatron.config.schema import Config, Precision
from hysparse_megatron.plan import offload
from hysparse_megatron.plan.flops import (
    ForwardFlops,
    forward_flops,
    recomputed_flops,
    training_flops,
)
from hysparse_megatron.plan.memory import GIB, RankMemory, rank_memory
from hysparse_megatron.plan.schedule import (
    EFFICIENCY,
    NOMINAL_TFLOPS,
    StepTime,
    exposed_seconds,
    pipeline_time,
)
from hysparse_megatron.plan.traffic import Collectives, Cut, collectives, cuts


@dataclass(frozen=True)
class RankGroups:
    """Sizes of the groups that the world divides into."""

    world_size: int
    dp: int
    """Ranks that read other samples."""
    dp_cp: int
    """Ranks with the same dense parameters: those that read other parts of a sample too."""
    edp: int
    """Ranks with the same experts."""
    num_microbatches: int
    """Per data-parallel rank and step."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: its layers and what they cost."""

    layers: range
    kinds: str
    """One letter per layer."""
    forward_flops: float
    """Of one micro-batch on one rank, the output projection included."""
    cut: Cut | None
    """What enters it from the stage before."""


@dataclass(frozen=True)
class PipelineRank:
    """What the ranks at one pipeline position hold and send."""

    parameters: RankParameters
    memory: RankMemory
    traffic: Collectives


@dataclass(frozen=True)
class CacheRow:
    """Bytes of the key-value cache at one context length, bf16."""

    context_length: int
    ours: int
    all_full: int
    hybrid_window: int


@dataclass(frozen=True)
class Overview:
    """The plan of a run."""

    config: Config
    plan: PipelinePlan
    groups: RankGroups
    parameters: ModelParameters
    flops: ForwardFlops
    training_flops_per_token: float
    stages: tuple[Stage, ...]
    ranks: tuple[PipelineRank, ...]
    time: StepTime
    """Only to compare plans where `seconds` is None."""
    vocabulary: str = "model.vocab_size"
    """What says how many token ids there are."""

    @property
    def seconds(self) -> float | None:
        """Of a step; None where `cluster.peak_tflops` is not known, as on a CPU."""
        return None if self.config.cluster.peak_tflops is None else self.time.seconds

    @property
    def cache(self) -> tuple[CacheRow, ...]:
        """The key-value cache by context length."""
        kinds = self.plan.layout.kinds
        return tuple(_cache_row(self.config, kinds, length) for length in CONTEXT_LENGTHS)

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest rank."""
        return max(rank.memory.total for rank in self.ranks)

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint on disk: weights, their fp32 copies, two fp32 moments (Muon: fewer)."""
        per_weight = 2 if self.config.train.precision is Precision.bf16 else 4
        return self.parameters.total * (per_weight + 4 + 8)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits the cluster's memory; True where that is not known."""
        limit = self.config.cluster.memory_gib
        return limit is None or self.peak_bytes <= limit * GIB


def rank_groups(config: Config, world_size: int) -> RankGroups:
    """The groups of a valid configuration on `world_size` ranks."""
    parallel, train = config.parallel, config.train
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    edp = world_size // (parallel.ep * parallel.pp)
    microbatches = train.global_batch_size // (train.micro_batch_size * dp)
    return RankGroups(world_size, dp, dp * parallel.cp, edp, microbatches)


def make_overview(config: Config, world_size: int) -> Overview:
    """The plan of a valid configuration. Raises ValueError without `model.vocab_size`."""
    model = config.model
    plan = plan_pipeline(model.layout, config.parallel.pp, config.parallel.vpp)
    kinds = plan.layout.kinds
    groups = rank_groups(config, world_size)
    counted = count_parameters(model, kinds)
    flops = forward_flops(model, kinds, config.train.seq_length)
    stages = _stages(config, plan, counted, flops)
    per_step = training_flops(flops, recomputed_flops(config, plan, counted, flops))
    ranks = tuple(_rank(config, plan, counted, groups, rank) for rank in range(plan.pp))
    return Overview(
        config=config,
        plan=plan,
        groups=groups,
        parameters=counted,
        flops=flops,
        training_flops_per_token=per_step,
        stages=stages,
        ranks=ranks,
        time=_step_time(config, plan, stages, ranks, groups, per_step / flops.total),
    )


def _stages(
    config: Config, plan: PipelinePlan, counted: ModelParameters, flops: ForwardFlops
) -> tuple[Stage, ...]:
    train = config.train
    sequence, layout = train.seq_length, plan.layout
    # Causal attention is even too: of two chunks one is as far from the front as one from the end.
    parallel = config.parallel
    tokens_on_rank = sequence * train.micro_batch_size / (parallel.tp * parallel.cp)
    entering = [None, *cuts(config, plan)]
    attention = {
        kind: sum(config.model.attention(kind).flops(sequence).values())
        for kind in set(layout.kinds)
    }
    found = []
    for index, layers in enumerate(plan.stages):
        per_token = sum(
            2.0 * counted.layers[layer].matrices + attention[layout.kinds[layer]]
            for layer in layers
        )
        if index == len(plan.stages) - 1:
            per_token += flops.output
        kinds = layout.letters[layers.start : layers.stop]
        found.append(Stage(layers, kinds, per_token * tokens_on_rank, entering[index]))
    return tuple(found)


def _rank(
    config: Config, plan: PipelinePlan, counted: ModelParameters, groups: RankGroups, pp_rank: int
) -> PipelineRank:
    held = parameters_on_rank(counted, plan, config.parallel.tp, config.parallel.ep, pp_rank)
    return PipelineRank(
        held,
        rank_memory(config, plan, pp_rank, held, groups.num_microbatches, groups.dp_cp, groups.edp),
        collectives(config, plan, pp_rank, held, groups.dp_cp, groups.edp),
    )


def _step_time(
    config: Config,
    plan: PipelinePlan,
    stages: tuple[Stage, ...],
    ranks: tuple[PipelineRank, ...],
    groups: RankGroups,
    passes: float,
) -> StepTime:
    """`passes` forward passes' worth of FLOPs make a training step."""
    cluster, parallel = config.cluster, config.parallel
    per_node = max(1, cluster.gpus_per_node)

    def bandwidth(span: int) -> float:
        """Bytes a second of a group whose members lie within `span` neighbouring ranks."""
        inside = span <= per_node
        return 1e9 * (cluster.node_bandwidth_gb if inside else cluster.network_bandwidth_gb)

    tensor = bandwidth(parallel.tp)
    expert = bandwidth(parallel.ep)
    context = bandwidth(parallel.tp * parallel.cp)
    # Pipeline ranks are the outermost: neighbours stand a whole stage apart.
    across = bandwidth(groups.world_size // plan.pp)
    between_stages = bandwidth(2 * groups.world_size // plan.pp)
    computing = passes / ((cluster.peak_tflops or NOMINAL_TFLOPS) * 1e12 * EFFICIENCY)
    stage_seconds = []
    for index, stage in enumerate(stages):
        traffic = ranks[index % plan.pp].traffic
        sent = traffic.tensor_bytes / tensor + traffic.expert_bytes / expert
        sent += traffic.context_bytes / context
        crossing = 0 if stage.cut is None else 2 * stage.cut.total_bytes / between_stages
        seconds = stage.forward_flops * computing + sent / plan.num_chunks + crossing
        host = ranks[index % plan.pp].memory.host
        forward = stage.forward_flops * computing / passes
        seconds += offload.exposed_seconds(host, plan.num_chunks, forward, passes)
        stage_seconds.append(seconds)
    seconds, waited = pipeline_time(stage_seconds, plan.pp, groups.num_microbatches)
    slowest = max(sum(stage_seconds[rank :: plan.pp]) for rank in range(plan.pp))
    near = bandwidth(groups.world_size // plan.pp // parallel.num_distributed_optimizer_instances)
    reducing = max(
        rank.traffic.gradient_bytes / near + rank.traffic.instance_bytes / across for rank in ranks
    )
    gathering = max(rank.traffic.weight_bytes for rank in ranks) / near
    hidden = parallel.overlap.grad_reduce and parallel.overlap.param_gather
    data = exposed_seconds(reducing, gathering, slowest, passes, hidden)
    return StepTime(seconds, data, waited)


def _cache_row(config: Config, kinds: tuple[LayerKind, ...], length: int) -> CacheRow:
    def of(baseline: Callable[[tuple[LayerKind, ...]], tuple[LayerKind, ...]]) -> int:
        return kv_cache_bytes(config.model, baseline(kinds), length)

    return CacheRow(length, of(lambda own: own), of(all_full), of(hybrid_window))
