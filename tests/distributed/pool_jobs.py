"""Jobs for the tests of the pool itself; they import no megatron-core, so they start quickly."""

import os
import time

import torch
import torch.distributed as dist


def sum_of_ranks(rank: int, factor: int) -> tuple[int, int]:
    """An all-reduced number, and the worker that made it."""
    total = torch.tensor(rank * factor)
    dist.all_reduce(total)
    return int(total), os.getppid()


def fail_on(rank: int, bad_rank: int) -> None:
    """One rank fails, the others wait for it in a collective."""
    if rank == bad_rank:
        raise ZeroDivisionError("told to fail")
    dist.barrier()


def sleep_on(rank: int, slow_rank: int) -> None:
    """One rank never comes back."""
    if rank == slow_rank:
        time.sleep(3600)


def die_on(rank: int, dying_rank: int) -> None:
    """One process disappears without a word."""
    if rank == dying_rank:
        os._exit(3)
    dist.barrier()
