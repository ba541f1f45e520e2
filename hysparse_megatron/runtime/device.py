"""Where this process computes: its rank, its device, and the default process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.runtime import megatron_on_cpu


@dataclass(frozen=True)
class Rank:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> Rank:
    """Read rank and world size as torchrun or srun set them; one process alone without either.

    Raises ConfigError when only part of a launcher's variables is there.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return Rank(0, 1, 0)
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(
            f"the launcher's environment is incomplete: {', '.join(missing)} not set. Start with "
            "torchrun or srun, or unset RANK and WORLD_SIZE to run one process alone"
        )
    return Rank(*(int(environment[name]) for name in names))


def start(rank: Rank, timeout_seconds: int) -> torch.device:
    """Pick the device, adapt megatron-core to it, and join the default process group."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank.local_rank)
    else:
        megatron_on_cpu.install()
        # Several ranks share the machine's cores; more threads than cores only fight.
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", rank.world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if not dist.is_initialized():
        if rank.world_size == 1 and "MASTER_ADDR" not in os.environ:
            store = dist.HashStore()
            dist.init_process_group(
                "nccl" if cuda else "gloo", store=store, rank=0, world_size=1
            )
        else:
            _join(rank, "nccl" if cuda else "gloo", timeout_seconds)
    return torch.device("cuda", rank.local_rank) if cuda else torch.device("cpu")


def _join(rank: Rank, backend: str, timeout_seconds: int) -> None:
    for name, default in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, default)
    dist.init_process_group(
        backend,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def stop() -> None:
    """Leave the default process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
