"""Parallel plans that fit, best first, and a check that names the nearest ones to a bad plan."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hysparse_megatron.architecture.layout import LayoutError, parse_layout
from hysparse_megatron.config.overrides import changes, written
from hysparse_megatron.config.problems import as_error
from hysparse_megatron.config.schema import Config, ParallelConfig, Recompute, RecomputeModule
from hysparse_megatron.config.validate import plan_problems, validate
from hysparse_megatron.errors import ConfigError, Problem
from hysparse_megatron.plan.memory import GIB
from hysparse_megatron.plan.overview import Overview, make_overview
from hysparse_megatron.plan.vocabulary import with_run_vocabulary

SIZES = ("tp", "pp", "vpp", "cp", "ep")
"""Settings of `parallel` that count ranks or their chunks."""

RECOMPUTE_COST = {Recompute.none: 0, Recompute.selective: 1, Recompute.full: 2}


LONG_SEQUENCE = 32_768
"""Tokens from which on plans with context parallelism are tried that nobody asked for."""

SHORTEST_CHUNK = 4096
"""Tokens: chunks of a context-parallel rank that such plans do not go below."""


@dataclass(frozen=True)
class Suggestion:
    """A plan that works, as overrides of the configuration it was made for."""

    overview: Overview
    asked: Config
    """The configuration it was made for."""

    @property
    def overrides(self) -> str:
        """What to write on the command line, behind what was asked for."""
        config, parallel = self.overview.config, self.overview.config.parallel
        above_one = [name for name in ("cp", "ep") if getattr(parallel, name) > 1]
        always = ("tp", "pp", "vpp", "sequence_parallel", *above_one)
        found = changes("parallel", self.asked.parallel, parallel, always)
        found["train.micro_batch_size"] = written(config.train.micro_batch_size)
        found["train.recompute"] = written(config.train.recompute)
        return " ".join(f"{key}={value}" for key, value in found.items())

    def __str__(self) -> str:
        overview = self.overview
        speed = "" if overview.seconds is None else f"{overview.seconds:.3g} s a step, "
        return (
            f"{self.overrides}  ({speed}"
            f"{overview.peak_bytes / GIB:.1f} GiB, waits {overview.time.bubble_share:.0%})"
        )


def suggest(config: Config, world_size: int, count: int = 5) -> list[Suggestion]:
    """Plans of the same model and global batch that work on `world_size` ranks, fastest first."""
    asked, _ = with_run_vocabulary(config)
    found = _fitting(asked, _plans(asked, world_size), world_size)
    found.sort(key=lambda one: (one.overview.time.seconds, one.overview.peak_bytes))
    return found[:count]


def nearest(config: Config, world_size: int, count: int = 3) -> list[Suggestion]:
    """Plans that work and change the fewest and smallest of the settings, nearest first."""
    asked, _ = with_run_vocabulary(config)

    def distance(plan: Config) -> float:
        return _distance(config, plan)

    found: list[Suggestion] = []
    for _, alike in itertools.groupby(sorted(_plans(asked, world_size), key=distance), distance):
        if len(found) >= count:
            break  # memory and time of plans that are further off need not be known
        found += sorted(
            _fitting(asked, alike, world_size), key=lambda one: one.overview.time.seconds
        )
    return found[:count]


def check(config: Config, world_size: int) -> None:
    """Raise one `ConfigError` with every problem, and with plans that work if the plan is wrong.

    Beyond `validate` it refuses a plan that needs more memory than `cluster.memory_gib`.
    """
    problems = validate(config, world_size=world_size)
    fitting = not problems and _memory_problem(config, world_size)
    if fitting:
        problems = [fitting]
    if not problems:
        return
    error = as_error(problems)
    plan_is_wrong = fitting or plan_problems(config, world_size=world_size)
    if not plan_is_wrong or not _has_a_plan(config):
        raise error
    plans = nearest(config, world_size)
    lines = ["nearest plans that work:", *(f"  {plan}" for plan in plans)]
    if not plans:
        ranks = f"{world_size} rank{'s' * (world_size != 1)}"
        lines = [f"no plan of this model and batch works on {ranks}"]
    raise ConfigError("\n".join([str(error), *lines]), problems)


def _has_a_plan(config: Config) -> bool:
    """Whether the model is one that some plan fits, whatever the number of ranks."""
    try:
        layout = parse_layout(config.model.layout)
    except LayoutError:
        return False
    simplest = ParallelConfig(pp=len(layout.cuts) + 1)
    train = dataclasses.replace(config.train, micro_batch_size=1, recompute=_recomputes(config)[0])
    alone = dataclasses.replace(config, parallel=simplest, train=train)
    return not plan_problems(alone, world_size=simplest.pp)


def overview_of(config: Config, world_size: int) -> Overview:
    """The plan of a valid configuration, with the vocabulary that its run would have."""
    config, told = with_run_vocabulary(config)
    return dataclasses.replace(make_overview(config, world_size), vocabulary=told)


def _memory_problem(config: Config, world_size: int) -> Problem | None:
    limit = config.cluster.memory_gib
    if limit is None or config.model.vocab_size is None:
        return None
    overview = make_overview(config, world_size)
    if overview.fits:
        return None
    worst = max(range(len(overview.ranks)), key=lambda rank: overview.ranks[rank].memory.total)
    got = f"a plan of {overview.peak_bytes / GIB:.1f} GiB on pipeline rank {worst}"
    return Problem("cluster.memory_gib", got, f"at most {limit:g} GiB (see tools/plan.py)")


def _plans(config: Config, world_size: int) -> Iterator[Config]:
    """Those that no rule refuses."""
    for candidate in _candidates(config, world_size):
        if (plan := _mended(candidate, world_size)) is not None:
            yield plan


def _fitting(asked: Config, plans: Iterable[Config], world_size: int) -> list[Suggestion]:
    """Those of `plans` that need no more memory than there is."""
    overviews = (make_overview(plan, world_size) for plan in plans)
    return [Suggestion(overview, asked) for overview in overviews if overview.fits]


def _mended(candidate: Config, world_size: int) -> Config | None:
    """`candidate`, with the defaults of what cannot be beside its sizes, or None if these cannot.

    What `PLAN_RULES` find wrong with a setting of `parallel` that is no size is so mended.
    """
    problems = plan_problems(candidate, world_size=world_size)
    wrong = {problem.key.removeprefix("parallel.") for problem in problems}
    defaults = ParallelConfig()
    others = {item.name for item in dataclasses.fields(defaults)} - {*SIZES, "sequence_parallel"}
    if not wrong <= others:
        return None
    if not wrong:
        return candidate
    mended = {name: getattr(defaults, name) for name in wrong}
    parallel = dataclasses.replace(candidate.parallel, **mended)
    plan = dataclasses.replace(candidate, parallel=parallel)
    return None if plan_problems(plan, world_size=world_size) else plan


def _candidates(config: Config, world_size: int) -> Iterator[Config]:
    """Every combination of sizes that could work, the given ones among them."""
    model, moe = config.model, config.model.moe
    try:
        num_layers = parse_layout(model.layout).num_layers
    except LayoutError:
        return
    sizes = _divisors(world_size)
    tensor = [size for size in sizes if size <= max(1, config.cluster.gpus_per_node)]
    pipeline = [size for size in sizes if size <= num_layers]
    expert = [1]
    if moe.num_experts:
        expert = [size for size in sizes if moe.num_experts % size == 0]
    context = {1, config.parallel.cp}
    if config.train.seq_length >= LONG_SEQUENCE:
        longest = config.train.seq_length // (2 * SHORTEST_CHUNK)
        context |= {size for size in sizes if size & (size - 1) == 0 and size <= longest}
    micro = sorted({1, 2, 4, config.train.micro_batch_size})
    for tp, pp, cp, ep, micro_batch in itertools.product(
        tensor, pipeline, sorted(context), expert, micro
    ):
        if tp * pp * cp > world_size or ep * pp > world_size:
            continue
        for vpp in {None, config.parallel.vpp if pp > 1 else None, 2 if pp > 1 else None}:
            for recompute in _recomputes(config):
                yield dataclasses.replace(
                    config,
                    parallel=dataclasses.replace(
                        config.parallel,
                        tp=tp,
                        pp=pp,
                        vpp=vpp,
                        cp=cp,
                        ep=ep,
                        sequence_parallel=tp > 1,
                    ),
                    train=dataclasses.replace(
                        config.train, micro_batch_size=micro_batch, recompute=recompute
                    ),
                )


def _recomputes(config: Config) -> list[Recompute]:
    """All kinds, unless somebody has chosen parts or layers of one."""
    train = config.train
    chosen = train.recompute_modules != [RecomputeModule.attention] or train.recompute_layers
    return [train.recompute] if chosen else list(Recompute)


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _distance(first: Config, second: Config) -> float:
    """Sum of the doublings between two plans' sizes, and what else differs."""

    def size(config: Config, name: str) -> int:
        return max(1, getattr(config.parallel, name) or 1)

    doublings = sum(abs(math.log2(size(first, name) / size(second, name))) for name in SIZES)
    micro = max(1, first.train.micro_batch_size) / second.train.micro_batch_size
    recompute = [RECOMPUTE_COST[config.train.recompute] for config in (first, second)]
    changed = {key.split(".")[1] for key in changes("parallel", first.parallel, second.parallel)}
    others = len(changed - set(SIZES))
    return doublings + abs(math.log2(micro)) + abs(recompute[0] - recompute[1]) + 0.5 * others
