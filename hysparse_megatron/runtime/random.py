"""Random streams as pure functions of (seed, step, rank).

Every training step seeds its streams anew. A resumed run therefore continues bit-exactly without
any generator state in the checkpoint, and a run resumed on another layout has defined streams too.
Initial weights are functions of seed and place: see normal.py.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as megatron_random

from hysparse_megatron.runtime import megatron_on_cpu


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**31) that depends on every part and is the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def seed_step(seed: int, step: int, groups: ProcessGroupCollection) -> None:
    """Set the random streams of one training step.

    The default stream (dropout outside tensor-parallel regions) is equal on all tensor-parallel
    ranks; the `model-parallel-rng` stream differs between them. Both differ between data- and
    context-parallel ranks, pipeline stages and steps.
    """
    step_seed = derive_seed(seed, "step", step, groups.dp_cp.rank(), groups.pp.rank())
    if not megatron_on_cpu.is_active():
        megatron_random.model_parallel_cuda_manual_seed(step_seed, tp_rank=groups.tp.rank())
        return
    torch.manual_seed(step_seed)
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(megatron_random._DATA_PARALLEL_RNG_TRACKER_NAME, step_seed)
    tracker.add(
        megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME,
        derive_seed(step_seed, "tensor", groups.tp.rank()),
    )
