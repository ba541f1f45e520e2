"""The sbatch text of three clusters, kept as golden text, and as bash that shellcheck accepts."""

import functools
import json
import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hysparse_megatron.config.cluster import cluster_problems
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.validate import RULES
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.ranks import num_ranks, ranks_per_node
from launch.job import mounted_folders, render_job
from tests.captured import captured

GOLDEN = Path(__file__).parent / "golden"
CLUSTERS = {
    "slurm": [
        "experiment=paper_80b_a3b_32k",
        "cluster=slurm",
        "cluster.nodes=32",
        'cluster.slurm.options=["--gres=gpu:8","--partition=large","--comment=\'two words\'"]',
        "cluster.slurm.setup=['module load cuda/13.0','export NCCL_SOCKET_IFNAME=eth0']",
    ],
    "slurm_container": ["experiment=paper_7b_8k", "cluster=slurm_container", "cluster.nodes=8"],
    "slurm_cpu": [
        "experiment=quickstart",
        "cluster=slurm_cpu",
        "cluster.slurm.preflight=false",
        "cluster.slurm.time_limit=null",
    ],
}
UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"


def rendered(name: str) -> str:
    config = compose([*CLUSTERS[name], "run_dir=/shared/my runs/first"])
    return render_job(
        config,
        code=Path("/shared/my runs/first/code/0123456789ab"),
        folder=Path("/shared/hysparse"),
        python="/shared/venv/bin/python",
    )


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_text_is_the_one_that_was_reviewed(name: str) -> None:
    """After a change on purpose: UPDATE_GOLDEN=1, then review the diff."""
    path = GOLDEN / f"{name}.sbatch"
    if UPDATE:
        path.write_text(rendered(name))
    assert rendered(name) == path.read_text()


