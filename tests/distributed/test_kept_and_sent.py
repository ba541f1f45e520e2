"""What a rank keeps, where, and sends: ranks that share a KV group, and activations on the host."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

from hysparse_megatron.architecture.layers import FullGate, GateKind
from hysparse_megatron.config.schema import Config, Recompute, RecomputeModule
from hysparse_megatron.model.offload import _Link
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.training.step import train_step
from tests.distributed.cases import (
    EXPERTS,
    INSIDE,
    INTERLEAVED,
    SHORT,
    SHORT_FULL,
    Case,
    random_tokens,
)
from tests.distributed.pool import WorkerPool
from tests.distributed.ranks import Piece, pieces, prepare, share_of, whole_gradients

pytestmark = pytest.mark.distributed

SEQUENCE, HIDDEN = 256, 64
LAYOUT = "F S S W F"
MODEL = {"hidden_size": HIDDEN, "num_attention_heads": 8, "head_dim": 16, "vocab_size": 128}
ONE_GROUP = {**MODEL, "num_query_groups": 1}
GATED = {
    **ONE_GROUP,
    "gate": GateKind.channel,
    "full_gate": FullGate.channel,
    "qkv_bias": True,
}
TRAIN = {"seq_length": SEQUENCE, "micro_batch_size": 1, "global_batch_size": 1}

CASES = [
    Case("tp2-2groups", LAYOUT, tp=2, model=MODEL, train=TRAIN),
    Case("tp2-mqa", LAYOUT, tp=2, model=ONE_GROUP, train=TRAIN),
    Case("tp2-sp-mqa-gated", LAYOUT, tp=2, sp=True, model=GATED, train=TRAIN),
    Case("tp4-sp-mqa", LAYOUT, tp=4, sp=True, model=ONE_GROUP, train=TRAIN),
]


@contextlib.contextmanager
def counted_collectives(sent: list[float]) -> Iterator[None]:
    """Add to `sent` the bytes that a ring sends from each rank."""

    def counting(function: Callable[..., Any], factor: int, whole: int) -> Callable[..., Any]:
        """`whole` says which argument holds what all ranks have together."""

        def counted(*tensors: Tensor, group: dist.ProcessGroup, **options: Any) -> Any:
            ring = (group.size() - 1) / group.size()
            sent.append(factor * tensors[whole].nbytes * ring)
            return function(*tensors, group=group, **options)

        return counted

    with contextlib.ExitStack() as stack:
        for module in (mappings, layers):
            for name, whole in (("dist_all_gather_func", 0), ("dist_reduce_scatter_func", 1)):
                counted = counting(getattr(module, name), 1, whole)
                stack.enter_context(mock.patch.object(module, name, counted))
        all_reduce = counting(dist.all_reduce, 2, 0)
        stack.enter_context(mock.patch.object(dist, "all_reduce", all_reduce))
        yield


def keep_and_send(rank: int, config: Config) -> tuple[int, float]:
    """Bytes of distinct storages that autograd keeps of the layers, and bytes that they send."""
    state = prepare(config)
    [chunk] = state.chunks
    decoder = chunk.module.decoder
    parameters = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Detached: neither the graph nor this function, which it holds, may hold the graph.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor.detach()

    rows = SEQUENCE // (config.parallel.tp if config.parallel.sequence_parallel else 1)
    hidden = torch.randn(rows, 1, HIDDEN, requires_grad=True)
    rotary = chunk.module.rotary_pos_emb(SEQUENCE)
    chunk.train()
    sent: list[float] = []
    with counted_collectives(sent):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = decoder(hidden, None, rotary_pos_emb=rotary)
        output.sum().backward()
    of_layers = [t.untyped_storage() for at, t in kept.items() if at not in parameters]
    return sum(storage.nbytes() for storage in of_layers), sum(sent)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_rank_keeps_and_sends_what_is_planned(case: Case, pool: WorkerPool) -> None:
    config = case.config()
    planned = make_overview(config, case.world_size).ranks[0]
    runs = pool.run(case.world_size, keep_and_send, config=config)
    row = SEQUENCE * HIDDEN * 4 // (case.tp if case.sp else 1)
    # On a CPU a norm keeps its normalised input besides; and the last norm is no layer's.
    norms = row * (2 * len(config.model.layout.split()) + 2)
    for kept, sent in runs:
        assert sent == planned.traffic.tensor_bytes
        # A table of rotary angles and a few index tensors are left out of the plan.
        table = SEQUENCE * config.model.rotary_dim * 4 + 8192
        assert abs(planned.memory.activation_bytes - (kept - norms)) <= table


ON_THE_HOST = {"offload_activations": True, "offload_min_bytes": 0}
NORMS_AGAIN = {
    **SHORT,
    "recompute": Recompute.selective,
    "recompute_modules": [RecomputeModule.norm],
}
HOST_CASES = [
    Case("pp2-vpp2-inside", INTERLEAVED, pp=2, vpp=2),
    Case("pp2-inside-recompute-full", INSIDE, pp=2, model={"vocab_size": 128}, train=SHORT_FULL),
    Case("cp2-gathered-again", "F S W S F", cp=2, train=NORMS_AGAIN),
    Case("moe-tp2-sp-ep2", tp=2, sp=True, ep=2, model=EXPERTS, train=SHORT),
]


def gradients_of_two_steps(
    rank: int, config: Config, tokens: np.ndarray
) -> tuple[list[dict[str, Piece]], tuple[int, int], int]:
    """With the bytes that were copied to the host and back, and the most layers on their way."""
    state = prepare(config)
    host, on_their_way = state.megatron.offload, 0
    begin = _Link._begin_backward

    def watched(link: _Link, layer: Any) -> None:
        nonlocal on_their_way
        begin(link, layer)
        on_their_way = max(on_their_way, len([one for one in link._present if one.held]))

    found: list[dict[str, Piece]] = [{}, {}]
    with mock.patch.object(_Link, "_begin_backward", watched):
        for step, into in enumerate(found):
            with whole_gradients(state, into):
                train_step(state, step, share_of(state, torch.from_numpy(tokens)))
    state.settle()
    found.append(pieces(state, lambda parameter: parameter))
    return found, (0, 0) if host is None else host.copied_bytes, on_their_way


@pytest.mark.parametrize("case", HOST_CASES, ids=lambda case: case.name)
def test_activations_on_the_host_change_nothing(
    case: Case, pool: WorkerPool, session_seed: int
) -> None:
    tokens = random_tokens(session_seed).numpy()
    runs = []
    for more in ({}, ON_THE_HOST):
        config = replace(case, train={**case.train, **more}).config()
        parallel = replace(config.parallel, cp_keep_kv=case.cp == 1)
        config = replace(config, parallel=parallel)
        job = {"config": config, "tokens": tokens[: config.train.global_batch_size]}
        runs.append(pool.run(case.world_size, gradients_of_two_steps, **job))
    for rank, ((plain, nothing, _), (found, (out, back), most)) in enumerate(
        zip(*runs, strict=True)
    ):
        assert nothing == (0, 0)
        assert 0 < back <= out
        assert most <= (3 if case.pp > 1 else 2)
        if config.train.recompute is Recompute.full:
            planned = make_overview(config, case.world_size).ranks[rank].memory.host
            assert planned is not None
            # Without the indices of oracles, that GPUs hold as lists.
            assert 2 * planned.step_bytes <= out <= 1.2 * 2 * planned.step_bytes
        for one, other in zip(plain, found, strict=True):
            for name, piece in one.items():
                np.testing.assert_array_equal(other[name].value, piece.value, name)
