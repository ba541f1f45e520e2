"""Faults 1, 2, 4, 6 and 7: runs that are told to stop, and how they go on."""

import os
import signal
import time
from collections.abc import Callable

import psutil

from hysparse_megatron.status import read_status
from tests.fault.faulty_runs import (
    FOUR_RANKS,
    STEPS,
    VARIABLE,
    FaultyRun,
    assert_equal,
    free_port,
    rank_pids,
)
from tests.run.run_commands import Command, facts, rows

NewRun = Callable[..., FaultyRun]


def wait_until(condition: Callable[[], bool], command: Command) -> None:
    while not condition():
        assert command.process.poll() is None, command.output
        time.sleep(0.1)


def test_three_resumes_repeat_the_straight_run(straight: FaultyRun, new_run: NewRun) -> None:
    """Signals in mid-step, in an evaluation and the last one, a kill: bit-equal all the same."""
    run = new_run()
    output = run.run(code=3, fault="sigterm@1:3")
    assert "stopped by SIGTERM on rank 1 after step 3; saved at step 3" in output
    run.assert_ended("preempted", 3, 1, "SIGTERM on rank 1")
    assert run.checkpoints() == [3]

    output = run.run(code=3, fault="sigusr1@1:8:evaluation")
    assert "resuming after step 3" in output
    run.assert_ended("preempted", 3, 1, "SIGUSR1 on rank 1 after step 8; saved at step 8")
    assert (8, True) not in facts(run.run_dir), "the evaluation was left"
    assert run.status()["checkpoint_step"] == 8

    output = run.run(code=1, fault="sigkill@1:11")
    assert "resuming after step 8" in output
    run.assert_ended("failed", 1, 1, "rank 1 was killed by SIGKILL")

    output = run.run(code=3, fault=f"sigterm@1:{STEPS}:evaluation")
    assert "resuming after step 8" in output
    run.assert_ended("preempted", 3, 1, f"after step {STEPS}; saved at step {STEPS}")
    assert (STEPS, True) not in facts(run.run_dir)

    output = run.run(code=0)
    assert f"resuming after step {STEPS}" in output
    assert "is finished" in run.run(code=0), "and the last evaluation is not made twice"
    assert facts(run.run_dir) == facts(straight.run_dir)
    assert len({number for ids in run.sample_ids() for number in ids}) == 4 * STEPS, "each once"
    assert_equal(run.tensors(STEPS), straight.tensors(STEPS))
    status = run.status()
    assert (status["state"], status["restarts"], status["step"]) == ("finished", 4, STEPS)


def test_a_longer_run_with_other_evaluations_sees_the_same_samples(
    straight: FaultyRun, new_run: NewRun
) -> None:
    run = new_run()
    run.take_over(straight, 4)
    output = run.run("train.steps=20", "train.eval_interval=3", code=3, fault="sigterm@0:8")
    assert "resuming after step 4" in output
    assert "train.steps: 12 -> 20" in output
    assert "train.eval_interval: 4 -> 3" in output
    before, after = facts(straight.run_dir), facts(run.run_dir)
    for step in (5, 6, 7, 8):  # the learning rate begins to differ after that
        assert after[step, False] == before[step, False]
        assert len(after[step, False]["sample_ids"]) == 4


def test_a_second_signal_during_the_save_is_ignored(new_run: NewRun) -> None:
    run = new_run()
    output = run.run(code=3, fault="sigusr1@1:3,sigterm@1:3:save")
    assert "rank 1: SIGTERM ignored: already stopping" in output
    assert run.checkpoints() == [3]
    run.assert_ended("preempted", 3, 1, "SIGUSR1 on rank 1")


def test_what_rank_0_does_alone_at_the_end_costs_no_stop(new_run: NewRun) -> None:
    """The others leave, and launchers kill who follows late: a checkpoint of any size that is being
    deleted is left to the next start, and `status.json` is written before trackers are closed."""
    run = new_run()
    fault = "slow@0:2:prune/300,sigterm@1:7"
    run.run("checkpoint.interval=2", "checkpoint.keep=1", code=3, fault=fault)
    run.assert_ended("preempted", 3, 1, "SIGTERM on rank 1 after step 7; saved at step 7")
    assert run.checkpoints()[0] == 2

    run = new_run(ranks=1)
    rank = run.start_rank(0, free_port(), **{VARIABLE: "sigterm@0:3,sigkill@0:0:close"})
    assert rank.finish() == -signal.SIGKILL
    run.assert_ended("preempted", 3, 0, "SIGTERM on rank 0 after step 3; saved at step 3")
    assert run.status()["checkpoint_step"] == 3


