"""Where this process computes: its device and the default process group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from hysparse_megatron.config.schema import ParallelConfig
from hysparse_megatron.runtime import megatron_on_cpu, rendezvous
from hysparse_megatron.runtime.launcher import Rank, loopback_interface


def start(rank: Rank, parallel: ParallelConfig) -> torch.device:
    """Pick the device, adapt megatron-core to it, and join the default process group.

    All ranks must have come within `timeout_seconds`; after that they wait for each other for
    `setup_timeout_seconds`, until `rendezvous.set_timeout` changes it. Raises RankFailure, naming
    who is missing.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank.local_rank)
    else:
        megatron_on_cpu.install()
        # Several ranks share the machine's cores; more threads than cores only fight. Whoever
        # shares them among more than these ranks, such as a study, has set the variable.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // rank.local_world_size))
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if rank.world_size == 1 and "MASTER_ADDR" not in os.environ:
            store: dist.Store = dist.HashStore()
            for name, value in loopback_interface().items():
                os.environ.setdefault(name, value)
        else:
            store = rendezvous.join(rank, parallel.timeout_seconds)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(seconds=parallel.setup_timeout_seconds),
        )
        rendezvous.set_timeout(parallel.setup_timeout_seconds)
    return torch.device("cuda", rank.local_rank) if cuda else torch.device("cpu")


def stop() -> None:
    """Leave the default process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
