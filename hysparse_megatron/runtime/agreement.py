"""Decisions that all ranks take together: nobody goes on, or fails, alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from hysparse_megatron.errors import HySparseError


def on_rank_zero[Result](action: Callable[[], Result], os_error: type[HySparseError]) -> Result:
    """Run `action` on rank 0 and give its result to every rank.

    An error of ours is raised on every rank alike; an OSError becomes an `os_error`.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        outcome = list(attempt_alone(action, os_error))
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_rank[Result](action: Callable[[], Result], os_error: type[HySparseError]) -> Result:
    """Run `action` on every rank; if it fails anywhere, raise the first failure everywhere."""
    return agree_on(attempt_alone(action, os_error))


def agree_on[Result](attempt: tuple[Result | None, HySparseError | None]) -> Result:
    """The result of this rank's attempt, if it failed on no rank; else the first failure."""
    result, error = attempt
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, found in enumerate(errors):
        if found is not None:
            if rank != dist.get_rank():
                found.args = (f"on rank {rank}: {found}", *found.args[1:])
            raise found
    return result  # type: ignore[return-value]


def attempt_alone[Result](
    action: Callable[[], Result], os_error: type[HySparseError]
) -> tuple[Result | None, HySparseError | None]:
    """Run `action` on this rank; what it returns, or an error of ours."""
    try:
        return action(), None
    except HySparseError as error:
        return None, error
    except OSError as error:
        return None, os_error(f"{type(error).__name__}: {error}")


def require_equal(name: str, value: str, error: type[HySparseError]) -> None:
    """Raise `error` on every rank unless `value` is the same on all of them."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    different = [rank for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise error(
            f"{name} differs between ranks: rank 0 has {values[0]}, rank {different[0]} has "
            f"{values[different[0]]}. All ranks must be started with the same command and files"
        )
