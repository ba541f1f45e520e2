"""Rules of batches and their sizes."""

from collections.abc import Iterator

from hysparse_megatron.architecture.layout import LayoutError, parse_layout
from hysparse_megatron.architecture.model import Fp8
from hysparse_megatron.config.rules.multiples import is_multiple
from hysparse_megatron.config.schema import OFFLOAD_MIN_BYTES, Config, Recompute, RecomputeModule
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


def offload(config: Config) -> Iterator[Problem]:
    """It has nothing else to act on where it is off, and meets nothing that it would copy twice."""
    train, fp8 = config.train, config.model.fp8
    if not train.offload_activations:
        if train.offload_min_bytes != OFFLOAD_MIN_BYTES:
            allowed = f"{OFFLOAD_MIN_BYTES}, the default, unless train.offload_activations=true"
            yield Problem("train.offload_min_bytes", str(train.offload_min_bytes), allowed)
    elif fp8 is not Fp8.none:
        allowed = f"false with model.fp8={fp8.value}, whose copies of weights would travel too"
        yield Problem("train.offload_activations", "true", allowed)


def recompute(config: Config) -> Iterator[Problem]:
    """Parts and layers are named where they are recomputed, and there are such parts and layers."""
    train, chosen = config.train, config.train.recompute_modules
    told = f"[{','.join(module.value for module in chosen)}]"
    key = "train.recompute_modules"
    if train.recompute is not Recompute.selective:
        if chosen != [RecomputeModule.attention]:
            yield Problem(key, told, "[attention], the default, unless train.recompute=selective")
    elif not chosen or len(set(chosen)) < len(chosen):
        yield Problem(key, told, "at least one of its values, each once")
    else:
        kinds = _feed_forwards(config)
        for module in chosen:
            if kinds is not None and module not in (*kinds, *_OF_EVERY_LAYER):
                yield Problem(key, told, f"without {module.value}: no layer of the model has it")
    if train.recompute_layers is None:
        return
    if train.recompute is not Recompute.full:
        got = str(train.recompute_layers)
        yield Problem("train.recompute_layers", got, "null unless train.recompute=full")


_OF_EVERY_LAYER = (RecomputeModule.attention, RecomputeModule.norm)


def _feed_forwards(config: Config) -> set[RecomputeModule] | None:
    """Which there are; None with a layout of which its own rule complains."""
    try:
        num_layers = parse_layout(config.model.layout).num_layers
    except LayoutError:
        return None
    return {
        RecomputeModule.experts
        if config.model.is_moe_layer(layer)
        else RecomputeModule.feed_forward
        for layer in range(num_layers)
    }


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
