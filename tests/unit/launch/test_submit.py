"""`python -m launch.submit` before anything starts, with a stand-in for sbatch and squeue."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hysparse_megatron.compatibility import compared_settings
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import load_frozen
from launch import submit
from launch.local import Ending
from launch.submit import main
from tests.captured import Call, captured
from tests.checkpoints import write_step
from tests.run.run_commands import children_seconds

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["model=tiny_hysparse", "cluster=slurm_cpu", "train.steps=20", "train.global_batch_size=8"]

Slurm = Callable[..., Path]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Puts programs in front of the path; returns the file to which sbatch writes its arguments."""

    def put(queue: str = "", refusal: str = "") -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        asked = tmp_path / "asked"
        sbatch = f"echo {refusal} >&2; exit 1" if refusal else f"echo $@ >> {asked}; echo '41;here'"
        for name, text in (("sbatch", sbatch), ("squeue", f"echo '{queue}'")):
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return asked

    return put


def test_dry_run_prints_all_and_changes_nothing(slurm: Slurm, tmp_path: Path, call: Call) -> None:
    asked = slurm()
    told = call(main, ["--dry-run", *SMALL, f"run_dir={tmp_path / 'run'}"]).out
    for part in ("parameters:", "GiB at the peak", "bytes sent by a rank", "OK    disk"):
        assert part in told
    assert "#SBATCH --nodes=2" in told
    assert f"would run: sbatch --parsable {tmp_path}/run/job.sbatch" in told
    assert not asked.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "nodes", "crossing"),
    [
        ("long_7b_128k", 8, "3.67 GB"),
        ("long_80b_a3b_128k", 16, "506 MB"),
        ("long_80b_a3b_256k", 32, "1.05 GB"),
        ("long_80b_a3b_1m", 64, "9.01 GB"),
    ],
)
def test_a_dry_run_says_what_long_contexts_send(
    name: str,
    nodes: int,
    crossing: str,
    slurm: Slurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    """Per micro-batch and rank, between the ranks that share a sequence."""
    slurm()
    free = shutil.disk_usage("/")._replace(free=10**14)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    cluster = ("cluster=slurm", f"cluster.nodes={nodes}")
    told = call(main, ["--dry-run", f"experiment={name}", *cluster, f"run_dir={tmp_path}"]).out
    assert f"{8 * nodes} ranks: tp 4" in told
    assert "context / micro-batch" in told
    assert crossing in told


@pytest.mark.thorough
def test_the_80b_on_32_nodes_within_15_seconds_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys, shutil; from launch import checks, submit; "
        "usage = shutil.disk_usage('/')._replace(free=10**14); "
        "checks.shutil.disk_usage = lambda path: usage; "
        "code = submit.main(sys.argv[1:]); sys.exit(code or 99 * ('torch' in sys.modules))"
    )
    start = children_seconds()
    done = captured(
        [
            *(sys.executable, "-c", program, "--dry-run"),
            *("experiment=paper_80b_a3b_32k", "cluster=slurm", "cluster.nodes=32"),
            f"run_dir={tmp_path}",
        ],
        cwd=ROOT,
    )
    assert children_seconds() - start < 15
    for part in ("256 ranks: tp 8, pp 4", "bytes sent by a rank", "#SBATCH --ntasks-per-node=8"):
        assert part in done.stdout


def test_submitting_freezes_the_run_and_notes_the_job(
    slurm: Slurm, tmp_path: Path, call: Call
) -> None:
    asked = slurm()
    run_dir = tmp_path / "run"
    assert "submitted job 41" in call(main, [*SMALL, f"run_dir={run_dir}", "train.seed=77"]).out
    assert asked.read_text() == f"--parsable {run_dir}/job.sbatch\n"
    assert load_frozen(run_dir / "config.yaml").train.seed == 77
    record = json.loads((run_dir / "run.json").read_text())
    assert (record["jobs"], record["starts"]) == (["41"], [])
    assert len(record["id"]) == 8
    assert (run_dir / "logs").is_dir()
    assert "train.seed: 77 -> 78" in call(main, [*SMALL, f"run_dir={run_dir}", "train.seed=78"]).out
    again = json.loads((run_dir / "run.json").read_text())
    assert (again["id"], again["jobs"]) == (record["id"], ["41", "41"])


