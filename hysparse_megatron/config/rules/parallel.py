"""Rules of how a model is split over ranks."""

import math
from collections.abc import Iterator

from hysparse_megatron.architecture.layout import LayoutError
from hysparse_megatron.architecture.stages import MAX_PAYLOAD_BLOCKS, plan_pipeline
from hysparse_megatron.config.rules.multiples import is_multiple
from hysparse_megatron.config.schema import (
    Config,
    OptimizerName,
    Precision,
    Recompute,
    RecomputeModule,
)
from hysparse_megatron.errors import Problem


def parallel(config: Config) -> Iterator[Problem]:
    """Sizes that go together."""
    parallel, seq_length = config.parallel, config.train.seq_length
    if parallel.cp > 1:
        yield from _context_parallel(config)
    elif not parallel.cp_keep_kv:
        allowed = "true while parallel.cp = 1, which gathers nothing"
        yield Problem("parallel.cp_keep_kv", "false", allowed)
    if parallel.vpp is not None and parallel.pp == 1:
        yield Problem("parallel.vpp", str(parallel.vpp), "null while parallel.pp = 1")
    if parallel.overlap.param_gather and not parallel.overlap.grad_reduce:
        yield Problem(
            "parallel.overlap.param_gather",
            "true",
            "false while parallel.overlap.grad_reduce is false, which makes no buckets",
        )
    if parallel.num_distributed_optimizer_instances > 1 and config.optim.name is OptimizerName.muon:
        yield Problem(
            "parallel.num_distributed_optimizer_instances",
            str(parallel.num_distributed_optimizer_instances),
            "1 with optim.name = muon, which deals whole matrices out to all ranks",
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        yield Problem("parallel.sequence_parallel", "true", "false while parallel.tp = 1")
    if parallel.sequence_parallel and not is_multiple(seq_length, parallel.tp):
        allowed = f"a multiple of parallel.tp = {parallel.tp} with parallel.sequence_parallel"
        yield Problem("train.seq_length", str(seq_length), allowed)


def _context_parallel(config: Config) -> Iterator[Problem]:
    """Every rank holds two chunks of a sequence, of whole rows and no shorter than a tail."""
    parallel, train, tail = config.parallel, config.train, config.model.window - 1
    rows = parallel.tp if parallel.sequence_parallel else 1
    unit = math.lcm(2 * parallel.cp, parallel.cp * rows)
    if not is_multiple(train.seq_length, unit):
        below = train.seq_length // unit * unit
        near = " or ".join(f"{size:,}" for size in (below, below + unit) if size)
        allowed = f"a multiple of {unit}, such as {near}, with parallel.cp = {parallel.cp}"
        yield Problem("train.seq_length", str(train.seq_length), allowed)
    elif train.seq_length // (2 * parallel.cp) < tail:
        most = train.seq_length // (2 * max(tail, 1))
        allowed = (
            f"at most {most}: of {2 * parallel.cp} chunks of {train.seq_length:,} tokens each must "
            f"hold the {tail} tokens before a window of the next"
        )
        yield Problem("parallel.cp", str(parallel.cp), allowed)
    copies = config.data.document_mask and train.micro_batch_size > 1
    whole_layers = train.recompute is Recompute.full and train.recompute_layers is None
    recomputed = whole_layers or train.recomputes(RecomputeModule.attention)
    if not parallel.cp_keep_kv and copies and not recomputed:
        allowed = (
            "true: with data.document_mask and train.micro_batch_size > 1 kernels keep copies of "
            "their own; or train.micro_batch_size = 1, or a train.recompute of all attention"
        )
        yield Problem("parallel.cp_keep_kv", "false", allowed)


def payload(config: Config) -> Iterator[Problem]:
    """Block indices that cross a pipeline cut inside a hybrid block travel as few bits."""
    model, parallel, seq_length = config.model, config.parallel, config.train.seq_length
    num_blocks = -(-seq_length // max(model.block_size, 1))
    most = MAX_PAYLOAD_BLOCKS[2 if config.train.precision is Precision.bf16 else 4]
    if num_blocks <= most or parallel.pp < 1 or (parallel.vpp or 1) < 1:
        return
    try:
        plan = plan_pipeline(model.layout, parallel.pp, parallel.vpp)
    except LayoutError:
        return  # `model.layout` has said so
    if any(plan.oracle_into(stage) is not None for stage in range(len(plan.stages))):
        got = f"{model.block_size} ({num_blocks:,} blocks of train.seq_length = {seq_length:,})"
        allowed = f"{most:,} blocks at most with a pipeline cut inside a hybrid block"
        yield Problem("model.block_size", got, allowed)


def ranks(config: Config, world_size: int) -> Iterator[Problem]:
    """The sizes divide the world size."""
    parallel = config.parallel
    ranks = parallel.tp * parallel.pp * parallel.cp
    if not is_multiple(world_size, ranks):
        got = f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = {ranks} ranks"
        allowed = f"a divisor of the world size, which is {world_size}"
        yield Problem("parallel.tp", got, allowed)
    ranks = parallel.ep * parallel.pp
    if config.model.moe.num_experts > 0 and not is_multiple(world_size, ranks):
        got = f"ep {parallel.ep} x pp {parallel.pp} = {ranks} ranks"
        allowed = f"a divisor of the world size, which is {world_size}"
        yield Problem("parallel.ep", got, allowed)
    yield from _instances(config, world_size)


def _instances(config: Config, world_size: int) -> Iterator[Problem]:
    """Each holds as many of the ranks with the same parameters."""
    parallel = config.parallel
    instances = parallel.num_distributed_optimizer_instances
    if min(parallel.tp, parallel.pp, parallel.ep) < 1:
        return
    for name, ranks in (
        ("parameters", world_size // (parallel.tp * parallel.pp)),
        ("experts", world_size // (parallel.ep * parallel.pp)),
    ):
        if not is_multiple(ranks, instances):
            allowed = f"a divisor of the {ranks} ranks with the same {name}"
            key = "parallel.num_distributed_optimizer_instances"
            yield Problem(key, str(instances), allowed)
            return
