"""What data-parallel ranks send each other, and beside what: megatron-core's wrapper, told when.

Gradients are reduced bucket by bucket while the backward pass of the last micro-batch goes on, and
updated parameters are gathered bucket by bucket while the next forward pass goes on. Between an
update and that pass a rank's copies of what others have updated are old: whoever reads parameters
in between (an evaluation, a checkpoint) calls `settle` first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from hysparse_megatron.config.schema import Config, OptimizerName
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.runtime.clock import ForwardClock
from hysparse_megatron.training.muon import matrix_layouts


def wrap(
    config: Config,
    megatron: HySparseConfig,
    models: Sequence[MegatronModule],
    groups: ProcessGroupCollection,
    clock: ForwardClock,
) -> list[DistributedDataParallel]:
    """Give the model chunks buffers for gradients, and `megatron` what its schedules call.

    While a forward pass waits for parameters, `clock` is paused.
    """
    overlap, interleaved = config.parallel.overlap, config.parallel.vpp is not None
    alone = groups.dp_cp.size() == 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.parallel.grad_reduce_in_fp32,
        use_distributed_optimizer=True,
        num_distributed_optimizer_instances=config.parallel.num_distributed_optimizer_instances,
        overlap_grad_reduce=overlap.grad_reduce and not alone,
        overlap_param_gather=overlap.param_gather and not alone,
        # All stages send at once: a stage that computes would wait for one that sends.
        align_param_gather=overlap.param_gather and interleaved,
        bucket_size=overlap.bucket_size,
    )
    with_muon = config.optim.name is OptimizerName.muon
    layouts = matrix_layouts(models, ddp_config, groups) if with_muon else [None] * len(models)
    chunks = [
        DistributedDataParallel(
            config=megatron,
            ddp_config=ddp_config,
            module=model,
            disable_bucketing=index > 0,
            full_param_layout=layout,
        )
        for index, (model, layout) in enumerate(zip(models, layouts, strict=True))
    ]
    megatron.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        megatron.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        megatron.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])
    if ddp_config.align_param_gather and ddp_config.overlap_param_gather:
        megatron.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])
    for chunk in chunks:
        for group in _bucket_groups(chunk):
            group.finish_param_sync = functools.partial(_waited_for, group, clock)
    return chunks


BucketGroup = Any
"""megatron-core's, which it does not export."""


def _bucket_groups(chunk: DistributedDataParallel) -> list[BucketGroup]:
    return chunk.bucket_groups + chunk.expert_parallel_bucket_groups


def _waited_for(group: BucketGroup, clock: ForwardClock, **options: bool) -> None:
    """In place of a bucket group's own method, which the hooks of all modules call."""
    if group.param_gather_handle is not None or not group.param_gather_dispatched:
        with clock.paused():
            type(group).finish_param_sync(group, **options)


def _one_or_all(functions: list) -> object:
    """What megatron-core's schedules take: a list with interleaving, else a function."""
    return functions if len(functions) > 1 else functions[0]


def settle(chunks: Sequence[DistributedDataParallel]) -> None:
    """Bring what other ranks have updated. Collective; does nothing where nothing is outstanding.

    Afterwards parameters may be read, until the next update.
    """
    with torch.no_grad():
        for chunk in chunks:
            if not chunk.ddp_config.overlap_param_gather:
                continue
            for group in _bucket_groups(chunk):
                if group.param_gather_handle is not None or not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)


def describe_overlap(chunks: Sequence[DistributedDataParallel]) -> str:
    """What is sent beside computing on this rank, and what is not."""
    ddp_config = chunks[0].ddp_config
    buckets = sum(len(_bucket_groups(chunk)) for chunk in chunks)
    told = {
        "gradients beside the backward pass": ddp_config.overlap_grad_reduce,
        "parameters beside the forward pass": ddp_config.overlap_param_gather,
    }
    beside = [name for name, on in told.items() if on]
    how = f"sends {' and '.join(beside)}, in {buckets} buckets" if beside else "sends between steps"
    instances = ddp_config.num_distributed_optimizer_instances
    several = f", with {instances} instances of the optimizer" if instances > 1 else ""
    return f"data parallel: {how}{several}"
