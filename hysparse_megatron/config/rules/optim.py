"""Rules of the optimizer and its schedule."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator

from hysparse_megatron.config.schema import Config, OptimizerName
from hysparse_megatron.errors import Problem

MUON_PACKAGE = "emerging-optimizers"
MUON_VERSIONS = "0.3"
"""The package that megatron-core takes Muon from, and its versions that are tested here."""


def schedule(config: Config) -> Iterator[Problem]:
    """The learning rate and how its phases fit the run."""
    optim, steps = config.optim, config.train.steps
    if optim.min_learning_rate > optim.learning_rate > 0:
        allowed = f"at most optim.learning_rate = {optim.learning_rate}"
        yield Problem("optim.min_learning_rate", str(optim.min_learning_rate), allowed)
    decay = optim.num_decay_steps(steps)
    if steps > 0 and decay >= 0 and optim.warmup_steps + decay > steps:
        got = f"{optim.warmup_steps} (and {decay} of decay)"
        allowed = f"at most train.steps = {steps} together with optim.decay_steps"
        yield Problem("optim.warmup_steps", got, allowed)


def muon(config: Config) -> Iterator[Problem]:
    """Muon's package, which is optional; asked for without importing it."""
    if config.optim.name is not OptimizerName.muon:
        return
    try:
        installed = importlib.metadata.version(MUON_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        installed = "not installed"
    if not installed.startswith(f"{MUON_VERSIONS}."):
        got = f"muon ({MUON_PACKAGE} {installed})"
        allowed = (
            f"adamw, or muon after: pip install '{MUON_PACKAGE}~={MUON_VERSIONS}.0'\n"
            "(the extra `muon` of this package)"
        )
        yield Problem("optim.name", got, allowed)
