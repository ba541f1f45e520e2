"""What one rank does in the tests of context parallelism; runs inside a worker of `pool.py`."""

from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from hysparse_kernels import KeyValueGradients, block_sparse_attention
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hysparse_megatron.config.schema import Config
from hysparse_megatron.model import attend, context_parallel, regather
from hysparse_megatron.model.context_parallel import Pending, Shard, Windows, gather_key_value
from hysparse_megatron.training.step import train_step
from tests.distributed.ranks import prepare, share_of
from tools.step_benchmark.attending import MODEL, replaced

Grads = tuple[np.ndarray, ...]


def count_collectives(
    rank: int, config: Config, tokens: np.ndarray, layerwise: bool = False
) -> Counter[tuple[str, int]]:
    """Collectives of one training step over context-parallel ranks: by name and tokens sent."""
    state = prepare(config)
    counted: Counter[tuple[str, int]] = Counter()
    gather = context_parallel.start_all_gather
    scatter = context_parallel.start_reduce_scatter

    def counted_gather(own: Tensor, group: dist.ProcessGroup) -> Pending:
        assert group is state.groups.cp
        counted["gather", own.shape[0]] += 1
        return gather(own, group)

    def counted_scatter(by_rank: Tensor, group: dist.ProcessGroup) -> Pending:
        assert by_rank.dtype is torch.float32, "sums travel as such"
        counted["reduce", by_rank.shape[1]] += 1
        return scatter(by_rank, group)

    with (
        mock.patch.object(context_parallel, "start_all_gather", counted_gather),
        mock.patch.object(context_parallel, "start_reduce_scatter", counted_scatter),
        replaced(state, MODEL, layerwise),
    ):
        train_step(state, 0, share_of(state, torch.from_numpy(tokens)))
    return counted


def step_with_gathered(
    rank: int, config: Config, tokens: np.ndarray
) -> tuple[list[int], list[np.ndarray]]:
    """Gathered tensors that are alive after each gather of a step, and the weights after it."""
    state = prepare(config)
    alive: list[int] = []
    made: list[StorageWeakRef] = []
    gathered = context_parallel.gathered

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        whole = gathered(*arguments)
        made.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in whole)
        alive.append(sum(not storage.expired() for storage in made))
        return whole

    with (
        mock.patch.object(context_parallel, "gathered", watched),
        mock.patch.object(regather, "gathered", watched),
    ):
        train_step(state, 0, share_of(state, torch.from_numpy(tokens)))
    state.settle()
    weights = [p.detach().numpy().copy() for chunk in state.chunks for p in chunk.parameters()]
    return alive, weights


def order_of_a_step(rank: int, config: Config, tokens: np.ndarray) -> list[str]:
    """What is sent and computed one after the other, of tails and of sparse branches alone."""
    state = prepare(config)
    tail_rows = 2 * (config.model.window - 1)
    order: list[str] = []
    done = Pending.done

    def started(name: str) -> Any:
        start = getattr(context_parallel, f"start_{name}")

        def watched(tensor: Tensor, group: dist.ProcessGroup) -> Pending:
            pending = start(tensor, group)
            if pending.result.shape[-4] == tail_rows:
                order.append(f"{name} begins")
            return pending

        return mock.patch.object(context_parallel, f"start_{name}", watched)

    def ended(pending: Pending) -> Tensor:
        if pending.result.shape[-4] == tail_rows:
            order.append("is waited for")
        return done(pending)

    def sparse(*tensors: Tensor, **options: Any) -> Tensor:
        order.append("sparse branch")
        output = block_sparse_attention(*tensors, **options)
        output.register_hook(lambda _gradient: order.append("its backward pass"))
        return output

    with (
        started("all_gather"),
        started("reduce_scatter"),
        mock.patch.object(Pending, "done", ended),
        mock.patch.object(attend, "block_sparse_attention", sparse),
    ):
        train_step(state, 0, share_of(state, torch.from_numpy(tokens)))
    return order


def gather_and_sum(rank: int, key: np.ndarray, value: np.ndarray, weights: Grads) -> Grads:
    """Gradients of this rank's part of key and value, by what every rank makes of all of them.

    Each weighs the gathered tensors with `weights[rank]`, half by autograd, half by adding.
    """
    group = dist.group.WORLD
    assert group is not None
    whole_key, whole_value = torch.from_numpy(key), torch.from_numpy(value)
    shard = Shard.of(group, key.shape[0])
    own = [shard.take(whole).requires_grad_() for whole in (whole_key, whole_value)]
    sums = KeyValueGradients()
    gathered = gather_key_value(own[0], own[1], shard, group, sums)
    assert torch.equal(gathered[0], whole_key)
    assert torch.equal(gathered[1], whole_value)
    weight = torch.from_numpy(weights[rank])
    loss = (gathered[0] * weight).sum() + (gathered[1] * weight).sum()
    added = (weight.expand_as(whole).transpose(0, 1) for whole in (whole_key, whole_value))
    sums.add(*added)
    loss.backward()
    return tuple(np.asarray(part.grad) for part in own)


def tails_and_sum(rank: int, key: np.ndarray, value: np.ndarray, tail: int) -> Grads:
    """Gradients of this rank's part of key and value, each weighed by its place in a chunk.

    A rank weighs what it has before its chunks by 10, and its own tokens by 1.
    """
    group = dist.group.WORLD
    assert group is not None
    whole_key, whole_value = torch.from_numpy(key), torch.from_numpy(value)
    shard = Shard.of(group, key.shape[0])
    own = [shard.take(whole).requires_grad_() for whole in (whole_key, whole_value)]
    parts = Windows(own[0], own[1], tail, shard, group).received()
    loss = torch.zeros((), dtype=torch.float64)
    for index, (rows, start) in enumerate(shard.chunks):
        before = min(tail, start)
        size = rows.stop - rows.start
        for part, whole in zip(parts[2 * index :], (whole_key, whole_value), strict=False):
            assert torch.equal(part, whole[start - before : start + size])
            loss = loss + 10 * part[:before].sum() + part[before:].sum()
    loss.backward()
    return tuple(np.asarray(part.grad) for part in own)
