"""Whether what is about to be saved is finite: an update may spoil weights of a good step.

Loss and gradient are those from before the update. After it, a learning rate far too high or a
second moment that overflowed shows in the weights first; saved, they would take the place of good
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from hysparse_megatron.checkpoint.state import Saveable


def rank_not_finite(state: Saveable) -> int | None:
    """The last rank with a value that is not finite; None if there is none. Collective.

    Looks at weights, buffers, main parameters and moments, each read once and nothing written: on a
    CPU half the time of copying them for the save.
    """
    bad = not _all_finite(_tensors(state))
    worst = torch.tensor(dist.get_rank() + 1 if bad else 0, device=state.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return int(worst) - 1 if worst else None


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    # A NaN is both the smallest and the largest value. Sums and norms could overflow on the way.
    extremes: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:  # an optimizer may count its steps on the CPU
        found = extremes.setdefault(tensor.device, [])
        found += (extreme.double() for extreme in tensor.aminmax())
    return all(bool(torch.stack(found).isfinite().all()) for found in extremes.values())


def _tensors(state: Saveable) -> Iterator[Tensor]:
    for model in state.models:
        yield from _with_values(model.parameters())
        yield from _with_values(model.buffers())
    for part in _parts(state.optimizer):
        for group in part.optimizer.param_groups:
            yield from _with_values(group["params"])
        for kept in part.optimizer.state.values():
            yield from _with_values(kept.values())


def _with_values(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            yield value.detach()


def _parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """The optimizers inside a chained one, which may be chained themselves."""
    if isinstance(optimizer, ChainedOptimizer):
        for part in optimizer.chained_optimizers:
            yield from _parts(part)
    else:
        yield optimizer
