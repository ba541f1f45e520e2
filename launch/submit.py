"""From overrides to a running job: `hysparse submit [--dry-run] [-m] [overrides]`.

Composes and checks the configuration, prints the parallel plan with its memory and traffic, looks
at packages, data, disk and run directory, freezes the run directory, and submits a Slurm job
(`cluster.scheduler=slurm`) or runs here. Needs no GPU.

    hysparse submit --dry-run experiment=paper_80b_a3b_32k cluster=slurm cluster.nodes=32
    hysparse submit cluster=slurm 'cluster.slurm.options=["--partition=NAME"]'
    hysparse submit -m optim.learning_rate=1e-3,2e-3 train.seed=1,2

--dry-run   prints all of it and changes nothing
-m          one job per point of the overrides that list values (`a=1,2`, `a=range(1,4)`), each in a
            run directory of its own; here one after the other, and none after Ctrl-C

Exit codes: 0 submitted, finished, or only looked; 2 nothing was started: bad configuration, a
failed check, no sbatch, or the run's last job is still in the queue; of a run here, the run's.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hysparse_megatron.command import command, hysparse
from hysparse_megatron.config.cli import arguments_of, load, settings_parser
from hysparse_megatron.config.cluster import Scheduler
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.validate import warnings
from hysparse_megatron.errors import ConfigError, HySparseError
from hysparse_megatron.files import write_whole
from hysparse_megatron.plan.ranks import num_ranks
from hysparse_megatron.plan.report import as_text
from hysparse_megatron.plan.suggest import check, overview_of
from hysparse_megatron.run_record import add_job, submitted_jobs
from hysparse_megatron.rundir import prepare_run, refuse_start
from hysparse_megatron.runtime.signals import STOP_SIGNALS

from . import findings
from .checks import login_checks
from .job import SCRIPT_NAME, render_job
from .local import Ending, launch
from .snapshot import make_snapshot, snapshot_folder
from .sweep import Point, points

_QUEUE_SECONDS = 30


@functools.partial(command, is_run=True)
def main(argv: Sequence[str]) -> int:
    """Submit or run what `argv` names, the command line without the program's name."""
    parser = settings_parser("hysparse submit", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="print everything, change nothing")
    parser.add_argument("-m", "--multirun", action="store_true", help="one job per point")
    args = parser.parse_intermixed_args(list(argv))
    runs = _runs(args)
    for point in runs:
        _check(point)
    codes = []
    for number, point in enumerate(runs, start=1):
        ending = _launch(point, args.dry_run, len(runs) > 1)
        codes.append(ending.code)
        if ending.told and number < len(runs):
            print(f"told to stop: {len(runs) - number} more are not started", file=sys.stderr)
            break
    if args.multirun:
        print(_table(runs))
    return max(codes)


def _runs(args: argparse.Namespace) -> list[Point]:
    if args.multirun and args.config is not None:
        raise ConfigError("-m takes overrides; --config names one run")
    arguments = arguments_of(args, is_sweep=args.multirun)
    return points(arguments.overrides) if args.multirun else [Point((), load(arguments))]


def _check(point: Point) -> None:
    """All points are checked before the first is submitted."""
    try:
        check(point.config, num_ranks(point.config))
        refuse_start(point.config)
    except ConfigError as error:
        where = f"{' '.join(point.chosen)}: " if point.chosen else ""
        raise ConfigError(f"{where}{error}", error.problems) from error


def _launch(point: Point, dry_run: bool, is_one_of_many: bool) -> Ending:
    """Show, check, freeze and start one run."""
    config = point.config
    slurm = config.cluster.scheduler is Scheduler.slurm
    if slurm and not dry_run:
        _refuse_queued(config)
    script = render_job(config, snapshot_folder(config.run_path)) if slurm else ""
    overview = overview_of(config, num_ranks(config))
    found = login_checks(config, overview)
    if is_one_of_many:
        print(f"== {config.name}: {' '.join(point.chosen)}")
    else:
        print(as_text(overview), end="\n\n")
    for warning in warnings(config):
        print(f"warning: {warning}")
    print(findings.as_text(found), end="\n\n")
    if slurm and (dry_run or not is_one_of_many):
        print(script)
    if findings.has_failed(found):
        print(f"{'would not be' if dry_run else 'not'} started: a check failed", file=sys.stderr)
        return Ending(ConfigError.exit_code)
    command = _command(config)
    if dry_run:
        print(f"would run: {shlex.join(command)}")
        return Ending(0)
    if slurm and shutil.which("sbatch") is None:
        print(f"not submitted: no sbatch here; would run: {shlex.join(command)}", file=sys.stderr)
        return Ending(ConfigError.exit_code)
    changed, warned = prepare_run(config)
    for line in changed:
        print(f"note: changed since the last start in {config.run_path}: {line}")
    for line in warned:
        print(f"WARNING: {line}")
    if not slurm:
        return _run_here(config)
    return Ending(_submit(config, script, command))


def _run_here(config: Config) -> Ending:
    """Signals are for the run as long as it lasts."""
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        return launch(_launch_words(config))
    except HySparseError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return Ending(error.exit_code)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _command(config: Config) -> list[str]:
    if config.cluster.scheduler is Scheduler.slurm:
        return ["sbatch", "--parsable", str(config.run_path.absolute() / SCRIPT_NAME)]
    return [*shlex.split(hysparse()), "launch", *_launch_words(config)]


def _launch_words(config: Config) -> list[str]:
    frozen = str(config.run_path / "config.yaml")
    return ["--nproc", str(num_ranks(config)), "--config", frozen]


def _submit(config: Config, script: str, command: list[str]) -> int:
    path = config.run_path
    (path / "logs").mkdir(exist_ok=True)  # sbatch does not make the folder of its output
    make_snapshot(path)
    Path(config.data.cache_dir).mkdir(parents=True, exist_ok=True)  # or it could not be mounted
    write_whole(path / SCRIPT_NAME, script)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"sbatch refused it: {done.stderr.strip()}", file=sys.stderr)
        return 2
    job = done.stdout.strip().partition(";")[0]
    add_job(path, job)
    print(f"submitted job {job}: {path}/logs/slurm-{job}.log")
    return 0


def _refuse_queued(config: Config) -> None:
    """One run, one job: a second one would wait and then find the directory locked."""
    if shutil.which("squeue") is None:
        return
    for job in submitted_jobs(config.run_path):
        told = _state_in_queue(job)
        if told:
            raise ConfigError(
                f"run_dir: job {job} of {config.run_path} is in the queue ({told.lower()}); "
                f"scancel {job}, or choose another run_dir"
            )


def _state_in_queue(job: str) -> str:
    """As squeue tells it; empty for a job that is in the queue no more."""
    try:
        return subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%T"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_QUEUE_SECONDS,
        ).stdout.strip()
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"squeue gave no answer within {_QUEUE_SECONDS} s, so that job {job} of this run may "
            "be in the queue: try again when it does"
        ) from error


def _table(runs: Sequence[Point]) -> str:
    """The points of a sweep, what they chose, and their last jobs."""
    rows = [["run", "job", "chosen"]]
    for point in runs:
        jobs = submitted_jobs(point.config.run_path)
        rows.append([str(point.config.run_path), jobs[-1] if jobs else "-", " ".join(point.chosen)])
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2]]) for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