def test_a_third_signal_forces_the_end(new_run: NewRun) -> None:
    run = new_run()
    fault = "sigterm@1:6,sigterm@1:6:save,sigint@1:6:save,slow@1:6:save/5"
    output = run.run(code=128 + signal.SIGINT, fault=fault)
    assert "rank 1: SIGINT is the third signal: leaving without saving" in output
    assert run.checkpoints() == [4]
    run.assert_ended("failed", 128 + signal.SIGINT, 1, "rank 1 was forced to end by SIGINT")


def test_the_launcher_passes_a_signal_on(new_run: NewRun) -> None:
    """As a scheduler does it; a bad step before it."""
    run = new_run(ranks=4)
    command = run.start(*FOUR_RANKS, "train.steps=1000", fault="nan@3:2")
    command.wait_for("step    3/1000")
    command.send(signal.SIGUSR1)
    assert command.finish() == 3, command.output
    run.assert_nothing_left()
    run.assert_ended("preempted", 3, run.status()["rank"], "SIGUSR1 on rank")
    assert run.checkpoints()[-1] == run.status()["step"]
    assert run.row(2)["bad"] == "loss not finite on rank 3"


def test_the_deadline(new_run: NewRun) -> None:
    run = new_run(ranks=1)
    output = run.run("train.steps=100000", "train.deadline_minutes=0.2", code=3)
    assert "stopped by deadline on rank 0" in output
    run.assert_ended("preempted", 3, 0, "deadline")
    assert run.checkpoints()[-1] == run.status()["step"]


def test_the_stop_file(new_run: NewRun) -> None:
    run = new_run()
    command = run.start("train.steps=100000", "tracking.log_interval=1")
    command.wait_for("step      3/100000")
    (run.run_dir / "stop").touch()
    assert command.finish() == 3, command.output
    run.assert_nothing_left()
    run.assert_ended("preempted", 3, 0, "stop file on rank 0")
    assert not (run.run_dir / "stop").exists(), "the next start is not stopped by it"

    run = new_run()
    settings = ["tracking.log_interval=1", "train.eval_batches=0"]
    command = run.start(*settings, fault=f"slow@0:{STEPS}:save/3")
    command.wait_for(f"step {STEPS}/{STEPS}")
    (run.run_dir / "stop").touch()
    assert command.finish() == 0, command.output
    assert not (run.run_dir / "stop").exists(), "nor one that comes with the last step"


def test_a_signal_while_data_is_prepared(new_run: NewRun) -> None:
    """On a rank that only waits for the one that prepares."""
    run = new_run()
    command = run.start(fault="slow@0:0:prepare/100")
    wait_until((run.run_dir / "status.json").exists, command)  # written just before
    os.kill(rank_pids(run)[1], signal.SIGUSR1)
    assert command.finish(30) == 3, command.output
    run.assert_nothing_left()
    run.assert_ended("preempted", 3, 1, "SIGUSR1 on rank 1 before any step")


def test_a_closed_terminal_costs_no_run(new_run: NewRun) -> None:
    """Who reads the output is gone, as after `| head`; then the terminal's signal. Meanwhile no
    process of the run listens at an address that another machine could reach."""
    run = new_run()
    endless = ["train.steps=100000", "tracking.log_interval=1"]
    command = run.start(*endless, whose_output_ends_at="step      2/100000")
    wait_until(lambda: (read_status(run.run_dir).get("step") or 0) >= 5, command)
    listening = [
        connection.laddr.ip
        for pid in [command.process.pid, *rank_pids(run)]
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) == {"127.0.0.1"}
    command.send(signal.SIGHUP)
    assert command.finish() == 3
    run.assert_nothing_left()
    run.assert_ended("preempted", 3, run.status()["rank"], "SIGHUP on rank")
    step = run.status()["step"]
    assert run.checkpoints()[-1] == step
    assert [row["step"] for row in rows(run.run_dir) if "loss" in row] == [*range(1, step + 1)]


def test_a_full_disk_while_rows_are_written(new_run: NewRun) -> None:
    """No file grows beyond 4,000 bytes: a few rows of metrics, the whole status, no checkpoint."""
    run = new_run()
    output = run.run("checkpoint.interval=100", code=6, fault="full_disk@0:1:forward/4000")
    assert "step-0000000" in output
    run.assert_ended("failed", 6, None, r"step-0000000\d was not written|cannot be written")
    assert (run.run_dir / "metrics.jsonl").stat().st_size == 4000
