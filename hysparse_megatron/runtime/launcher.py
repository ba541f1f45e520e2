"""Which process of the run this is, as torchrun or srun tell it. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hysparse_megatron.errors import ConfigError


@dataclass(frozen=True)
class Rank:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> Rank:
    """Read rank and world size as torchrun or srun set them; one process alone without either.

    Raises ConfigError when only part of a launcher's variables is there, or they are no numbers.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = _TORCHRUN
    elif "SLURM_PROCID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        names = _SLURM
    else:
        return Rank(0, 1, 0, 1)
    missing = [name for name in names[:3] if name not in environment]
    if missing:
        raise ConfigError(
            f"the launcher's environment is incomplete: {', '.join(missing)} not set. Start with "
            "torchrun or srun, or unset RANK and WORLD_SIZE to run one process alone"
        )
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names[:3])
        local_world_size = int(environment.get(names[3], world_size))
    except ValueError as error:
        raise ConfigError(f"the launcher's environment holds no number: {error}") from error
    return Rank(rank, world_size, local_rank, local_world_size)
