"""Checks that need more than one setting's type. All mistakes are reported at once.

Every rule is one small generator of problems. A rule that needs a sane number leaves the complaint
about it to the bounds of the field, so that one mistake is reported once.
"""

import re
from collections.abc import Callable, Iterator

from hysparse_megatron.architecture.bounds import bound_problems
from hysparse_megatron.config.cluster import cluster_problems
from hysparse_megatron.config.problems import as_error
from hysparse_megatron.config.rules import (
    data,
    debug,
    experts,
    fp8,
    model,
    optim,
    parallel,
    paths,
    tracking,
    train,
)
from hysparse_megatron.config.schema import Config, TrackingMode
from hysparse_megatron.errors import Problem

Rule = Callable[[Config], Iterator[Problem]]


def check(config: Config, world_size: int) -> None:
    """Raise one `ConfigError` that lists every problem, or return."""
    problems = validate(config, world_size=world_size)
    if problems:
        raise as_error(problems)


def validate(config: Config, *, world_size: int) -> list[Problem]:
    """Everything that keeps `config` from running on `world_size` ranks."""
    found = [*_found(RULES, config), *_on_ranks(config, world_size)]
    return [*found, *debug.profiled_ranks(config, world_size)]


def plan_problems(config: Config, *, world_size: int) -> list[Problem]:
    """What of `validate` is about how the model is split over ranks."""
    return [*_found(PLAN_RULES, config), *_on_ranks(config, world_size)]


def _found(rules: tuple[Rule, ...], config: Config) -> Iterator[Problem]:
    for rule in rules:
        yield from rule(config)


def _on_ranks(config: Config, world_size: int) -> Iterator[Problem]:
    yield from parallel.ranks(config, world_size)
    yield from experts.expert_shares(config, world_size)
    yield from train.batches(config, world_size)


def warnings(config: Config) -> list[str]:
    """What will not stop the run but will probably surprise."""
    if config.tracking.mode is TrackingMode.online and not tracking.has_wandb_key():
        return [
            "tracking.mode is online, but there is no WANDB_API_KEY and no `wandb login`: "
            "the run will track offline instead"
        ]
    return []


def _name(config: Config) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", config.name):
        allowed = "letters, digits, dots, dashes and underscores, not starting with a dot or dash"
        yield Problem("name", repr(config.name), allowed)


def _cluster(config: Config) -> Iterator[Problem]:
    yield from cluster_problems(config.cluster)


RULES: tuple[Rule, ...] = (
    bound_problems,
    data.validation_fraction,
    _name,
    model.layout,
    model.heads,
    model.widths,
    model.rotary,
    model.selection,
    model.backend,
    fp8.fp8,
    data.data,
    _cluster,
    parallel.parallel,
    parallel.payload,
    experts.experts,
    experts.dense_ranks,
    optim.schedule,
    train.ramp,
    train.recompute,
    train.offload,
    optim.muon,
    tracking.tensorboard,
    tracking.sample,
    debug.profile,
    paths.run_directory,
    paths.inputs,
)
"""The rules that need nothing but the configuration, in the order they are reported."""

PLAN_RULES: tuple[Rule, ...] = (
    model.layout,
    model.heads,
    model.widths,
    fp8.fp8,
    parallel.parallel,
    parallel.payload,
    experts.experts,
    experts.dense_ranks,
)
"""Those that another parallel plan may satisfy."""
