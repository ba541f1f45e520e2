"""The text of a Slurm job, from `train.sbatch.j2` and the settings under `cluster`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.shell_words import quoted
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.ranks import ranks_per_node

SCRIPT_NAME = "job.sbatch"

NO_RENDEZVOUS = 75
"""Exit code of `hysparse preflight` where ranks did not meet; trying again elsewhere may help."""


def render_job(
    config: Config, code: Path, folder: Path | None = None, python: str = sys.executable
) -> str:
    """What sbatch is given for this run.

    `code` is the folder that the packages are imported from, `folder` the one the job runs in, from
    which relative paths lead (None: the working directory); both are reachable from every node.
    `python` is taken where `cluster.slurm.python` is null. Raises ConfigError for paths that cannot
    be passed on.
    """
    slurm = config.cluster.slurm
    run_dir = config.run_path.absolute()
    folder = folder or Path.cwd()
    folders = mounted_folders(config, folder)
    _refuse_separators(config, code, folders)
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
        # srun does not take it over from sbatch.
        cores=f"--cpus-per-task={slurm.cpus_per_task} " if slurm.cpus_per_task else "",
        srun=" ".join(srun),
        script=shlex.quote(str(run_dir / SCRIPT_NAME)),
        log=shlex.quote(f"{logs}/slurm-%j.log"),
        folder=shlex.quote(str(folder)),
        run_dir=shlex.quote(str(run_dir)),
        code=shlex.quote(str(code)),
        mounts=shlex.quote(",".join(map(str, folders))),
        no_rendezvous=NO_RENDEZVOUS,
    )


def mounted_folders(config: Config, folder: Path) -> list[Path]:
    """What a container must see, under the same paths: the job's folder, the run directory, and
    where the data, the tokenizer, their cache and the weights to start from lie. None inside
    another."""
    data = config.data
    named = [data.path, data.tokenizer, config.checkpoint.load, *data.evaluation.values()]
    named += [path for _, path in parse_blend(data.blend)] if data.blend else []
    inputs = [folder / path for path in named if path is not None]
    # A file is mounted with what stands beside it, and so is the common stem of .bin and .idx.
    folders = [path if path.is_dir() else path.parent for path in inputs]
    folders += [folder, config.run_path.absolute(), folder / data.cache_dir]
    outermost: list[Path] = []
    for folder in sorted(set(folders), key=lambda path: len(path.parts)):
        if not any(folder.is_relative_to(other) for other in outermost):
            outermost.append(folder)
    return outermost


def _refuse_separators(config: Config, code: Path, folders: Sequence[Path]) -> None:
    """Colons and commas end a path in PYTHONPATH and in a list of mounts."""
    if ":" in str(code):
        raise ConfigError(f"run_dir: got {config.run_path}; allowed no colon in a job's directory")
    slurm = config.cluster.slurm
    words = " ".join([*slurm.srun_options, slurm.command_prefix])
    if not re.search(r"\$\{?mounts\b", words):
        return
    for folder in folders:
        if set(":,") & set(str(folder)):
            raise ConfigError(f"$mounts: got {folder}; allowed folders without colons and commas")
