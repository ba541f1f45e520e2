"""One pool of processes and one reference run per model, for the whole session."""

import os
from collections.abc import Iterator

import pytest

from hysparse_megatron.config.frozen import config_hash
from hysparse_megatron.config.schema import Config
from tests.distributed.cases import Case, reference_of
from tests.distributed.comparison import ReferenceFor, gradient_steps
from tests.distributed.pool import WorkerPool
from tests.distributed.ranks import RankRun, train_reference

LEAST_GAP = 2e-4
"""In log score: far above what rounding moves a score by in 20 steps."""
MOST_TRIES = 40
"""Batches drawn per step before giving up; about three of four are good at once."""


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(max_workers=4)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def references() -> dict[str, RankRun]:
    """Those made so far, by the hashes of their configurations."""
    return {}


@pytest.fixture(scope="module")
def reference_for(
    pool: WorkerPool,
    references: dict[str, RankRun],
    session_seed: int,
    request: pytest.FixtureRequest,
) -> ReferenceFor:
    """The one-process run that a configuration is compared with; made once per model.

    Together with those that the file's next tests will ask for, one on each core. Other files may
    run in another process.
    """
    made = references
    its_tests = [item for item in request.session.items if item.path == request.path]
    coming = {config_hash(alone): alone for alone in references_of(its_tests)}

    def make(missing: list[Config]) -> None:
        runs = pool.run_apart(
            train_reference,
            [
                {"config": alone, "steps": alone.train.steps}
                | {"gradient_steps": gradient_steps(alone.train.steps)}
                for alone in missing
            ],
            seed=session_seed,
            least_gap=LEAST_GAP,
            most_tries=MOST_TRIES,
        )
        for alone, run in zip(missing, runs, strict=True):
            made[config_hash(alone)] = run

    def get(config: Config) -> RankRun:
        alone = reference_of(config)
        model = config_hash(alone)
        if model not in made:
            others = [one for key, one in coming.items() if key not in made and key != model]
            make([alone, *others[: (os.cpu_count() or 1) - 1]][: pool.max_workers])
        return made[model]

    return get


def references_of(items: list[pytest.Item]) -> list[Config]:
    """What tests will compare their case with, in their order."""
    found = []
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, Case) and "reference_for" in getattr(item, "fixturenames", ()):
            found.append(reference_of(case.config()))
    return found
