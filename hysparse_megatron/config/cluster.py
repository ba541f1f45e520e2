"""Settings of the machines: what the planner must know about them, and how jobs get there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from enum import Enum

from hysparse_megatron.architecture.bounds import above_zero, at_least
from hysparse_megatron.config.shell_words import (
    DIRECTIVE,
    WORDS,
    are_directive_words,
    are_words,
    has_control_characters,
)
from hysparse_megatron.errors import Problem

_TIME_LIMIT = r"([0-9]+-)?[0-9]+:[0-9][0-9]:[0-9][0-9]"
_OPTION = re.compile(r"-{1,2}[a-zA-Z]")

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
    "wrap",
)
"""Options of sbatch that the job script sets itself, or that would replace it."""
_OWN_LETTERS = "JNnoeta"
"""The short forms of these."""


class Scheduler(Enum):
    """Who starts the ranks: this process, or Slurm."""

    local = "local"
    slurm = "slurm"


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """The job that `hysparse submit` writes. Names of partitions and accounts belong here."""

    time_limit: str | None = None
    """`12:00:00` or `2-00:00:00`, in quotes, or YAML reads a number; null leaves it to the
    partition."""
    options: list[str] = field(default_factory=list, hash=False)
    """Further lines for sbatch, each like `--gres=gpu:8` or `--partition=NAME`; quoted where they
    hold blanks, `--comment='two words'`."""
    setup: list[str] = field(default_factory=list, hash=False)
    """Lines of bash before anything runs, such as `module load cuda` and exports."""
    srun_options: list[str] = field(default_factory=list, hash=False)
    """Further options of srun, such as `--container-image=IMAGE`, quoted as for bash. Variables
    such as `$run_dir` are filled in, commands and `~` are not."""
    command_prefix: str = ""
    """Put before Python in every task, such as `apptainer exec --nv IMAGE`; words as in
    srun_options."""
    python: str | None = None
    """Interpreter of the ranks, inside the container if there is one; null takes the one that
    submits."""
    cpus_per_task: int | None = at_least(1, default=None)
    """Cores of a rank, for its threads and for what prepares and writes data; null leaves it to the
    cluster, which often gives one."""
    signal_seconds: int = at_least(1, default=300)
    """How long before the time limit a job is told to save and stop, in seconds."""
    max_restarts: int = at_least(0, default=5)
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
    nodes: int = at_least(1, default=1)
    """Machines of a job."""
    gpus_per_node: int = at_least(1, default=8)
    """Accelerators of one machine; tensor parallelism should not reach beyond it."""
    ranks_per_node: int | None = at_least(1, default=None)
    """Processes on each machine; null means one per accelerator, and with scheduler = local as few
    as the parallel sizes allow."""
    memory_gib: float | None = above_zero(default=None)
    """Memory of one accelerator in GiB; a plan that needs more is refused. null: not checked."""
    peak_tflops: float | None = above_zero(default=None)
    """Dense bf16 matrix throughput of one accelerator, in 1e12 FLOPs per second (an H100's is 989).
    null: not known or a CPU: no step time is planned, and MFU is only told of a few known GPUs."""
    node_bandwidth_gb: float = above_zero(default=450.0)
    """Bandwidth of one accelerator inside a machine and one direction, in 1e9 bytes a second."""
    network_bandwidth_gb: float = above_zero(default=50.0)
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
    yield from _words(slurm)
    for key, text in _texts(cluster):
        if has_control_characters(text):
            yield Problem(key, repr(text), "text of one line, without control characters")


def _words(slurm: SlurmConfig) -> Iterator[Problem]:
    """What stands in the job script: options, and what is put before Python."""
    lists: dict[str, tuple[list[str], Callable[[str], bool], str]] = {
        "options": (slurm.options, are_directive_words, DIRECTIVE),
        "srun_options": (slurm.srun_options, are_words, WORDS),
    }
    for name, (options, are_safe, allowed) in lists.items():
        for option in options:
            if not _OPTION.match(option) or not are_safe(option):
                text = f"one option a line, like --x=y, of {allowed}"
                yield Problem(f"cluster.slurm.{name}", repr(option), text)
            elif name == "options" and _is_own(shlex.split(option), slurm):
                allowed_here = "options that the job script does not set itself"
                yield Problem("cluster.slurm.options", option, allowed_here)
    if slurm.command_prefix and not are_words(slurm.command_prefix):
        yield Problem("cluster.slurm.command_prefix", repr(slurm.command_prefix), WORDS)


def _is_own(words: list[str], slurm: SlurmConfig) -> bool:
    """Whether sbatch takes a word for one of `OWN_OPTIONS`; it knows them by any clear start."""
    with_cores = slurm.cpus_per_task is not None
    names = (*OWN_OPTIONS, "cpus-per-task") if with_cores else OWN_OPTIONS
    letters = f"{_OWN_LETTERS}c" if with_cores else _OWN_LETTERS
    for key in (word.partition("=")[0] for word in words):
        if key.startswith("--"):
            if any(own.startswith(key.removeprefix("--")) for own in names):
                return True
        elif key.startswith("-") and key[1:2] in letters:
            return True
    return False


def _texts(cluster: ClusterConfig) -> Iterator[tuple[str, str]]:
    """Key and value of everything under `cluster` that is text."""
    for prefix, section in (("cluster", cluster), ("cluster.slurm", cluster.slurm)):
        for field_ in fields(section):
            value = getattr(section, field_.name)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    yield f"{prefix}.{field_.name}", text
