"""One private cluster and one uninterrupted run for all tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.private_cluster import PrivateCluster, SlurmRun, what_is_missing

STEPS = 12

SETTINGS = [
    "experiment=quickstart",  # tensor parallel on each node, the pipeline from one to the other
    "cluster=slurm_cpu",
    "cluster.slurm.setup=['export MASTER_ADDR=127.0.0.1']",  # n1 and n2 are names for Slurm only
    "train.seq_length=64",
    f"train.steps={STEPS}",
    "train.eval_interval=6",
    "train.eval_batches=1",
    "checkpoint.interval=4",
    "optim.warmup_steps=2",
    "optim.decay_steps=2",
    "parallel.timeout_seconds=20",
]

NewRun = Callable[[], SlurmRun]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateCluster]:
    """Two idle nodes."""
    missing = what_is_missing()
    if missing:
        pytest.skip(missing)
    private = PrivateCluster(tmp_path_factory.mktemp("cluster"))
    yield private
    private.stop()


@pytest.fixture
def new_run(cluster: PrivateCluster, tmp_path: Path) -> NewRun:
    """Makes a run in a directory of its own."""
    return lambda: SlurmRun(cluster, tmp_path / "run", SETTINGS)


@pytest.fixture(scope="session")
def straight(cluster: PrivateCluster, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """A run that nobody disturbed."""
    run = SlurmRun(cluster, tmp_path_factory.mktemp("straight") / "run", SETTINGS)
    run.submit()
    assert run.wait_for_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", run.log()
    return run
