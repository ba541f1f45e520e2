"""What data-parallel ranks send beside computing: when they do, and that it changes nothing."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from hysparse_megatron.config.parallel import OverlapConfig
from hysparse_megatron.config.schema import Config
from hysparse_megatron.model.layer import HySparseLayer
from hysparse_megatron.training.state import TrainingState
from hysparse_megatron.training.step import train_step
from tests.distributed.cases import (
    DENSE_FIRST,
    FEW,
    INSIDE,
    INTERLEAVED,
    SHORT,
    SHORT_FULL,
    TIED,
    Case,
    random_tokens,
)
from tests.distributed.pool import WorkerPool
from tests.distributed.ranks import Piece, pieces, prepare, share_of, whole_gradients
from tests.distributed.reassemble import relative_difference

pytestmark = pytest.mark.distributed

REDUCE, GATHER, LAYER, FINALIZE = "reduce", "gather", "layer", "finalize"
APART = OverlapConfig(grad_reduce=False, param_gather=False)

UNCLIPPED = {"clip_grad": 0.0}
"""A norm over buckets is rounded as they are cut, which clipping would pass on to all weights."""

CASES = [
    replace(case, optim=UNCLIPPED)
    for case in (
        Case("dp2", dp=2, train=FEW),
        Case("dp2-tied-pp2-recompute-full", INSIDE, dp=2, pp=2, model=TIED, train=SHORT_FULL),
        Case("dp2-moe-pp2-vpp2-ep2", INTERLEAVED, dp=2, pp=2, vpp=2, ep=2, **DENSE_FIRST),
        Case("cp2-tp2-sp", cp=2, tp=2, sp=True, train=SHORT),
    )
]


@dataclass
class Watched:
    """Of one rank."""

    gradients: dict[str, Piece] = field(default_factory=dict)
    """Of one more step."""

    steps: list[list[str]] = field(default_factory=list)
    """What happened in each, in order."""
    buckets: int = 0
    norms: list[float] = field(default_factory=list)
    unsettled: dict[str, Piece] = field(default_factory=dict)
    """Parameters after the last step, as this rank's memory has them."""
    settled: dict[str, Piece] = field(default_factory=dict)
    final: dict[str, Piece] = field(default_factory=dict)


@contextlib.contextmanager
def _watching(state: TrainingState, events: list[str]) -> Iterator[None]:
    def recorded(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            events.append(name)
            return function(*arguments, **options)

        return call

    group, put = _ParamAndGradBucketGroup, mock.patch.object
    start = group.start_grad_sync

    def start_once(of: _ParamAndGradBucketGroup, *arguments: Any, **options: Any) -> None:
        if of.grad_reduce_handle is None:  # megatron-core asks again for what is on its way
            events.append(REDUCE)
        start(of, *arguments, **options)

    finalize = recorded(FINALIZE, state.megatron.finalize_model_grads_func)
    with (
        put(group, "start_grad_sync", start_once),
        put(group, "start_param_sync", recorded(GATHER, group.start_param_sync)),
        put(HySparseLayer, "forward", recorded(LAYER, HySparseLayer.forward)),
        put(state.megatron, "finalize_model_grads_func", finalize),
    ):
        yield


def watch(rank: int, config: Config, tokens: Sequence[np.ndarray]) -> Watched:
    """Train on `tokens`, batch by batch."""
    state, seen = prepare(config), Watched()
    seen.buckets = sum(
        len(chunk.bucket_groups) + len(chunk.expert_parallel_bucket_groups)
        for chunk in state.chunks
    )
    for step, batch in enumerate(tokens):
        events: list[str] = []
        with _watching(state, events):
            result = train_step(state, step, share_of(state, torch.from_numpy(batch)))
        seen.steps.append(events)
        seen.norms.append(result.grad_norm)
    seen.unsettled = pieces(state, lambda parameter: parameter)
    state.settle()
    seen.settled = pieces(state, lambda parameter: parameter)
    with whole_gradients(state, seen.gradients):
        train_step(state, len(tokens), share_of(state, torch.from_numpy(tokens[0])))
    state.settle()
    seen.final = pieces(state, lambda parameter: parameter)
    return seen


def _trained(pool: WorkerPool, case: Case) -> list[Watched]:
    config = case.config()
    tokens = [
        random_tokens(2026, step, sequences=config.train.global_batch_size).numpy()
        for step in range(3)
    ]
    return pool.run(case.world_size, watch, config=config, tokens=tokens)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_overlap_changes_when_and_not_what(case: Case, pool: WorkerPool) -> None:
    beside = _trained(pool, case)
    apart = _trained(pool, replace(case, overlap=APART))
    for one, other in zip(beside, apart, strict=True):
        np.testing.assert_allclose(one.norms, other.norms, rtol=1e-6)
        for name in one.final:
            for mine, theirs in ((one.gradients, other.gradients), (one.final, other.final)):
                np.testing.assert_array_equal(mine[name].value, theirs[name].value, name)
        assert one.buckets >= other.buckets
        # The first step only learns how often each parameter is used.
        for events in one.steps[1:]:
            assert events.count(REDUCE) == events.count(GATHER) == one.buckets
            assert REDUCE not in events[events.index(FINALIZE) :]
            assert GATHER not in events[events.index(FINALIZE) :]
        for events in other.steps:
            assert REDUCE not in events[: events.index(FINALIZE)]
            assert GATHER not in events[: events.index(FINALIZE)]


def test_buckets_are_sent_one_by_one(pool: WorkerPool) -> None:
    """Of several, some gradients go before the last layer's turn, and parameters come in turn."""
    for seen in _trained(pool, CASES[0]):
        assert seen.buckets > 2
        events = seen.steps[-1]
        first, last = events.index(LAYER), len(events) - events[::-1].index(LAYER)
        assert 0 < events[:first].count(GATHER) < seen.buckets
        assert GATHER not in events[last:]


def test_what_others_updated_is_old_until_it_is_asked_for(pool: WorkerPool) -> None:
    seen = _trained(pool, CASES[0])
    stale = [
        name
        for name, piece in seen[0].settled.items()
        if relative_difference(piece.value, seen[0].unsettled[name].value) > 0
    ]
    assert stale
    for name, piece in seen[0].settled.items():
        np.testing.assert_array_equal(piece.value, seen[1].settled[name].value)
