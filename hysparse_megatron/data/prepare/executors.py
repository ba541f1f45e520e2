"""Who makes the shards of a corpus: processes of this machine, or of a cluster.

All do the same work on the same units, and leave the same shards in the work folder. Slurm and Ray
are datatrove's. Its local executor is not used: it waits forever for a process that the system
killed for want of memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Protocol

from hysparse_megatron.data.prepare.shards import UNFINISHED, Folder, Work, is_failure
from hysparse_megatron.data.prepare.tokenize import tokenize_share
from hysparse_megatron.errors import ConfigError, DataError, HySparseError
from hysparse_megatron.packages import require_package

_LOCAL_POLL_SECONDS, _CLUSTER_POLL_SECONDS = 0.2, 5.0
_LOGS = "logs-"
_KINDS: dict[int, type[HySparseError]] = {kind.exit_code: kind for kind in (ConfigError, DataError)}
"""The error that a process met, by the code that it ended with."""


class Executor(Protocol):
    """Makes all shards of a corpus that are not there yet."""

    def run(self, work: Work, advance: Callable[[int], None]) -> None:
        """Return when all are there; `advance` is told how many bytes of the corpus are done.

        Raises:
            DataError: what a process met; see `tokenize_share`.
            HySparseError: a process was lost.
        """


@dataclass(frozen=True)
class LocalProcesses:
    """So many processes on this machine."""

    workers: int

    def run(self, work: Work, advance: Callable[[int], None]) -> None:
        """See `Executor`."""
        count = min(self.workers, len(work.units) - len(work.done()))
        if not count:
            return
        # Fewer units than cores: the library's threads take the others.
        threads = max(1, self.workers // count)
        environment = {
            **os.environ,
            "RAYON_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
        }
        command = [sys.executable, "-m", "hysparse_megatron.data.prepare.tokenize", work.folder]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(count), str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is ours
            )
            for rank in range(count)
        ]
        try:
            for process in processes:
                os.set_blocking(_output(process).fileno(), False)
            _wait(work, lambda: _state_of(processes, advance), _LOCAL_POLL_SECONDS)
            _state_of(processes, advance)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
            with contextlib.suppress(OSError):
                remove_remains(Folder(work.folder))


def _output(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _state_of(
    processes: list[subprocess.Popen[bytes]], advance: Callable[[int], None]
) -> HySparseError | None:
    codes = [process.poll() for process in processes]
    for process in processes:
        words = (_output(process).read() or b"").split()
        advance(sum(int(word) for word in words if word.isdigit()))
    lost = next((code for code in codes if code), None)
    if lost is None:
        return None if None in codes else HySparseError("all worker processes ended")
    if lost in _KINDS:
        return _KINDS[lost](
            f"a worker process ended with code {lost} and could not leave a note that says why, "
            "perhaps as the disk is full; run the same command again to go on"
        )
    if lost > 0:
        return HySparseError(
            f"a worker process ended with code {lost}; run the same command again to go on"
        )
    return HySparseError(
        f"a worker process was killed ({signal.Signals(-lost).name}), perhaps for want of memory; "
        "run the same command again to go on, with fewer --workers if memory is short"
    )


@dataclass(frozen=True)
class SlurmJobs:
    """Jobs of a Slurm array, by datatrove. The work folder has to be there on all nodes."""

    tasks: int
    partition: str
    time: str
    cpus_per_task: int
    options: Mapping[str, str]

    def run(self, work: Work, advance: Callable[[int], None]) -> None:
        """See `Executor`. When it is stopped, the jobs go on."""
        slurm = require_package("datatrove.executor.slurm", "--executor slurm")
        executor = slurm.SlurmPipelineExecutor(
            pipeline=[_share(work.folder)],
            tasks=min(self.tasks, len(work.units)),
            time=self.time,
            partition=self.partition,
            cpus_per_task=self.cpus_per_task,
            job_name="prepare-data",
            qos=None,
            env_command=f'export PATH="{os.path.dirname(sys.executable)}:$PATH"',
            sbatch_args=dict(self.options),
            logging_dir=_logs(work),
            slurm_logs_folder=os.path.join(work.folder, "slurm"),
            skip_completed=False,
            mail_user=None,
        )
        executor.launch_merge_stats = lambda: None  # a job more, for numbers that records hold
        try:
            executor.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise HySparseError(f"sbatch refuses the tasks: {error}") from error
        job = str(executor.job_id)
        _wait(work, lambda: _state_of_job(job, work), _CLUSTER_POLL_SECONDS, advance)


def _state_of_job(job: str, work: Work) -> HySparseError | None:
    found = subprocess.run(
        ["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False
    )
    if found.stdout.strip() or (found.returncode and "Invalid job id" not in found.stderr):
        return None
    return HySparseError(
        f"Slurm's job {job} ended before all was done; its logs are in {work.folder}/slurm"
    )


@dataclass(frozen=True)
class RayTasks:
    """Tasks of a Ray cluster, by datatrove. The work folder has to be there on all nodes."""

    tasks: int
    cpus_per_task: int

    def run(self, work: Work, advance: Callable[[int], None]) -> None:
        """See `Executor`."""
        ray = require_package("ray", "--executor ray")
        executors = require_package("datatrove.executor.ray", "--executor ray")
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        done = sum(map(work.unit_bytes, work.done()))
        executors.RayPipelineExecutor(
            pipeline=[_share(work.folder)],
            tasks=min(self.tasks, len(work.units)),
            cpus_per_task=self.cpus_per_task,
            logging_dir=_logs(work),
            skip_completed=False,
        ).run()
        _raise_failure(work)
        advance(sum(map(work.unit_bytes, work.done())) - done)
        if len(work.done()) < len(work.units):
            raise HySparseError("Ray's tasks ended before all was done; run the same command again")


def _logs(work: Work) -> str:
    if not Folder(work.folder).is_local:
        raise ConfigError("a cluster prepares to a folder that all its nodes see, not to a URL")
    return os.path.join(work.folder, f"{_LOGS}{time.strftime('%Y%m%d-%H%M%S')}")


def _share(folder: str) -> Any:
    """A step of a datatrove pipeline: one task's share of the units."""

    def step(data: object, rank: int = 0, world_size: int = 1) -> None:
        del data
        tokenize_share(Work.load(folder), rank, world_size)

    return step


