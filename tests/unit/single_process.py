"""One process as a whole run: megatron-core on this machine's device, groups of one rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from hysparse_megatron.config.schema import Config, ParallelConfig
from hysparse_megatron.runtime import megatron_on_cpu
from hysparse_megatron.runtime.process_groups import build_process_groups, destroy_process_groups
from hysparse_megatron.training.state import TrainingState, build_state

BACKEND = "nccl" if torch.cuda.is_available() else "gloo"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def default_group() -> Iterator[None]:
    """A default process group of this process alone."""
    megatron_on_cpu.install()
    # A backward of a test before leaves it with another shape than a schedule's.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def model_groups() -> Iterator[ProcessGroupCollection]:
    """The default group and megatron-core's groups, all of this process alone."""
    with default_group():
        try:
            yield build_process_groups(ParallelConfig(), num_query_groups=1)
        finally:
            destroy_process_groups()


@contextmanager
def built_state(config: Config, vocab_size: int) -> Iterator[TrainingState]:
    """Model and optimizer on the CPU, with groups of this process alone."""
    with default_group():
        try:
            yield build_state(config, vocab_size, torch.device("cpu"))
        finally:
            destroy_process_groups()
