"""One corpus and one finished run for all tests of the command line."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_commands import TINY, Copy, FinishedRun, run, write_text

STEPS = 40


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As before, whatever a tool in this process asked for."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, session_seed: int) -> list[str]:
    """Overrides that name a small corpus and a cache."""
    folder = tmp_path_factory.mktemp("corpus")
    text = write_text(folder / "text", session_seed)
    return [f"data.path={text}", f"data.cache_dir={folder / 'cache'}"]


@pytest.fixture(scope="session")
def settings(corpus: list[str]) -> list[str]:
    """All overrides of the finished run but its directory."""
    return [
        *TINY,
        *corpus,
        f"train.steps={STEPS}",
        "train.eval_interval=10",
        "checkpoint.interval=10",
        "tracking.sample_tokens=4",
    ]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> FinishedRun:
    """A straight run of one process. Tests must not change its directory: see `copy_of`."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    arguments = [*settings, f"run_dir={run_dir}"]
    output = run(arguments)
    return FinishedRun(run_dir, arguments, output)


@pytest.fixture
def copy_of_finished(finished: FinishedRun, settings: list[str], tmp_path: Path) -> Copy:
    """A run directory that stands after so many steps, and the command that goes on."""

    def copy(step: int) -> tuple[Path, list[str]]:
        run_dir = tmp_path / "copy"
        shutil.copytree(finished.run_dir, run_dir)
        for checkpoint in (run_dir / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        assert (run_dir / "checkpoints" / f"step-{step:08d}").is_dir()
        return run_dir, [*settings, f"run_dir={run_dir}"]

    return copy
