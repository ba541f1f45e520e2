"""The text of a Slurm job, from `train.sbatch.j2` and the settings under `cluster`."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

import jinja2

from hysparse_megatron.config.cluster import Scheduler
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.shell_words import quoted

CHECKOUT = Path(__file__).resolve().parent.parent
SCRIPT_NAME = "job.sbatch"

NO_RENDEZVOUS = 75
"""Exit code of `launch.preflight` where ranks did not meet; trying again elsewhere may help."""


def num_ranks(config: Config) -> int:
    """Processes that the run will have, by its cluster and parallel sizes."""
    cluster, parallel = config.cluster, config.parallel
    if cluster.scheduler is Scheduler.local:
        # Experts lie on tensor- and data-parallel ranks of a stage.
        fewest = parallel.pp * math.lcm(parallel.tp * parallel.cp, parallel.ep)
        return cluster.ranks_per_node or max(1, fewest)
    return cluster.nodes * ranks_per_node(config)


def ranks_per_node(config: Config) -> int:
    """Processes on one node of a Slurm job."""
    return config.cluster.ranks_per_node or config.cluster.gpus_per_node


def render_job(config: Config, checkout: Path = CHECKOUT, python: str = sys.executable) -> str:
    """What sbatch is given for this run.

    `checkout` is the folder the job runs in, with this code and reachable from every node;
    `python` is taken where `cluster.slurm.python` is null.
    """
    slurm = config.cluster.slurm
    run_dir = config.run_path.absolute()
    srun = [
        *map(quoted, slurm.srun_options),
        *([quoted(slurm.command_prefix)] if slurm.command_prefix else []),
        shlex.quote(slurm.python or python),
    ]
    # sbatch fills in what stands after a percent sign.
    logs = str(run_dir / "logs").replace("%", "%%")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template("train.sbatch.j2").render(
        name=config.name,
        nodes=config.cluster.nodes,
        ranks_per_node=ranks_per_node(config),
        slurm=slurm,
        srun=" ".join(srun),
        script=shlex.quote(str(run_dir / SCRIPT_NAME)),
        log=shlex.quote(f"{logs}/slurm-%j.log"),
        checkout=shlex.quote(str(checkout)),
        run_dir=shlex.quote(str(run_dir)),
        no_rendezvous=NO_RENDEZVOUS,
    )
