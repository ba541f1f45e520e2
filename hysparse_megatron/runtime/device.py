"""Where this process computes: its device and the default process group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from hysparse_megatron.runtime import megatron_on_cpu
from hysparse_megatron.runtime.launcher import Rank


def start(rank: Rank, timeout_seconds: int) -> torch.device:
    """Pick the device, adapt megatron-core to it, and join the default process group."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank.local_rank)
    else:
        megatron_on_cpu.install()
        # Several ranks share the machine's cores; more threads than cores only fight.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // rank.local_world_size))
    if not dist.is_initialized():
        if rank.world_size == 1 and "MASTER_ADDR" not in os.environ:
            backend = "nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
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
