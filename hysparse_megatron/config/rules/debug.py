"""Rules of what looks inside a run."""

from collections.abc import Iterator

from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import Problem


def profile(config: Config) -> Iterator[Problem]:
    """The profiled steps are steps of the run, and somebody records them."""
    profile, total = config.debug.profile, config.train.steps
    if profile.step_range is None:
        return
    got = str(profile.step_range)
    if len(profile.step_range) != 2 or not 1 <= profile.step_range[0] <= profile.step_range[1]:
        allowed = "[first,last] with 1 <= first <= last, or null"
        yield Problem("debug.profile.step_range", got, allowed)
    elif 1 <= total < profile.step_range[1]:
        yield Problem("debug.profile.step_range", got, f"steps up to train.steps = {total}")
    if not profile.ranks or min(profile.ranks) < 0:
        yield Problem("debug.profile.ranks", str(profile.ranks), "ranks from 0, at least one")


def profiled_ranks(config: Config, world_size: int) -> Iterator[Problem]:
    """The ranks that record are there."""
    profile = config.debug.profile
    if profile.step_range is not None and max(profile.ranks, default=0) >= world_size:
        allowed = f"ranks below the world size, which is {world_size}"
        yield Problem("debug.profile.ranks", str(profile.ranks), allowed)
