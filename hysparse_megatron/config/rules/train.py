"""Rules of batches and their sizes."""

from collections.abc import Iterator

from hysparse_megatron.config.rules.multiples import is_multiple
from hysparse_megatron.config.schema import (
    Config,
)
from hysparse_megatron.errors import Problem


def ramp(config: Config) -> Iterator[Problem]:
    """Whether it leads to the global batch size; `batches` looks at the sizes on the way."""
    ramp, size = config.train.batch_ramp, config.train.global_batch_size
    if ramp is None:
        return
    if len(ramp) != 3 or min(ramp) < 1:
        allowed = "three integers of at least 1: [start,increment,samples]"
        yield Problem("train.batch_ramp", str(ramp), allowed)
    elif size > 0 and (ramp[0] >= size or (size - ramp[0]) % ramp[1]):
        allowed = f"a start below train.global_batch_size = {size} and increments that lead there"
        yield Problem("train.batch_ramp", str(ramp), allowed)


def batches(config: Config, world_size: int) -> Iterator[Problem]:
    """Batches can be cut into micro-batches on these ranks."""
    parallel, train = config.parallel, config.train
    ranks = parallel.tp * parallel.pp * parallel.cp
    if ranks < 1 or world_size % ranks:
        return
    dp = world_size // ranks
    yield from _cut(config, "train.global_batch_size", [train.global_batch_size], dp)
    if train.ramp is not None and not any(ramp(config)):
        smaller = train.ramp.sizes(train.global_batch_size)[:-1]
        yield from _cut(config, "train.batch_ramp", smaller, dp)


def _cut(config: Config, key: str, sizes: list[int], dp: int) -> Iterator[Problem]:
    """What is wrong with the first of `sizes` that cannot be cut into micro-batches."""
    parallel, train = config.parallel, config.train
    per_pass = train.micro_batch_size * dp
    for size in sizes:
        if not is_multiple(size, per_pass):
            unit = f"train.micro_batch_size = {train.micro_batch_size} x data-parallel size {dp}"
            yield Problem(key, str(size), f"a multiple of {unit}")
            return
        micro_batches = size // max(per_pass, 1)
        if parallel.vpp is not None and not is_multiple(micro_batches, parallel.pp):
            got = f"{size} ({micro_batches} micro-batches on each rank)"
            allowed = f"micro-batches in multiples of parallel.pp = {parallel.pp} with parallel.vpp"
            yield Problem(key, got, allowed)
            return
