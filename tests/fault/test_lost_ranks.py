"""Faults 9, 10, 17, 23 and 24: ranks that die, hang, are missing, or are not alone."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import SECONDS_TO_FOLLOW
from tests.fault.faulty_runs import (
    FOUR_RANKS,
    SECONDS_TO_NOTICE,
    TIMEOUT,
    FaultyRun,
    free_port,
    rank_pids,
    seconds_of_the_end,
    short,
)
from tests.run.run_commands import LOCAL, run

NewRun = Callable[..., FaultyRun]

SECONDS_OF_A_BUSY_MACHINE = 5


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_killed_rank(ranks: int, new_run: NewRun) -> None:
    """Rank 0 of two, which keeps the store and writes the status; the last of four."""
    killed = 0 if ranks == 2 else 3
    run = new_run(ranks)
    layout = FOUR_RANKS if ranks == 4 else []
    command = run.start(*layout, fault=f"sigkill@{killed}:6")
    assert seconds_of_the_end(command, "step  5/") < TIMEOUT + SECONDS_TO_NOTICE
    assert command.finish() == 1
    run.assert_nothing_left()
    assert f"rank {killed} was killed by SIGKILL" in command.output
    assert re.search(
        rf"RankFailure: no word from rank .*{killed}.* on {socket.gethostname()}", command.output
    )
    run.assert_ended("failed", 1, killed, f"rank {killed} was killed by SIGKILL")
    assert run.status()["checkpoint_step"] == 4
    assert run.status()["checkpoint_age_seconds"] >= 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_stopped_rank(ranks: int, new_run: NewRun) -> None:
    """It outlives the timeout and heeds no SIGTERM; in four ranks a pipeline neighbour waits."""
    run, timeout = new_run(ranks), 12
    settings = [*(FOUR_RANKS if ranks == 4 else []), f"parallel.timeout_seconds={timeout}"]
    stopped = ranks // 2
    command = run.start(*settings, fault=f"sigstop@{stopped}:3")
    limit = timeout + SECONDS_TO_NOTICE + SECONDS_TO_FOLLOW + SECONDS_OF_A_BUSY_MACHINE
    assert timeout - 3 < seconds_of_the_end(command, "step  2/") < limit
    assert command.finish() == 1
    run.assert_nothing_left()
    assert f"Timed out waiting {timeout}000ms" in command.output
    assert re.search(rf"rank .*{stopped}.* was killed: stopped or hanging", command.output)
    run.assert_ended("failed", 1, stopped, rf"no word from rank .*{stopped}.*Timed out waiting")


def test_a_rank_that_fails_by_itself(new_run: NewRun) -> None:
    run = new_run()
    output = run.run(code=1, fault="raise@1:3")
    assert "rank 1 failed:" in output
    assert "Traceback" in output
    run.assert_ended("failed", 1, 1, r"rank 1 on .* failed: RuntimeError: a fault was asked for")


@pytest.mark.parametrize("left", [0, 8_400_000])
def test_a_rank_without_memory(left: int, new_run: NewRun) -> None:
    """Not even for a thread; or for its stack, but not for its first line: then it never begins."""
    run = new_run()
    command = run.start(*short(5), fault=f"out_of_memory@1:3:forward/{left}")
    assert seconds_of_the_end(command, "step 2/") < TIMEOUT / 2
    assert command.finish() == 1, command.output
    run.assert_nothing_left()
    assert "rank 1 failed: MemoryError" in command.output
    run.assert_ended("failed", 1, 1, r"rank 1 on .* failed: MemoryError")


def test_nothing_outlives_a_killed_launcher_and_its_lock_is_stale(new_run: NewRun) -> None:
    run = new_run()
    command = run.start("train.steps=100000", "tracking.log_interval=1")
    command.wait_for("step      3/100000")
    second = run.start(*short(5))
    assert second.finish() == 2, second.output
    owner = f"process {rank_pids(run)[0]} on {socket.gethostname()} since 20"
    assert f"locked by {owner}" in second.output
    assert run.status()["state"] == "running"
    command.send(signal.SIGKILL)
    command.finish()
    run.assert_nothing_left()
    third = run.run(*short(5), code=0)
    assert f"note: {owner}" in third
    assert "ended without giving up" in third


IMPORTED = "| hysparse_megatron.training.run"
"""The last of the imports, which take longer than anything here, told on request."""


def test_a_missing_rank(new_run: NewRun) -> None:
    run = new_run()
    limit = "parallel.timeout_seconds=5"
    command = run.start_rank(0, free_port(), limit, PYTHONPROFILEIMPORTTIME="1")
    command.wait_for(IMPORTED)
    started = time.monotonic()
    assert command.finish() == 1, command.output
    assert time.monotonic() - started < 2 * 5
    assert "1/2 joined within 5 s; missing: rank 1" in command.output
    run.assert_ended("failed", 1, 1, "1/2 joined")
    run.assert_nothing_left()


def test_a_missing_rank_zero(new_run: NewRun) -> None:
    run = new_run()
    command = run.start_rank(1, free_port(), "parallel.timeout_seconds=2")
    assert command.finish() == 1, command.output
    assert "found nobody at" in command.output
    assert not run.run_dir.exists()
    run.assert_nothing_left()


def test_a_port_in_use(new_run: NewRun) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = new_run().run(*short(1), code=0, MASTER_PORT=str(port))
    assert f"note: port {port} cannot be used" in output


def test_another_configuration_on_one_rank(new_run: NewRun) -> None:
    run, port = new_run(), free_port()
    ranks = [run.start_rank(rank, port, f"train.seed={rank}") for rank in (0, 1)]
    assert [rank.finish() for rank in ranks] == [2, 2]
    assert "the configuration differs between ranks" in ranks[0].output
    assert "rank 1 has" in ranks[0].output
    assert not run.run_dir.exists()
    run.assert_nothing_left()


def test_an_unwritable_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    output = run(["--nproc", "2", f"run_dir={tmp_path}/file/run"], entry=LOCAL, code=2)
    assert f"{tmp_path}/file is not a directory" in output
    assert "joined" not in output


BROKEN_TRACKER = """
import os
class Settings:
    def __init__(self, **options): pass
class Run:
    dir = None
    def define_metric(self, *names, **options): pass
    def finish(self, exit_code): raise OSError("gone")
    def log(self, values):
        if values["train/step"] >= 2:
            raise OSError("the tracker is gone")
def init(id, mode, **options):
    if mode == "online":
        raise OSError("no network")
    with open(os.environ["TRACKED_IDS"], "a") as file:
        file.write(id + "\\n")
    return Run()
"""


def test_a_tracker_that_fails(new_run: NewRun, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(BROKEN_TRACKER)
    variables = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "TRACKED_IDS": str(tmp_path / "ids"),
        "WANDB_API_KEY": "none",
    }
    run = new_run(ranks=1)
    output = run.run("tracking.mode=online", *short(4), code=0, **variables)
    assert "W&B did not start online: no network" in output
    assert "W&B stopped: the tracker is gone" in output
    assert [run.row(step)["step"] for step in (1, 2, 3, 4)] == [1, 2, 3, 4]
    run.run("tracking.mode=online", *short(5), code=0, **variables)
    first, second = (tmp_path / "ids").read_text().split()
    assert first == second
