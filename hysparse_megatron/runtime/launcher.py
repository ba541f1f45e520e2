"""Which process of the run this is, as torchrun or srun tell it, and what the machine gives it.

Imports no torch.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hysparse_megatron.errors import ConfigError

LOOPBACK = "127.0.0.1"

STORE_DESCRIPTOR = "HYSPARSE_STORE_DESCRIPTOR"
"""Variable that names the listening socket which the launcher of one machine hands to rank 0."""

_DESCRIPTORS = 256
"""Files and sockets that a rank has open, generously: each of two on a CPU has 135."""
_DESCRIPTORS_PER_RANK = 32
"""More for every other rank on the machine: a socket in each process group of which both are."""


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


def loopback_interface() -> dict[str, str]:
    """Variables that keep gloo and NCCL on the loopback, for runs of one machine.

    By themselves they listen at the address of the host's name. Empty where there is no `lo`.
    """
    names = [name for _, name in socket.if_nameindex()]
    if "lo" not in names:
        return {}
    return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}


def require_descriptors(local_world_size: int, datasets: int = 1) -> None:
    """See to it that this process, and what it starts, may open as many files as a rank needs.

    Raises ConfigError where the system's limit is lower.
    """
    needed = _DESCRIPTORS + _DESCRIPTORS_PER_RANK * local_world_size + 4 * datasets
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"this process may open {hard} files, and a rank needs up to {needed}: raise the limit "
            f"with `ulimit -n {needed}`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
