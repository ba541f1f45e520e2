"""The points of a sweep, in Hydra's grammar: `a=1,2`, `a=range(1,4)`, `a=choice(x,y)`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError

_LONGEST_NAME = 100


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what it chose where others chose otherwise, and its configuration."""

    chosen: tuple[str, ...]
    config: Config


def points(overrides: Sequence[str]) -> list[Point]:
    """All combinations, in the order of the overrides, the last one fastest.

    Each is named after what it chose, and has a run directory of that name: below `run_dir` where
    that is given. In W&B they are one group. Raises ConfigError for what Hydra cannot read, and for
    values given twice.
    """
    choices = [_choices(override) for override in overrides]
    found = []
    for combination in itertools.product(*choices):
        chosen = tuple(
            override for override, among in zip(combination, choices, strict=True) if len(among) > 1
        )
        found.append(Point(chosen, _named(compose(list(combination)), chosen, overrides)))
    names = [point.config.name for point in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"two points of the sweep are the same: {', '.join(sorted(twice))}")
    return found


def _choices(override: str) -> list[str]:
    """One override as those it stands for."""
    if override.startswith("--"):
        return [override]  # a folder of presets
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
        if not parsed.is_sweep_override():
            return [override]
        key = override.partition("=")[0]
        return [f"{key}={value}" for value in parsed.sweep_string_iterator()]
    except HydraException as error:
        if "(" in override and "layout" in override:
            return [override]  # its parentheses are the layout's, which `compose` quotes
        told = str(error).partition("\n")[0]
        raise ConfigError(f"{override}: not a sweep that Hydra can read ({told})") from error


def _named(config: Config, chosen: Sequence[str], overrides: Sequence[str]) -> Config:
    if not chosen:
        return config
    suffix = "-".join(_short(override) for override in chosen)
    name = f"{config.name}-{suffix}"[:_LONGEST_NAME]
    below = any(override.startswith("run_dir=") for override in overrides)
    path = f"{config.run_dir}/{suffix}" if below else f"runs/{name}"
    tracking = replace(config.tracking, group=config.tracking.group or config.name)
    return replace(config, name=name, run_dir=path, tracking=tracking)


def _short(override: str) -> str:
    """`optim.learning_rate=1e-3` as `learning_rate_1e-3`, fit for a file name."""
    key, _, value = override.partition("=")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{key.rpartition('.')[2]}_{value}").strip("_")
