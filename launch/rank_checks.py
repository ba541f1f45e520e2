"""Checks that all ranks of a job make together: the same code and data, clocks, an all-reduce."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hysparse_megatron.config.frozen import config_hash
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import RankFailure
from hysparse_megatron.rundir import versions
from hysparse_megatron.runtime import rendezvous
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.source import git_state

from .findings import Finding, Level, fail, ok, warn

SKEW_SECONDS = 1.0
"""Clocks further apart than this are worth a warning: deadlines and logs go by them."""
_ROUNDS = 5
_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}


def rank_checks(
    config: Config, rank: Rank, own: Sequence[Finding], timeout_seconds: float
) -> list[Finding]:
    """Findings of all ranks, the same list on each. Collective; makes and destroys a process group.

    `own` are those of this machine. Raises RankFailure where ranks do not meet, or lose each other.
    """
    with _group(rank, timeout_seconds) as device:
        everybody = _gather({"host": socket.gethostname(), "own": own, **_identity(config, device)})
        findings = [
            *_merged(everybody),
            *_same_everywhere(everybody),
            *_clocks(),
            *_all_reduce(device),
        ]
        return _gather(findings)[0]  # as rank 0 sees it: clocks and speeds differ a little


@contextlib.contextmanager
def _group(rank: Rank, timeout_seconds: float) -> Iterator[torch.device]:
    """All ranks, joined, on the device that training would use."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank.local_rank)
    store = rendezvous.join(rank, timeout_seconds)
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        yield torch.device("cuda", rank.local_rank) if cuda else torch.device("cpu")
        dist.destroy_process_group()
    except (dist.DistError, RuntimeError) as error:
        told = str(error).partition("\n")[0]
        raise RankFailure(f"lost another rank, or waited too long for it: {told}", None) from error


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _identity(config: Config, device: torch.device) -> dict[str, str]:
    """What has to be the same on all ranks, by name."""
    git = git_state()
    code = "no git checkout"
    if git is not None:
        code = f"{git.get('snapshot', '')} {git['commit']}{'+' if git['dirty'] else ''}".strip()
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    found = {"configuration": config_hash(config), "code": code, "packages": packages}
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found["GPUs"] = f"{torch.cuda.get_device_name(device)}, NCCL {nccl}"
    return found


def _merged(everybody: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Every machine's own findings, equal ones once, with the machines that have them."""
    where: dict[Finding, list[str]] = {}
    for one in everybody:
        for finding in one["own"]:
            where.setdefault(finding, []).append(one["host"])
    for finding, hosts in where.items():
        if finding.level is Level.OK:
            yield finding
        else:
            found = f"{finding.found} (on {_some(hosts)})"
            yield Finding(finding.level, finding.what, found, finding.fix)


def _same_everywhere(everybody: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    for name, expected in everybody[0].items():
        if name in ("host", "own"):
            continue
        others = [rank for rank, one in enumerate(everybody) if one[name] != expected]
        if not others:
            yield ok(name, f"the same on all {len(everybody)} ranks: {expected[:60]}")
            continue
        other = everybody[others[0]]
        found = (
            f"rank {others[0]} on {other['host']} has {other[name]}, "
            f"rank 0 on {everybody[0]['host']} has {expected}"
        )
        yield fail(name, found, "start all ranks with the same files, packages and GPUs")


def _clocks() -> Iterator[Finding]:
    """Clocks compared right after a barrier, which all ranks leave within milliseconds."""
    dist.barrier()
    told = _gather((time.time(), socket.gethostname()))
    (first, early), (last, late) = min(told), max(told)
    skew = last - first
    if skew < SKEW_SECONDS:
        yield ok("clocks", f"within {skew:.2f} s")
    else:
        found = f"{late} is {skew:.1f} s ahead of {early}"
        yield warn("clocks", found, "synchronise them (chrony); deadlines go by the clock")


def _all_reduce(device: torch.device) -> Iterator[Finding]:
    """A sum over all ranks, and how fast it goes."""
    world, elements = dist.get_world_size(), _BYTES[device.type] // 4
    values = torch.empty(elements, device=device)
    times = []
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(_ROUNDS):
        values.fill_(dist.get_rank())
        times.append(_seconds(lambda: dist.all_reduce(values), device))
        wrong += (values != sum(range(world))).sum()
    seconds = min(times)
    dist.all_reduce(wrong)
    if wrong.item():
        found = f"{int(wrong.item())} wrong sums over {world} ranks"
        yield fail("all-reduce", found, "a broken link or GPU: leave out nodes until it goes away")
        return
    gigabytes = 2 * (world - 1) / world * _BYTES[device.type] / seconds / 1e9
    found = f"{world} ranks, {_BYTES[device.type] / 2**20:.0f} MiB in {1e3 * seconds:.1f} ms"
    yield ok("all-reduce", f"{found} ({gigabytes:.1f} GB/s a rank)")


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _some(names: Sequence[str]) -> str:
    unique = sorted(set(names))
    rest = len(unique) - 3
    return ", ".join(unique[:3]) + (f" and {rest} more" if rest > 0 else "")