def test_a_run_whose_job_is_queued_is_refused_and_stays_as_it_was(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm()
    run_dir = tmp_path / "run"
    main([*SMALL, f"run_dir={run_dir}"])
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    slurm(queue="PENDING")
    assert main([*SMALL, f"run_dir={run_dir}", "train.seed=78"]) == 2
    assert f"job 41 of {run_dir} is in the queue (pending)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before


def test_what_sbatch_refuses_is_told(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(refusal="invalid partition")
    assert main([*SMALL, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "sbatch refused it: invalid partition" in capsys.readouterr().err


def test_without_slurm_it_says_what_it_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told = call(main, [*SMALL, f"run_dir={tmp_path / 'run'}"], code=2)
    assert f"no sbatch here; would run: sbatch --parsable {tmp_path}/run/job.sbatch" in told.err
    assert "#SBATCH --nodes=2" in told.out
    assert not (tmp_path / "run").exists()


def test_a_failed_check_starts_nothing(slurm: Slurm, tmp_path: Path, call: Call) -> None:
    asked = slurm()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    arguments = [*SMALL, f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}"]
    assert "not started: a check failed" in call(main, arguments, code=2).err
    assert not asked.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster.slurm.time_limit=86400"], "in quotes"),
        (["cluster.slurm.options=['--nodes=3']"], "options that the job script does not set"),
        (["cluster.slurm.options=['partition']"], "one option a line"),
        (["cluster.slurm.options=['-N3']"], "options that the job script does not set"),
        (["cluster.slurm.options=['--gres=gpu:1 --outp=x']"], "options that the job script does"),
        (["cluster.nodes=3", "parallel.tp=4"], "a divisor of the world size, which is 6"),
        (["cluster.scheduler=local", "cluster.nodes=2"], "start torchrun on every machine"),
        (["-m", "--config", "x"], "--config names one run"),
        (["cluster=slurmm"], "one of h100"),
    ],
)
def test_mistakes_exit_with_2(arguments: list[str], message: str, call: Call) -> None:
    assert message in call(main, ["--dry-run", *SMALL, *arguments], code=2).err


def test_a_sweep_submits_a_job_for_each_point(slurm: Slurm, tmp_path: Path, call: Call) -> None:
    asked = slurm()
    sweep = [*SMALL, f"run_dir={tmp_path / 'sweep'}", "optim.learning_rate=1e-3,2e-3"]
    told = call(main, ["-m", *sweep]).out
    folders = [tmp_path / "sweep" / f"learning_rate_0.00{n}" for n in (1, 2)]
    assert asked.read_text() == "".join(f"--parsable {path}/job.sbatch\n" for path in folders)
    table = told[told.index("run  ") :].splitlines()
    assert [line.split()[:2] for line in table[1:]] == [[str(path), "41"] for path in folders]
    rates = [load_frozen(path / "config.yaml").optim.learning_rate for path in folders]
    assert rates == [1e-3, 2e-3]


def test_a_sweep_that_is_told_to_stop_starts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run is interrupted, the points after it are not; of those before it one has failed."""
    endings = [Ending(1), Ending(0), Ending(3, told=True)]
    started = []

    def launch(words: list[str]) -> Ending:
        started.append(words[-1])
        # As a run leaves it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return endings[len(started) - 1]

    monkeypatch.setattr(submit, "launch", launch)
    before = signal.getsignal(signal.SIGTERM)
    sweep = ["model=tiny_hysparse", f"run_dir={tmp_path}", "train.seed=1,2,3,4,5"]
    assert main(["-m", *sweep]) == 3
    assert started == [f"{tmp_path}/seed_{seed}/config.yaml" for seed in (1, 2, 3)]
    assert signal.getsignal(signal.SIGTERM) is before
    told = capsys.readouterr()
    assert "told to stop: 2 more are not started" in told.err
    assert f"{tmp_path}/seed_5" in told.out


def test_a_queue_that_does_not_answer(
    slurm: Slurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    asked = slurm()
    arguments = [*SMALL, f"run_dir={tmp_path / 'run'}"]
    assert main(arguments) == 0
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(submit, "_QUEUE_SECONDS", 0.2)
    assert "squeue gave no answer within 0.2 s, so that job 41" in call(main, arguments, code=2).err
    assert len(asked.read_text().splitlines()) == 1


def test_one_bad_point_submits_none(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = slurm()
    assert main(["-m", *SMALL, f"run_dir={tmp_path}", "train.global_batch_size=8,7"]) == 2
    assert "train.global_batch_size=7" in capsys.readouterr().err
    assert not asked.exists()


@pytest.mark.thorough
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_one_point_over_the_run_of_another_model_submits_none(
    dry_run: list[str], slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = slurm()
    made = compose([*SMALL, "model.window=32"])
    taken = tmp_path / "runs" / "seed_2"
    write_step(taken / "checkpoints", 4, {"data": {}, **compared_settings(made)})
    sweep = ["-m", "train.seed=1,2", f"run_dir={tmp_path / 'runs'}"]
    assert main([*dry_run, *SMALL, *sweep]) == 2
    assert "model.window: the checkpoint has 32, asked for 64" in capsys.readouterr().err
    assert not asked.exists()
    assert sorted(tmp_path.rglob("*.yaml")) == []


@pytest.mark.thorough
@pytest.mark.usefixtures("forks_for_commands")
def test_without_a_scheduler_it_runs_here(tmp_path: Path) -> None:
    done = captured(
        [
            *(sys.executable, "-m", "launch.submit", "model=tiny_hysparse", "train.steps=3"),
            *("optim.warmup_steps=1", "train.seq_length=64", f"run_dir={tmp_path / 'run'}"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert "OK    disk" in done.stdout
    assert "step 3/3" in done.stdout
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