@pytest.mark.parametrize("name", CLUSTERS)
def test_it_is_sound_bash(name: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(rendered(name))
    captured(["bash", "-n", str(script)])
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    captured([shellcheck, str(script)])


def config_of(*overrides: str) -> Config:
    return compose(list(overrides))


def test_cores_of_a_rank() -> None:
    """srun takes no cores over from sbatch."""
    script = render_job(config_of("cluster=slurm", "cluster.slurm.cpus_per_task=3"), Path("/code"))
    assert "#SBATCH --cpus-per-task=3\n" in script
    assert script.count(" --cpus-per-task=3 ") == 2
    for words in ("--cpus-per-task=9", "--cpus 9", "-c9"):
        config = config_of("cluster=slurm", f'cluster.slurm.options=["{words}"]')
        assert [problem.got for problem in cluster_problems(config.cluster)] == [words]
        slurm = replace(config.cluster.slurm, cpus_per_task=None)
        assert list(cluster_problems(replace(config.cluster, slurm=slurm))) == []


def test_a_container_sees_what_the_run_names(tmp_path: Path) -> None:
    for folder in ("checkout", "text", "tokenizers", "a", "b", "held", "start", "text/inside"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tokenizers" / "x.json").touch()
    config = config_of(
        f"run_dir={tmp_path}/runs/first",
        f"data.path={tmp_path}/text",
        f"data.tokenizer={tmp_path}/tokenizers/x.json",
        f"data.evaluation={{held: {tmp_path}/held, more: {tmp_path}/text/inside}}",
        f"checkpoint.load={tmp_path}/start",
        f"data.cache_dir={tmp_path}/cache",
        "cluster=slurm_container",
    )
    folders = ("checkout", "text", "tokenizers", "held", "start", "cache", "runs/first")
    checkout = tmp_path / "checkout"
    assert set(mounted_folders(config, checkout)) == {tmp_path / folder for folder in folders}
    named = ",".join(map(str, mounted_folders(config, checkout)))
    script = render_job(config, tmp_path / "code", checkout)
    assert f"export mounts={named}" in script
    blend = f"0.5 {tmp_path}/a; 0.5 {tmp_path}/b"
    blended = replace(config, data=replace(config.data, path=None, blend=blend))
    assert {tmp_path / "a", tmp_path / "b"} <= set(mounted_folders(blended, checkout))
    own = config_of(f"run_dir={checkout}/runs/x", "data.cache_dir=.cache/data")
    assert mounted_folders(own, checkout) == [checkout], "all of it lies there"


def test_paths_that_a_list_cannot_hold() -> None:
    with pytest.raises(ConfigError, match=r"\$mounts: got /a,b;"):
        render_job(config_of("cluster=slurm_container", "run_dir='/a,b'"), Path("/code"))
    with pytest.raises(ConfigError, match="run_dir: got /a:b; allowed no colon"):
        render_job(config_of("cluster=slurm", "run_dir='/a:b'"), Path("/a:b/code"))
    render_job(config_of("cluster=slurm", "run_dir='/a,b'"), Path("/a,b/code"))


def test_ranks() -> None:
    assert num_ranks(config_of("parallel=tp2_pp2")) == 4
    assert num_ranks(config_of("parallel=tp2_pp2", "cluster.ranks_per_node=8")) == 8
    on_slurm = config_of("cluster=slurm", "cluster.nodes=3")
    assert (num_ranks(on_slurm), ranks_per_node(on_slurm)) == (24, 8)
    fewer = config_of("cluster=slurm", "cluster.nodes=3", "cluster.ranks_per_node=4")
    assert (num_ranks(fewer), ranks_per_node(fewer)) == (12, 4)


def test_a_configuration_is_a_key_of_tables() -> None:
    """Its lists of options compare, and do not keep it from being hashed."""
    same, other = config_of("cluster=slurm"), config_of("cluster=slurm", "cluster.slurm.options=[]")
    assert {config_of("cluster=slurm"): 1} == {same: 1}
    assert same != other


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\u2028"])
@pytest.mark.parametrize(
    "key",
    [
        "run_dir",
        "cluster.name",
        "cluster.slurm.python",
        "cluster.slurm.command_prefix",
        "cluster.slurm.options",
        "cluster.slurm.srun_options",
        "cluster.slurm.setup",
    ],
)
def test_control_characters_are_refused(key: str, character: str) -> None:
    """A newline would begin a line of the job script that is carried out."""
    config = with_value(key, f"--x=a{character}touch canary")
    found = [problem.key for rule in RULES for problem in rule(config)]
    assert key in found


COMMANDS = [
    "--x=a;touch canary",
    "--x=$(touch canary)",
    "--x=`touch canary`",
    "--x=a&touch canary&",
    "--x=a|touch canary",
    "--x=a>canary",
    "--x=a (touch canary)",
    '--x="$(touch canary)"',
    '--x="`touch canary`"',
    '--x="a\\"; touch canary"',
    "--x='a'; touch canary'",
    "--x=${a:-$(touch canary)}",
    "--x=a\\",
    "--x='open",
    "--x=~/image",
]


@pytest.mark.parametrize("text", COMMANDS)
@pytest.mark.parametrize("name", ["options", "srun_options", "command_prefix"])
def test_commands_in_options_are_refused(name: str, text: str) -> None:
    key = f"cluster.slurm.{name}"
    config = with_value(key, text)
    assert [problem.key for problem in cluster_problems(config.cluster)] == [key]


@functools.cache
def on_slurm() -> Config:
    return config_of("cluster=slurm")


def with_value(key: str, value: str) -> Config:
    """A configuration for Slurm with any text, which no command line could pass on, at `key`."""
    config = on_slurm()
    cluster, slurm, name = config.cluster, config.cluster.slurm, key.rpartition(".")[2]
    if name == "run_dir":
        return replace(config, run_dir=value)
    if key == "cluster.name":
        return replace(config, cluster=replace(cluster, name=value))
    whole = value if name in ("python", "command_prefix") else [value]
    return replace(config, cluster=replace(cluster, slurm=replace(slurm, **{name: whole})))


ODD_NAMES = 'it\'s a "run"; $(touch canary) `touch canary` $HOME %j & *é#'
SRUN = """#!/usr/bin/env python3
import json, os, sys
open(os.environ["ASKED"], "a").write(json.dumps(sys.argv[1:]) + "\\n")
"""


def test_a_job_with_odd_names_runs_nothing_but_its_own(tmp_path: Path) -> None:
    """The rendered script, run with stand-ins for Slurm's programs where a canary would be seen."""
    folder = tmp_path / "work"
    run_dir = folder / ODD_NAMES
    (run_dir / "logs").mkdir(parents=True)
    slurm = replace(
        on_slurm().cluster.slurm,
        options=["--comment='; touch canary'", "--partition=a,b"],
        srun_options=["--mounts=\"$PWD,$run_dir\":'$(touch canary)'", "-w n[1-2]"],
        command_prefix="env A='1; touch canary' B=$run_dir",
        python=f"{folder}/{ODD_NAMES}/python",
    )
    config = on_slurm()
    config = replace(
        config, run_dir=str(run_dir), cluster=replace(config.cluster, name="x", slurm=slurm)
    )
    assert [problem for rule in RULES for problem in rule(config)] == []
    script = tmp_path / "job.sbatch"
    script.write_text(render_job(config, code=run_dir, folder=folder))
    captured(["bash", "-n", str(script)])
    programs = {"srun": SRUN, "scontrol": "#!/bin/sh\necho node1\n", "squeue": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    asked = tmp_path / "asked"
    environment = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": "/nowhere",
        "ASKED": str(asked),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
    }
    captured(["bash", str(script)], cwd=folder, env=environment)
    assert not list(tmp_path.rglob("canary"))
    checks, training = map(json.loads, asked.read_text().splitlines())
    own = [
        "--cpus-per-task=8",
        f"--mounts={folder},{run_dir}:$(touch canary)",
        *("-w", "n[1-2]", "env", "A=1; touch canary", f"B={run_dir}"),
        *(slurm.python, "-m"),
    ]
    for arguments, module in (
        (checks, "hysparse_megatron.launch.preflight"),
        (training, "hysparse_megatron"),
    ):
        assert arguments[2:] == [*own, module, "--config", f"{run_dir}/config.yaml"]
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    (output,) = (line for line in directives if "--output" in line)
    expected = f"--output={run_dir}/logs".replace("%", "%%")
    assert shlex.split(output)[1] == f"{expected}/slurm-%j.log"