def _wait(
    work: Work,
    state: Callable[[], HySparseError | None],
    poll_seconds: float,
    advance: Callable[[int], None] = lambda size: None,
) -> None:
    """Wait until all shards are there; `state` says why they will not be."""
    told = set(work.done())
    while len(told) < len(work.units):
        began = time.monotonic()
        ended = state()
        now = set(work.done())
        advance(sum(map(work.unit_bytes, now - told)))
        told = now
        _raise_failure(work)
        if len(told) < len(work.units):
            if ended is not None:
                raise ended
            # A folder of many shards is not looked at all the time.
            time.sleep(max(poll_seconds, 5 * (time.monotonic() - began)))


def _raise_failure(work: Work) -> None:
    folder = Folder(work.folder)
    for name in sorted(filter(is_failure, folder.names())):
        try:
            failure = folder.read_json(name)
        except (OSError, ValueError):
            continue
        raise _KINDS.get(failure["exit_code"], HySparseError)(failure["message"])


def remove_remains(folder: Folder) -> None:
    """Delete notes of failures and half-written files that ended processes left in a work folder.

    Where a cluster has worked, half-written files stay until the output is whole: its tasks go on
    when the command that waits for them ends, and may be writing them.
    """
    names = folder.names()
    has_tasks = any(name.startswith(_LOGS) for name in names)
    for name in names:
        if is_failure(name) or (name.endswith(UNFINISHED) and not has_tasks):
            folder.remove(name)
