"""Rules of mixture of experts."""

from collections.abc import Iterator

from hysparse_megatron.architecture.layout import LayoutError, parse_layout
from hysparse_megatron.architecture.model import Balancing, RouterScore
from hysparse_megatron.architecture.stages import stage_layers
from hysparse_megatron.config.rules.multiples import is_multiple
from hysparse_megatron.config.schema import Config, OptimizerName
from hysparse_megatron.errors import Problem


def experts(config: Config) -> Iterator[Problem]:
    """Experts, their router and the ranks that share them."""
    model, parallel = config.model, config.parallel
    moe = model.moe
    if moe.num_experts < 1:
        if parallel.ep > 1:
            allowed = "1 while model.moe.num_experts = 0: the model is dense"
            yield Problem("parallel.ep", str(parallel.ep), allowed)
        return
    if moe.num_active_experts > moe.num_experts:
        allowed = f"at most model.moe.num_experts = {moe.num_experts}"
        yield Problem("model.moe.num_active_experts", str(moe.num_active_experts), allowed)
    if moe.num_active_experts == 1 and moe.router_score is RouterScore.softmax:
        allowed = "at least 2 with softmax, whose normalised weight of one expert is always 1"
        yield Problem("model.moe.num_active_experts", "1", allowed)
    if moe.balancing is Balancing.bias and moe.router_score is not RouterScore.sigmoid:
        allowed = "another one with softmax; bias needs model.moe.router_score = sigmoid"
        yield Problem("model.moe.balancing", "bias", allowed)
    if not is_multiple(moe.num_experts, parallel.ep):
        divisors = [str(n) for n in range(1, moe.num_experts + 1) if moe.num_experts % n == 0]
        allowed = f"a divisor of model.moe.num_experts = {moe.num_experts}: {', '.join(divisors)}"
        yield Problem("parallel.ep", str(parallel.ep), allowed)
    width = moe.shared_expert_ffn_hidden_size
    if not is_multiple(width, parallel.tp):
        allowed = f"a multiple of parallel.tp = {parallel.tp}"
        yield Problem("model.moe.shared_expert_ffn_hidden_size", str(width), allowed)
    if parallel.tp > 1 and not parallel.sequence_parallel:
        allowed = "true with experts and parallel.tp > 1: each rank routes tokens of its own"
        yield Problem("parallel.sequence_parallel", "false", allowed)


def dense_ranks(config: Config) -> Iterator[Problem]:
    """megatron-core's optimizer waits forever for a pipeline rank that has no experts."""
    moe, parallel = config.model.moe, config.parallel
    if moe.num_experts < 1 or moe.num_dense_first_layers < 1:
        return
    try:
        layout = parse_layout(config.model.layout)
        stages = stage_layers(layout, max(parallel.pp, 1) * max(parallel.vpp or 1, 1))
    except LayoutError:
        return  # `model.layout` has said so
    for rank in range(parallel.pp):
        last = max(layer for stage in stages[rank :: parallel.pp] for layer in stage)
        if last < moe.num_dense_first_layers:
            allowed = f"at most {last}, so that every pipeline rank has a layer with experts"
            got = str(moe.num_dense_first_layers)
            yield Problem("model.moe.num_dense_first_layers", got, allowed)
            return


def expert_shares(config: Config, world_size: int) -> Iterator[Problem]:
    """Experts that several ranks hold although all of them are one data-parallel rank.

    megatron-core's layer-wise optimizer deals no matrices out where the data-parallel size is 1:
    each such rank would update every expert with the gradient of its own tokens alone.
    """
    parallel, moe = config.parallel, config.model.moe
    if config.optim.name is not OptimizerName.muon or moe.num_experts < 1:
        return
    dp = world_size // max(parallel.tp * parallel.pp * parallel.cp, 1)
    if dp == 1 and 0 < parallel.ep < parallel.tp:
        allowed = f"parallel.tp = {parallel.tp} with optim.name = muon and data-parallel size 1"
        yield Problem("parallel.ep", str(parallel.ep), allowed)
