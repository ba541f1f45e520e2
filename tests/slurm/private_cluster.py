"""A Slurm of our own: one controller and two nodes on this machine, from the system's packages."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.captured import captured

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")

_CONFIGURATION = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def what_is_missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    return f"not installed: {', '.join(missing)} (Debian: slurm-wlm)" if missing else None


class PrivateCluster:
    """Starts the daemons in `folder`; `stop` ends them and every job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
        configuration = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        configuration.write_text(
            _CONFIGURATION.format(
                host=host, user=getpass.getuser(), folder=folder, ports=_free_ports(3)
            )
        )
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(configuration),
            "PYTHONUNBUFFERED": "1",
        }
        self.call("slurmctld", "-i")
        for node in ("n1", "n2"):
            self.call("slurmd", "-N", node)
        wait_until(lambda: self.call("sinfo", "-h", "-o", "%t %D").strip() == "idle 2", 60)

    def call(self, *command: str) -> str:
        """Run one of Slurm's programs and return what it printed."""
        done = captured(command, env=self.environment, timeout=60)
        return done.stdout

    def submit(self, overrides: Sequence[str], code: int = 0, **variables: str) -> str:
        """`python -m launch.submit`; returns everything it printed."""
        done = captured(
            [sys.executable, "-m", "launch.submit", *overrides],
            cwd=ROOT,
            env={**self.environment, **variables},
            timeout=120,
            code=code,
        )
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... of a job that the controller remembers."""
        told = self.call("scontrol", "show", "job", "--oneliner", job)
        return told.partition("JobState=")[2].split()[0]

    def restarts(self, job: str) -> int:
        """How often the job was put back into the queue."""
        told = self.call("scontrol", "show", "job", "--oneliner", job)
        return int(told.partition("Restarts=")[2].split()[0])

    def start_now(self, job: str) -> None:
        """Do not let a requeued job wait for the two minutes that Slurm lets it.

        A little it must: nodes refuse a start within a second of the end of the one before.
        """
        time.sleep(3)
        self.call("scontrol", "update", f"jobid={job}", "StartTime=now")

    def stop(self) -> None:
        """End all jobs and the daemons."""
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            self.call("scancel", "--signal=KILL", "--full", "--user", getpass.getuser())
            self.call("scancel", "--user", getpass.getuser())
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not any(map(_is_alive, pids)), 20)
        for pid in filter(_is_alive, pids):
            os.kill(pid, signal.SIGKILL)


class SlurmRun:
    """One run directory and its job."""

    def __init__(self, cluster: PrivateCluster, run_dir: Path, settings: Sequence[str]) -> None:
        self.cluster = cluster
        self.run_dir = run_dir
        self.settings = [*settings, f"run_dir={run_dir}"]
        self.job = ""

    def submit(self, *more: str, **variables: str) -> None:
        """Submit it; environment variables reach the ranks."""
        output = self.cluster.submit([*self.settings, *more], **variables)
        self.job = output.partition("submitted job ")[2].partition(":")[0]
        assert self.job, output

    def log(self) -> str:
        """What the job has printed so far, over all its starts."""
        path = self.run_dir / "logs" / f"slurm-{self.job}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, seconds: float = 150) -> None:
        """Until the log holds `text`; fails if the job ends before."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_until(
            lambda: text in self.log() or self.cluster.state(self.job) in over, seconds, self.log
        )
        assert text in self.log(), self.log()

    def wait_for_state(self, *states: str, seconds: float = 150) -> str:
        """Until the job is in one of `states`, which is returned."""
        wait_until(lambda: self.cluster.state(self.job) in states, seconds, self.log)
        return self.cluster.state(self.job)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run directory."""
        return json.loads((self.run_dir / name).read_text())

    def facts(self) -> dict[tuple[int, bool], tuple[float, ...]]:
        """What must be bit-equal in `metrics.jsonl`, by (step, whether it is an evaluation)."""
        found: dict[tuple[int, bool], tuple[float, ...]] = {}
        for line in (self.run_dir / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if "eval_loss" in row:
                found[row["step"], True] = (row["eval_loss"],)
            else:
                found[row["step"], False] = (row["loss"], row["grad_norm"], row["learning_rate"])
        return found


def wait_until(
    condition: Callable[[], bool], seconds: float, tell: Callable[[], str] = str
) -> None:
    """Look twice a second; fails with what `tell` says when the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {tell()}"
        time.sleep(0.5)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
