"""Random numbers of tests: fresh ones in every run, the same ones again with HYSPARSE_TEST_SEED=n.

A randomized test takes `seed` or `rng`, or says `usefixtures("seed")` where it draws from `random`
and torch as they are; fixtures that outlive a test take `session_seed`. HYSPARSE_TEST_SEEDS=m runs
all randomized tests, and no others, with the m seeds from HYSPARSE_TEST_SEED on: `make test-seeds`.
"""

import gc
import os
import random
import re
import signal
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.captured import Call

pytest_plugins = ["tests.distributed.table"]

SEED, SEEDS = "HYSPARSE_TEST_SEED", "HYSPARSE_TEST_SEEDS"
FIXTURES = ("session_seed", "seed")
"""Of these the first that a test needs takes the seeds."""
ROUND = "hypothesis_round"
"""Hypothesis draws by itself, anew each time."""
MOST_THREADS = 150
"""Twice what one model's process groups have."""


def pytest_configure(config: pytest.Config) -> None:
    # Who starts us in the background ignores them, and what we start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    # In the environment, so that the workers of pytest-xdist take the same.
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(2**31)))
    # megatron-core lets torch compile its element-wise functions, anew in every process of a test;
    # without the compiler they are the same functions. `make train` runs with it.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Threads of several tests at a time would spin for one another's cores: four times the CPU.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Examples take as long as what else the machine does lets them.
    hypothesis.settings.register_profile("tests", deadline=None)
    hypothesis.settings.load_profile("tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m alone`: of a few files; to import all the others takes longer than most of its tests."""
    if config.option.markexpr != "alone" or not collection_path.match("test_*.py"):
        return None
    return None if "mark.alone" in collection_path.read_text(encoding="utf-8") else True


def pytest_report_header(config: pytest.Config) -> str:
    return f"{SEED}={os.environ[SEED]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if SEEDS not in os.environ:
        return
    first, count = int(os.environ[SEED]), int(os.environ[SEEDS])
    name = next((name for name in FIXTURES if name in metafunc.fixturenames), None)
    if name is None and getattr(metafunc.function, "is_hypothesis_test", False):
        name = ROUND
        metafunc.fixturenames.append(name)
    if name is not None:
        seeds = range(first, first + count)
        metafunc.parametrize(name, seeds, indirect=True, ids=[f"seed={seed}" for seed in seeds])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SEEDS in os.environ:
        fixed = [item for item in items if "seed=" not in item.name]
        config.hook.pytest_deselected(items=fixed)
        items[:] = [item for item in items if "seed=" in item.name]


def pytest_collection_finish() -> None:
    # Collections look at what tests leave behind, not at all that was imported.
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """End the threads of process groups that no test needs any more.

    A model is a circle of references and holds its groups, some seventy threads, until the garbage
    collector comes by. They wake up a hundred times a second each: after some hundred tests a core
    does nothing else.
    """
    if len(os.listdir("/proc/self/task")) > MOST_THREADS:
        gc.collect()


@pytest.fixture(scope="session")
def session_seed(request: pytest.FixtureRequest) -> int:
    """For what is made once for many tests."""
    return getattr(request, "param", int(os.environ[SEED]))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Another one for every test and its parameters, so that trials differ."""
    given = getattr(request, "param", None)
    if given is None and "session_seed" in request.fixturenames:
        given = request.getfixturevalue("session_seed")
    given = int(os.environ[SEED]) if given is None else given
    name = re.sub(r"-?seed=\d+-?", "", request.node.nodeid).replace("[]", "")
    value = (given + zlib.crc32(name.encode())) % 2**32
    print(f"{SEED}={given}, {value} in this test")
    random.seed(value)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A generator of its own."""
    return random.Random(seed)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`call(main, arguments)`: a command in this process; what it wrote, as `out` and `err`."""

    def in_process(main: Callable[[list[str]], int], arguments: list[str], code: int = 0) -> Any:
        capsys.readouterr()
        ended = main(arguments)
        told = capsys.readouterr()
        assert ended == code, told.out + told.err
        return told

    return in_process


@pytest.fixture
def forks_for_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called here and starts `python -m ...` gets a fork that has its imports behind it."""
    import torch

    from tests.forks import ServedPopen

    if not torch.cuda.is_available():
        monkeypatch.setattr("subprocess.Popen", ServedPopen)


@pytest.fixture
def hypothesis_round(request: pytest.FixtureRequest) -> int:
    """See `ROUND`."""
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SEEDS not in os.environ:
        return
    seeds: dict[str, list[str]] = defaultdict(list)
    tests = set()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            found = re.search(r"-?seed=(\d+)-?", report.nodeid)
            if found is None:
                continue
            name = report.nodeid.replace(found[0], "").replace("[]", "")
            tests.add(name)
            if outcome != "passed":
                seeds[name].append(found[1])
    terminalreporter.section("randomized tests")
    count = os.environ[SEEDS]
    terminalreporter.write_line(
        f"{len(tests)} tests, {count} seeds each from {os.environ[SEED]} on"
    )
    for name, failed in sorted(seeds.items()):
        terminalreporter.write_line(f"FAILED {name}: {len(failed)} seeds: {', '.join(failed[:20])}")
    if not seeds:
        terminalreporter.write_line("no failure")
