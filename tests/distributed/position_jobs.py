"""One start of a whole run in workers of the pool."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist
import wandb

from hysparse_megatron.config.compose import compose
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.training.run import run


def start(rank: int, *, overrides: list[str]) -> list[dict[str, Any]]:
    """Train to the end of `overrides`; what W&B was sent meanwhile, by rank 0 alone."""
    sent: list[dict[str, Any]] = []
    tracker = SimpleNamespace(
        log=sent.append, dir="nowhere", define_metric=mock.Mock(), finish=mock.Mock()
    )
    world_size = dist.get_world_size()
    with mock.patch.object(wandb, "init", return_value=tracker):
        run(compose(overrides), Rank(rank, world_size, rank, world_size))
    return sent
