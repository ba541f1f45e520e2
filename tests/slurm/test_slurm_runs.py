"""Fault 25: whole jobs over two nodes of a real Slurm, pre-empted, crashing, cancelled."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.captured import captured
from tests.slurm.private_cluster import ROOT, PrivateCluster, SlurmRun
from tools.measure_prepare import write_corpus

pytestmark = pytest.mark.slurm

NewRun = Callable[[], SlurmRun]


def test_a_straight_run_checks_both_nodes_and_finishes(straight: SlurmRun) -> None:
    log = straight.log()
    assert "the same on all 4 ranks" in log
    assert "all-reduce    4 ranks" in log
    assert "FAIL" not in log
    assert "leave: finished" in log
    status = straight.read("status.json")
    assert (status["state"], status["exit_code"], status["restarts"]) == ("finished", 0, 0)
    record = straight.read("run.json")
    assert record["jobs"] == [straight.job]
    copied = record["starts"][0]["git"]["snapshot"]
    assert f"code          the same on all 4 ranks: {copied}" in log
    assert (straight.run_dir / copied / "hysparse_megatron").is_dir()


def test_a_preempted_job_is_requeued_and_repeats_the_straight_run(
    cluster: PrivateCluster, straight: SlurmRun, new_run: NewRun
) -> None:
    """The signal that Slurm sends before the time limit and before pre-emption, to the script."""
    run = new_run()
    run.submit("tracking=wandb_offline")
    run.wait_for("step  5/12")
    cluster.call("scancel", "--signal=USR1", "--batch", run.job)
    run.wait_for("requeue: pre-empted: stopped by SIGUSR1")
    run.wait_for_state("PENDING")
    second = cluster.submit(run.settings, code=2)
    assert f"job {run.job} of {run.run_dir} is in the queue (pending)" in second
    status = run.read("status.json")
    assert (status["state"], status["exit_code"]) == ("preempted", 3)
    stopped = status["checkpoint_step"]
    assert 5 <= stopped < 12
    cluster.start_now(run.job)

    assert run.wait_for_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", run.log()
    assert f"resuming after step {stopped}" in run.log()
    assert run.facts() == straight.facts()
    assert cluster.restarts(run.job) == 1
    record = run.read("run.json")
    assert [start["slurm_job"] for start in record["starts"]] == [run.job, run.job]
    offline = [path.name for path in (run.run_dir / "wandb").glob("offline-run-*")]
    assert len(offline) == 2
    assert {name.rpartition("-")[2] for name in offline} == {record["id"]}


def test_two_nodes_prepare_the_bytes_of_one(cluster: PrivateCluster, tmp_path: Path) -> None:
    """Tasks of an array; one that fails is told by file, and the same command goes on."""
    source = write_corpus(tmp_path / "in.jsonl", 18_000_000)
    command = [sys.executable, "-m", "tools.prepare_data", "--tokenizer", "bytes", "--max-bad=0"]

    def prepare(output: str, *options: str, code: int = 0) -> str:
        return captured(
            [*command, *options, "--output", str(tmp_path / output), str(tmp_path / "in.jsonl")],
            cwd=ROOT,
            env=cluster.environment,
            timeout=180,
            code=code,
        ).stderr

    by_cluster = ["--executor", "slurm", "--slurm-partition=main", "--slurm-time=10"]
    by_cluster += ["--workers=4", "--slurm-option=mem-per-cpu=100M", "--quiet"]
    whole = source.read_bytes()
    source.write_bytes(whole + b"no JSON\n")
    told = prepare("out", *by_cluster, code=5)
    assert f"in.jsonl: not a JSON object, line at offset {len(whole)}" in told
    source.write_bytes(whole)
    prepare("out", *by_cluster, "--overwrite")
    prepare("here")
    for name in ("train.bin", "train.idx", "validation.bin", "dataset.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert not (tmp_path / "out.work").exists()


def test_a_crash_loop_stops(cluster: PrivateCluster, new_run: NewRun) -> None:
    """The first crash is after a checkpoint, the second at the same step again."""
    run = new_run()
    run.submit("cluster.slurm.preflight=false", HYSPARSE_FAULT="sigkill@3:7")
    run.wait_for("requeue: failed: ")
    assert re.search(r"requeue: failed: .*rank 3.*; it had got to step 4", run.log()), run.log()
    run.wait_for_state("PENDING")
    cluster.start_now(run.job)
    run.wait_for("leave: failed: ")
    assert "no checkpoint after step 4, so it would again" in run.log()
    assert run.wait_for_state("FAILED", "PENDING", "COMPLETED") == "FAILED"
    assert cluster.restarts(run.job) == 1
    assert run.read("requeue.json")["failures"] == 2


def test_a_cancelled_job_saves_and_is_not_requeued(
    cluster: PrivateCluster, new_run: NewRun
) -> None:
    run = new_run()
    run.submit("cluster.slurm.preflight=false", "train.steps=1000")
    run.wait_for("step    3/1000")
    cluster.call("scancel", run.job)
    run.wait_for_state("CANCELLED")
    run.wait_for("stopped by SIGTERM")
    status = run.read("status.json")
    assert status["state"] == "preempted"
    assert status["checkpoint_step"] == status["step"] >= 3
    assert cluster.restarts(run.job) == 0
    assert "requeue" not in run.log()


def test_a_second_job_on_the_same_run_directory_is_refused(
    cluster: PrivateCluster, new_run: NewRun
) -> None:
    """By the directory's lock, when it was not `launch.submit` that started the second one."""
    run = new_run()
    run.submit(
        "cluster.slurm.preflight=false",
        "train.steps=1000",
        "cluster.nodes=1",
        "parallel.pp=1",
        "model.layout=F 3*S F",
    )
    run.wait_for("step    2/1000")
    script = str(run.run_dir / "job.sbatch")
    second = SlurmRun(cluster, run.run_dir, [])
    second.job = cluster.call("sbatch", "--parsable", script).strip()
    assert second.wait_for_state("COMPLETED", "FAILED") == "FAILED"
    assert "is locked by process" in second.log()
    assert cluster.state(run.job) == "RUNNING"
    assert run.read("status.json")["state"] == "running"
    cluster.call("scancel", run.job)
    run.wait_for_state("CANCELLED")
