"""The sbatch text of three clusters, kept as golden text, and as bash that shellcheck accepts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from launch.job import num_ranks, ranks_per_node, render_job

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
    return render_job(config, checkout=Path("/shared/hysparse"), python="/shared/venv/bin/python")


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
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_local_starter_is_sound_bash() -> None:
    script = Path(__file__).resolve().parents[3] / "launch" / "local.sh"
    assert os.access(script, os.X_OK)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def config_of(*overrides: str) -> Config:
    return compose(list(overrides))


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
