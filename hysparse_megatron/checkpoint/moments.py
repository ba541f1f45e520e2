"""The distributed optimizer's tensors for a save, without the copies megatron-core makes of them.

To save them in the shape of their parameters, megatron-core copies main parameters and moments
several times, on every data-parallel rank, while training waits. Here they are taken as they lie in
the optimizer where one rank holds them whole, and gathered on the rank that writes them otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

GATHER_NUMEL = 2**24
"""Values that each rank sends at a time: the writing rank must not need much device memory."""


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside a chained one."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers inside `optimizer`."""
    return [part for part in parts_of(optimizer) if isinstance(part, DistributedOptimizer)]


@contextlib.contextmanager
def taken_in_place(parts: Sequence[DistributedOptimizer]) -> Iterator[None]:
    """Within this, the sharded state for a save holds the optimizer's own tensors where it can."""
    for part in parts:
        part.get_parameter_state_dp_zero = functools.partial(_parameter_state, part)
    # megatron-core collects garbage after its copies; without them that is most of the waiting.
    distrib_optimizer.gc = SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        distrib_optimizer.gc = gc
        for part in parts:
            del part.get_parameter_state_dp_zero


class _Pieces:
    """Stands for a flat buffer of all parameters, of which only whole parameters are asked for."""

    def __init__(self, is_writer: bool) -> None:
        self._is_writer = is_writer
        self._by_start: dict[int, Tensor] = {}

    def put(self, start: int, piece: Tensor) -> None:
        self._by_start[start] = piece

    def __getitem__(self, where: slice) -> Tensor:
        numel = where.stop - where.start
        if not self._is_writer:
            # Only its shape counts: what is never written takes no memory.
            return torch.empty(numel)
        piece = self._by_start[where.start]
        assert piece.numel() == numel, (where, piece.shape)
        return piece


def _parameter_state(
    part: DistributedOptimizer,
    use_gloo_comm: bool = True,
    empty_data: bool = False,
    return_on_all_ranks: bool = False,
) -> dict[Any, Any]:
    """In place of `DistributedOptimizer.get_parameter_state_dp_zero`, for saving."""
    del use_gloo_comm, return_on_all_ranks
    assert not empty_data, "for saving alone"
    group = part.data_parallel_group
    # Other instances of the optimizer hold the same, and write nothing.
    is_first = part.distributed_optimizer_instance_id == 0
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, ranges in enumerate(part.gbuf_ranges):
        [(dtype, buckets)] = ranges.items()
        buffer = part.buffers[number]
        keys = ("param", *part.optimizer_state_keys)
        pieces = {key: _Pieces(is_first and group.rank() == 0) for key in keys}
        for bucket, ours in zip(buffer.buckets, buckets, strict=True) if is_first else ():
            for key, found in pieces.items():
                if group.size() == 1:
                    for parameter, place in ours["param_map"].items():
                        found.put(place["gbuf_world"].start, _tensor(part, parameter, key))
                    continue
                whole = _gather(part, bucket, ours["param_map"], key, group)
                if whole is None:
                    continue
                for start, end, *_ in buffer.param_index_map.values():
                    if bucket.offset <= start < bucket.offset + len(whole):
                        found.put(start, whole[start - bucket.offset : end - bucket.offset])
        state[number] = {dtype: pieces}
    return state


def _tensor(part: DistributedOptimizer, parameter: torch.nn.Parameter, key: str) -> Tensor:
    return part._get_main_param_and_optimizer_states(parameter)[key].detach().float().view(-1)


def _gather(
    part: DistributedOptimizer,
    bucket: Any,
    param_map: dict[torch.nn.Parameter, Any],
    key: str,
    group: dist.ProcessGroup,
) -> Tensor | None:
    """All ranks' shares of a bucket, on the CPU of the group's first rank; None on the others."""
    numel = bucket.grad_data.numel() // group.size()
    share = torch.zeros(numel, dtype=torch.float32, device=bucket.grad_data.device)
    for parameter, place in param_map.items():
        local = place["gbuf_local"]
        share[local.start : local.end].copy_(_tensor(part, parameter, key))
    is_first = group.rank() == 0
    whole = torch.empty(numel * group.size(), device="cpu") if is_first else None
    for start in range(0, numel, GATHER_NUMEL):
        sent = share[start : start + GATHER_NUMEL]
        received = [torch.empty_like(sent) for _ in range(group.size())] if is_first else None
        dist.gather(sent, received, dst=dist.get_global_rank(group, 0), group=group)
        for rank, values in enumerate(received or ()):
            begin = rank * numel + start
            whole[begin : begin + len(values)].copy_(values)  # type: ignore[index]
    return whole
