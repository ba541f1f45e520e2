"""Settings of the machines: what the planner must know about them, and how jobs get there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from hysparse_megatron.errors import Problem

_TIME_LIMIT = r"(\d+-)?\d+:\d\d:\d\d"
_OPTION = r"-{1,2}[a-zA-Z][^\n]*"

OWN_OPTIONS = (
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "output",
    "error",
    "open-mode",
    "requeue",
    "no-requeue",
    "signal",
    "time",
    "array",
)
"""Options of sbatch that the job script sets itself."""


class Scheduler(Enum):
    """Who starts the ranks: this process, or Slurm."""

    local = "local"
    slurm = "slurm"


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """The job that `launch.submit` writes. Names of partitions and accounts belong here."""

    time_limit: str | None = None
    """`12:00:00` or `2-00:00:00`, in quotes, or YAML reads a number; null leaves it to the
    partition."""
    options: list[str] = field(default_factory=list, hash=False)
    """Further lines for sbatch, each like `--gres=gpu:8` or `--partition=NAME`."""
    setup: list[str] = field(default_factory=list, hash=False)
    """Lines of bash before anything runs, such as `module load cuda` and exports."""
    srun_options: list[str] = field(default_factory=list, hash=False)
    """Further options of srun, such as `--container-image=IMAGE`."""
    command_prefix: str = ""
    """Put before Python in every task, such as `apptainer exec --nv IMAGE`."""
    python: str | None = None
    """Interpreter of the ranks, inside the container if there is one; null takes the one that
    submits."""
    signal_seconds: int = 300
    """How long before the time limit a job is told to save and stop, in seconds."""
    max_restarts: int = 5
    """Failures in a row that a job is restarted after; each must have got further than the last
    checkpoint. Pre-emptions do not count."""
    preflight: bool = True
    """Check every node, and one all-reduce over all ranks, before training starts."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the run is launched, as far as planner and launcher must know it."""

    name: str = "local"
    """Label written into the run's records; local means this machine."""
    scheduler: Scheduler = Scheduler.local
    """local starts the ranks on this machine; slurm submits a job."""
    nodes: int = 1
    """Machines of a job."""
    gpus_per_node: int = 8
    """Accelerators of one machine; tensor parallelism should not reach beyond it."""
    ranks_per_node: int | None = None
    """Processes on each machine; null means one per accelerator, and with scheduler = local as few
    as the parallel sizes allow."""
    memory_gib: float | None = None
    """Memory of one accelerator in GiB; a plan that needs more is refused. null: not checked."""
    peak_tflops: float = 989.0
    """Dense bf16 matrix throughput of one accelerator, in 1e12 FLOPs per second (an H100's)."""
    node_bandwidth_gb: float = 450.0
    """Bandwidth of one accelerator inside a machine and one direction, in 1e9 bytes a second."""
    network_bandwidth_gb: float = 50.0
    """Bandwidth of one accelerator between machines and one direction, in 1e9 bytes a second."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def cluster_problems(cluster: ClusterConfig) -> Iterator[Problem]:
    """Settings of the cluster that contradict each other or that Slurm would refuse."""
    slurm = cluster.slurm
    if cluster.scheduler is Scheduler.local and cluster.nodes > 1:
        allowed = "1 with cluster.scheduler = local; start torchrun on every machine instead"
        yield Problem("cluster.nodes", str(cluster.nodes), allowed)
    limit = slurm.time_limit
    if limit is not None and not re.fullmatch(_TIME_LIMIT, limit):
        allowed = "'hours:minutes:seconds' or 'days-hours:minutes:seconds', in quotes, or null"
        yield Problem("cluster.slurm.time_limit", repr(limit), allowed)
    for name in ("options", "srun_options"):
        for option in getattr(slurm, name):
            if not re.fullmatch(_OPTION, option):
                yield Problem(
                    f"cluster.slurm.{name}", repr(option), "one option a line, like --x=y"
                )
    for option in slurm.options:
        key = option.lstrip("-").partition("=")[0].split(" ")[0]
        if key in OWN_OPTIONS:
            allowed = "options that the job script does not set itself"
            yield Problem("cluster.slurm.options", option, allowed)
