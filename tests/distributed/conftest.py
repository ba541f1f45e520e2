"""One pool of processes and one reference run per model, for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hysparse_megatron.config.frozen import config_hash
from hysparse_megatron.config.schema import Config
from tests.distributed.cases import STEPS, reference_of
from tests.distributed.comparison import GRADIENT_STEPS, ParityRow, ReferenceFor
from tests.distributed.pool import WorkerPool
from tests.distributed.ranks import RankRun, train_reference

LEAST_GAP = 2e-4
"""In log score: far above what rounding moves a score by in 20 steps."""
MOST_TRIES = 40
"""Batches drawn per step before giving up; about three of four are good at once."""

_rows = pytest.StashKey[list[ParityRow]]()
_notes = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.stash[_notes] = []


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(max_workers=4)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def reference_for(
    pool: WorkerPool, session_seed: int, request: pytest.FixtureRequest
) -> ReferenceFor:
    """The one-process run that a configuration is compared with; made once per model."""
    made: dict[str, RankRun] = {}

    def get(config: Config) -> RankRun:
        alone = reference_of(config)
        model = config_hash(alone)
        if model not in made:
            made[model] = pool.run(
                1,
                train_reference,
                config=alone,
                seed=session_seed,
                steps=STEPS,
                gradient_steps=GRADIENT_STEPS,
                least_gap=LEAST_GAP,
                most_tries=MOST_TRIES,
            )[0]
            run = made[model]
            request.config.stash[_notes].append(
                f"reference {len(made)}: {run.redrawn} batches with near-ties drawn anew, "
                f"smallest gap left {run.smallest_gap:.1e}"
            )
        return made[model]

    return get


@pytest.fixture(scope="session")
def parity_rows(request: pytest.FixtureRequest) -> list[ParityRow]:
    return request.config.stash[_rows]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    notes, rows = config.stash[_notes], config.stash[_rows]
    if not notes and not rows:
        return
    terminalreporter.section("layouts compared with one process")
    for note in notes:
        terminalreporter.write_line(note)
    if not rows:
        return
    width = max(len(row.name) for row in rows)
    terminalreporter.write_line(
        f"{'layout':{width}}  ranks  max loss diff  max grad-norm diff  "
        "max rel. gradient diff  selections  verdict"
    )
    for row in rows:
        terminalreporter.write_line(
            f"{row.name:{width}}  {row.ranks:5}  {row.loss:13.1e}  {row.grad_norm:18.1e}  "
            f"{row.gradient:22.1e}  {row.selections:10}  {row.verdict}"
        )
