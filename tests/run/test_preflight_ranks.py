"""`python -m launch.preflight` as several ranks that agree, differ, or are missing."""

import socket
from pathlib import Path

import pytest
from run_commands import TINY, Command

pytestmark = pytest.mark.distributed

PREFLIGHT = ("-m", "launch.preflight")


def start(arguments: list[list[str]], world_size: int) -> list[Command]:
    """The first ranks of `world_size`, one for each list of arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        Command(one, PREFLIGHT, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank, one in enumerate(arguments)
    ]


def test_ranks_that_agree(tmp_path: Path) -> None:
    settings = [*TINY, f"run_dir={tmp_path / 'run'}"]
    ranks = start([settings] * 3, 3)
    # Three ranks do not divide the batch of four: that is found before anything starts.
    assert [rank.finish() for rank in ranks] == [2, 2, 2]
    assert "train.global_batch_size" in ranks[0].output

    ranks = start([settings] * 2, 2)
    assert [rank.finish() for rank in ranks] == [0, 0], ranks[0].output
    told = ranks[0].output
    for line in ("OK    all-reduce    2 ranks", "OK    clocks", "OK    code", "OK    packages"):
        assert line in told
    assert ranks[1].output == ""
    assert not (tmp_path / "run").exists()


def test_a_rank_with_another_configuration_is_named(seed: int, tmp_path: Path) -> None:
    settings = [*TINY, f"run_dir={tmp_path / 'run'}"]
    ranks = start([settings, [*settings, f"train.seed={seed % 10**6}"]], 2)
    assert [rank.finish() for rank in ranks] == [2, 2]
    assert "FAIL  configuration rank 1 on " in ranks[0].output


def test_a_missing_rank_ends_with_75(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, os; from launch import preflight; preflight.JOIN_SECONDS = 3.0; "
        "os._exit(preflight.main(sys.argv[1:]))"
    )
    monkeypatch.setattr("test_preflight_ranks.PREFLIGHT", ("-c", program))
    (rank,) = start([[*TINY, f"run_dir={tmp_path / 'run'}"]], 2)
    assert rank.finish() == 75
    assert "1/2 joined within 3 s; missing: rank 1" in rank.output
