"""How ranks find each other, and one timeout for everything they wait for."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from hysparse_megatron.errors import RankFailure
from hysparse_megatron.runtime.launcher import LOOPBACK, STORE_DESCRIPTOR, Rank

_LOOK_SECONDS = 0.1

_timeout = timedelta(minutes=10)


def join(rank: Rank, timeout_seconds: float) -> dist.Store:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT and return the store they share.

    Raises RankFailure, naming who is missing, if not all have come within `timeout_seconds`.
    """
    host = os.environ.setdefault("MASTER_ADDR", LOOPBACK)
    port = int(os.environ.setdefault("MASTER_PORT", "29500"))
    limit = timedelta(seconds=timeout_seconds)
    # Under torchrun its agent may keep the store.
    keeps_store = rank.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store: dist.Store = dist.TCPStore(
            host,
            port,
            rank.world_size,
            keeps_store,
            limit,
            wait_for_workers=False,
            master_listen_fd=_handed_over() if keeps_store else None,
        )
    except (dist.DistError, RuntimeError) as error:
        if keeps_store:
            raise RankFailure(
                f"rank 0 cannot listen at {host}:{port}; set MASTER_PORT to a free port "
                f"({_first_line(error)})",
                0,
            ) from error
        raise RankFailure(
            f"rank {rank.rank} on {socket.gethostname()} found nobody at {host}:{port} within "
            f"{timeout_seconds:.0f} s; rank 0 was not started, or not there ({_first_line(error)})",
            0,
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"hysparse/{attempt}", store)
    try:
        store.set(f"joined/{rank.rank}", "")
        _wait_for_all(store, rank, timeout_seconds)
    except dist.DistError as error:
        raise RankFailure(
            f"rank 0 left {host}:{port} before all had joined ({_first_line(error)})", 0
        ) from error
    return store


def _handed_over() -> int | None:
    """The listening socket that the launcher of one machine gave to rank 0; None without one."""
    number = os.environ.pop(STORE_DESCRIPTOR, None)
    if number is None:
        return None
    os.set_inheritable(int(number), False)
    return int(number)


def _wait_for_all(store: dist.Store, rank: Rank, timeout_seconds: float) -> None:
    missing = list(range(rank.world_size))
    end = time.monotonic() + timeout_seconds
    while missing:
        missing = [other for other in missing if not store.check([f"joined/{other}"])]
        if missing and time.monotonic() > end:
            joined = rank.world_size - len(missing)
            named = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            raise RankFailure(
                f"{joined}/{rank.world_size} joined within {timeout_seconds:.0f} s; missing: rank "
                f"{named}. All ranks must be started, with the same MASTER_ADDR and MASTER_PORT",
                missing[0],
            )
        if missing:
            time.sleep(_LOOK_SECONDS)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def current_timeout() -> timedelta:
    """How long a rank may wait for another one now."""
    return _timeout


def set_timeout(seconds: float) -> None:
    """Let every process group that exists wait for so long from now on, sub-groups included.

    gloo's point-to-point calls keep what their group was made with: whoever waits for one passes
    `current_timeout()`.
    """
    global _timeout
    _timeout = timedelta(seconds=seconds)
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(_timeout, group)
