"""Rank and world size as launchers give them."""

import sys

import pytest

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.runtime.launcher import Rank, rank_from_environment
from tests.captured import captured

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "2",
}


def test_launchers() -> None:
    assert rank_from_environment({}) == Rank(0, 1, 0, 1)
    assert rank_from_environment(TORCHRUN) == Rank(5, 8, 1, 4)
    assert rank_from_environment(SRUN) == Rank(3, 4, 1, 2)


def test_torchrun_inside_a_slurm_job_counts() -> None:
    assert rank_from_environment({**SRUN, **TORCHRUN}) == Rank(5, 8, 1, 4)


@pytest.mark.parametrize(
    "environment",
    [
        # An interactive shell on a compute node, or srun with one task.
        {"SLURM_JOB_ID": "7"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
        {"SLURM_NTASKS": "4"},  # sbatch script, outside of srun
    ],
)
def test_slurm_without_several_tasks_is_one_process(environment: dict[str, str]) -> None:
    assert rank_from_environment(environment) == Rank(0, 1, 0, 1)


def test_sizes_per_node_may_be_missing() -> None:
    without = {name: value for name, value in SRUN.items() if name != "SLURM_NTASKS_PER_NODE"}
    assert rank_from_environment(without) == Rank(3, 4, 1, 4)


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN])
def test_a_missing_variable_is_named(launcher: dict[str, str]) -> None:
    required = list(launcher)[:3]
    for missing in required:
        environment = {name: value for name, value in launcher.items() if name != missing}
        if missing.startswith("SLURM") and missing != "SLURM_LOCALID":
            continue  # then it is no srun at all
        with pytest.raises(ConfigError, match=rf"incomplete: {missing} not set"):
            rank_from_environment(environment)


def test_all_missing_variables_are_named() -> None:
    with pytest.raises(ConfigError, match="incomplete: WORLD_SIZE, LOCAL_RANK not set"):
        rank_from_environment({"RANK": "1"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_what_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="'x1'"):
        rank_from_environment({**TORCHRUN, name: "x1"})


def test_imports_no_torch() -> None:
    code = "import sys, hysparse_megatron.runtime.launcher; print('torch' in sys.modules)"
    done = captured([sys.executable, "-c", code])
    assert done.stdout.strip() == "False"
