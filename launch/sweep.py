"""The points of a sweep, in Hydra's grammar: `a=1,2`, `a=range(1,4)`, `a=choice(x,y)`."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError

_LONGEST_SUFFIX = 100
"""Characters of a name that say what was chosen."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what it chose where others chose otherwise, and its configuration."""

    chosen: tuple[str, ...]
    config: Config


def points(overrides: Sequence[str]) -> list[Point]:
    """All combinations, in the order of the overrides, the last one fastest.

    Each is named after what it chose, and has a run directory of that name: below `run_dir` where
    that is set. In W&B they are one group. Raises ConfigError for what Hydra cannot read, and for
    values given twice.
    """
    choices = [_choices(override) for override in overrides]
    combinations = list(itertools.product(*choices))
    chosen = [
        tuple(one for one, among in zip(combination, choices, strict=True) if len(among) > 1)
        for combination in combinations
    ]
    twice = sorted(" ".join(one) for one, count in Counter(chosen).items() if count > 1)
    if twice:
        raise ConfigError(f"two points of the sweep are the same: {', '.join(twice)}")
    below = any(override.startswith("run_dir=") for override in overrides)
    return [
        Point(one, _named(compose(list(combination)), suffix, below))
        for combination, one, suffix in zip(combinations, chosen, _suffixes(chosen), strict=True)
    ]


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


def _suffixes(chosen: Sequence[tuple[str, ...]]) -> list[str]:
    """What the names of the points end with, each another one that a file may be called.

    Choices that differ in what no such name holds, or behind what fits, are told apart by a hash.
    """
    short = ["-".join(map(_short, overrides))[:_LONGEST_SUFFIX] for overrides in chosen]
    shared = {suffix for suffix, count in Counter(short).items() if count > 1}
    return [
        f"{suffix}-{hashlib.sha256(repr(overrides).encode()).hexdigest()[:8]}"
        if suffix in shared
        else suffix
        for suffix, overrides in zip(short, chosen, strict=True)
    ]


def _named(config: Config, suffix: str, below: bool) -> Config:
    """`below`: the run directory lies below `run_dir`, as where a preset sets that."""
    if not suffix:
        return config
    name = f"{config.name}-{suffix}"
    below = below or config.run_dir != f"runs/{config.name}"
    path = f"{config.run_dir}/{suffix}" if below else f"runs/{name}"
    tracking = replace(config.tracking, group=config.tracking.group or config.name)
    return replace(config, name=name, run_dir=path, tracking=tracking)


def _short(override: str) -> str:
    """`optim.learning_rate=1e-3` as `learning_rate_1e-3`, fit for a file name."""
    key, _, value = override.partition("=")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{key.rpartition('.')[2]}_{value}").strip("_")
