"""Process groups: megatron-core's, plus the ranks that share one KV head."""

from __future__ import annotations

import contextlib
import math
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from hysparse_megatron.config.schema import ParallelConfig


class RunGroups(ProcessGroupCollection):
    """megatron-core's groups of this rank, and one of ours."""

    kv_sharing: dist.ProcessGroup | None = None
    """The tensor-parallel ranks with query heads of this rank's KV group; None if it is alone."""


def build_process_groups(parallel: ParallelConfig, num_query_groups: int) -> RunGroups:
    """Create all groups of this run; collective over the default group, once per process."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        # Replaced by the short one after the first step, as in all other groups.
        distributed_timeout_minutes=max(1, math.ceil(parallel.setup_timeout_seconds / 60)),
    )
    timeout = timedelta(seconds=parallel.setup_timeout_seconds)
    groups = RunGroups.use_mpu_process_groups()
    groups.kv_sharing = _build_sharing_group(parallel.tp, num_query_groups, timeout)
    return groups


def destroy_process_groups() -> None:
    """Undo `build_process_groups`, for who builds several layouts in one process.

    Else torch keeps the groups as long as the default one, with the threads of each.
    """
    # It is sized for the layers of the first model that records a loss.
    destroy_moe_metrics_tracker()
    _default, *groups = parallel_state._global_process_group_list or [None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        with contextlib.suppress(ValueError):  # megatron-core has destroyed some of them itself
            dist.destroy_process_group(group)


def _build_sharing_group(
    tensor_parallel_size: int, num_query_groups: int, timeout: timedelta
) -> dist.ProcessGroup | None:
    """See `RunGroups.kv_sharing`."""
    size = tensor_parallel_size // num_query_groups
    if size <= 1:
        return None
    own = None
    # Tensor-parallel ranks are consecutive, so these groups tile the world. Every rank must take
    # part in the creation of every group, in the same order.
    for first in range(0, dist.get_world_size(), size):
        ranks = range(first, first + size)
        group = dist.new_group(list(ranks), timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    return own
