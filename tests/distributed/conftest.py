"""One pool of processes and one reference run per model, for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hysparse_megatron.config.frozen import config_hash
from hysparse_megatron.config.schema import Config
from tests.distributed.cases import Case, reference_of
from tests.distributed.comparison import ParityRow, ReferenceFor, gradient_steps
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
    """The one-process run that a configuration is compared with; made once per model.

    Together with those that the next tests will ask for, one on each core.
    """
    made: dict[str, RankRun] = {}
    coming = {config_hash(alone): alone for alone in references_of(request.session.items)}

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
            request.config.stash[_notes].append(
                f"reference {len(made)}: {run.redrawn} batches with near-ties drawn anew, "
                f"smallest gap left {run.smallest_gap:.1e}"
            )

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
