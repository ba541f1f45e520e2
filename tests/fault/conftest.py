"""One corpus and one straight run for all faults; see `faulty_runs.py` for what tests start."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault.faulty_runs import FOUR_RANKS, FaultyRun
from tests.run.run_commands import write_text

SEED = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.fault)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small corpus and a cache."""
    folder = tmp_path_factory.mktemp("data")
    text = write_text(folder / "text", SEED)
    return [f"data.path={text}", f"data.cache_dir={folder / 'cache'}"]


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> FaultyRun:
    """A run of two ranks to which nothing happened."""
    run = FaultyRun(tmp_path_factory.mktemp("straight") / "run", data)
    run.run(code=0)
    return run


@pytest.fixture(scope="session")
def straight_four(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> FaultyRun:
    """The same on four: tensor parallel 2, pipeline parallel 2."""
    run = FaultyRun(tmp_path_factory.mktemp("straight_four") / "run", data, ranks=4)
    run.run(*FOUR_RANKS, code=0)
    return run


@pytest.fixture
def new_run(tmp_path: Path, data: list[str]) -> Iterator[Callable[..., FaultyRun]]:
    """Makes runs in directories of their own, and ends what a test leaves running."""
    made: list[FaultyRun] = []

    def make(ranks: int = 2) -> FaultyRun:
        made.append(FaultyRun(tmp_path / f"run{len(made)}", data, ranks))
        return made[-1]

    yield make
    for run in made:
        run.close()
