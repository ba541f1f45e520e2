"""Rules of how a model is split over ranks."""

from collections.abc import Iterator

from hysparse_megatron.config.rules.multiples import is_multiple
from hysparse_megatron.config.schema import (
    Config,
)
from hysparse_megatron.errors import Problem


def parallel(config: Config) -> Iterator[Problem]:
    """Sizes that go together."""
    parallel, seq_length = config.parallel, config.train.seq_length
    if parallel.cp > 1:
        yield Problem("parallel.cp", str(parallel.cp), "1: context parallel is not supported yet")
    if parallel.vpp is not None and parallel.pp == 1:
        yield Problem("parallel.vpp", str(parallel.vpp), "null while parallel.pp = 1")
    if parallel.sequence_parallel and parallel.tp == 1:
        yield Problem("parallel.sequence_parallel", "true", "false while parallel.tp = 1")
    if parallel.sequence_parallel and not is_multiple(seq_length, parallel.tp):
        allowed = f"a multiple of parallel.tp = {parallel.tp} with parallel.sequence_parallel"
        yield Problem("train.seq_length", str(seq_length), allowed)


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
