"""What context-parallel ranks send each other, and that a hybrid block sends it once."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.config.schema import Config, Recompute
from hysparse_megatron.model.context_parallel import Shard, documents_between
from hysparse_megatron.plan.overview import make_overview
from tests.distributed.cases import INSIDE, LAYOUT, SHORT, VOCAB, Case, random_tokens
from tests.distributed.context_jobs import (
    count_collectives,
    gather_and_sum,
    order_of_a_step,
    step_with_gathered,
    tails_and_sum,
)
from tests.distributed.pool import WorkerPool


@given(ranks=st.integers(1, 5), chunk=st.integers(1, 7))
def test_ranks_hold_all_tokens_once(ranks: int, chunk: int) -> None:
    sequence = chunk * (1 if ranks == 1 else 2 * ranks)
    shards = [Shard(rank, ranks, sequence) for rank in range(ranks)]
    held = [shard.positions(torch.device("cpu")) for shard in shards]
    assert sorted(torch.cat(held).tolist()) == list(range(sequence))
    if ranks > 1:
        by_rank = torch.stack(held)
        assert torch.equal(shards[0].in_order(by_rank), torch.arange(sequence))
        assert torch.equal(shards[0].by_rank(torch.arange(sequence)), by_rank)
        # As many keys before the queries of one rank as before those of another.
        assert len({int(positions.sum()) for positions in held}) == 1


@given(
    st.lists(st.lists(st.integers(1, 11), max_size=4), min_size=1, max_size=3),
    st.integers(0, 6),
    st.integers(1, 6),
)
def test_documents_of_a_part_of_every_sequence(
    starts: list[list[int]], first: int, size: int
) -> None:
    sequence = 12
    begins = [sorted({0, *row}) for row in starts]
    offsets = [row * sequence + place for row, places in enumerate(begins) for place in places]
    offsets.append(len(starts) * sequence)
    packed = documents_between(
        torch.tensor(offsets, dtype=torch.int32), len(starts), sequence, first, first + size
    )
    assert packed.dtype is torch.int32
    wanted = {len(starts) * size}
    for row, places in enumerate(begins):
        wanted |= {row * size} | {
            row * size + p - first for p in places if first < p < first + size
        }
    assert packed.tolist() == sorted(packed.tolist())
    assert set(packed.tolist()) == wanted


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_gathered_gradients_are_summed_over_ranks(
    ranks: int, pool: WorkerPool, session_seed: int
) -> None:
    random = np.random.default_rng(session_seed)
    sequence = 4 * ranks
    key, value = random.normal(size=(sequence, 2, 3, 5)), random.normal(size=(sequence, 2, 3, 4))
    weights = tuple(random.normal(size=(sequence, 1, 1, 1)) for _ in range(ranks))
    found = pool.run(ranks, gather_and_sum, key=key, value=value, weights=weights)
    total = torch.from_numpy(2 * sum(weights))
    for rank, (key_gradient, value_gradient) in enumerate(found):
        expected = Shard(rank, ranks, sequence).take(total).numpy()
        for gradient in (key_gradient, value_gradient):
            assert gradient.dtype == np.float64
            assert np.abs(gradient - expected).max() <= 1e-14


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "tail"), [(2, 0), (2, 3), (3, 4)])
def test_gradients_of_tails_return_to_their_ranks(
    ranks: int, tail: int, pool: WorkerPool, session_seed: int
) -> None:
    random = np.random.default_rng(session_seed)
    sequence = 2 * ranks * 4
    key, value = random.normal(size=(sequence, 2, 1, 3)), random.normal(size=(sequence, 2, 1, 2))
    expected = torch.ones(sequence, 1, 1, 1)
    for start in range(4, sequence, 4):
        expected[start - tail : start] += 10
    for rank, gradients in enumerate(
        pool.run(ranks, tails_and_sum, key=key, value=value, tail=tail)
    ):
        own = Shard(rank, ranks, sequence).take(expected).numpy()
        for gradient in gradients:
            assert np.array_equal(gradient, np.broadcast_to(own, gradient.shape))


def with_vocabulary(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=VOCAB))


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [LAYOUT, INSIDE])
def test_a_block_is_gathered_once(layout: str, pool: WorkerPool, session_seed: int) -> None:
    """By the oracle for all its readers, and once more on a stage that is cut off from it."""
    pp = 1 + layout.count("|")
    case = Case("counted", layout, cp=2, pp=pp, train={**SHORT, "micro_batch_size": 2})
    config = case.config()
    tokens = random_tokens(session_seed, sequences=config.train.global_batch_size)
    found = pool.run(case.world_size, count_collectives, config=config, tokens=tokens.numpy())
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size
    kinds = parse_layout(layout).kinds
    rows = config.train.seq_length // 2
    tails = 2 * (config.model.window - 1)
    oracles = sum(kind.is_oracle for kind in kinds) + pp - 1
    windows = sum(not kind.is_oracle for kind in kinds)
    # Of each pipeline rank one context-parallel rank: they all do the same.
    total: Counter[tuple[str, int]] = sum(found[::2], Counter())
    assert found[::2] == found[1::2]
    assert total == {
        ("gather", rows): micro_batches * oracles,
        ("reduce", rows): micro_batches * oracles,
        ("gather", tails): micro_batches * windows,
        ("reduce", tails): micro_batches * windows,
    }
    # What a rank sends is what the plan says: in a ring all but its own share of what comes out.
    model, train = config.model, config.train
    row_bytes = 4 * train.micro_batch_size * model.num_query_groups
    row_bytes *= model.head_dim + model.value_dim
    planned = make_overview(with_vocabulary(config), case.world_size).ranks
    for rank, plan in zip(found[::2], planned, strict=True):
        sent = sum(count * of_rows * row_bytes for (_, of_rows), count in rank.items())
        assert sent == micro_batches * plan.traffic.context_bytes


@pytest.mark.distributed
def test_a_benchmark_can_gather_in_every_layer(pool: WorkerPool, session_seed: int) -> None:
    config = Case("layerwise", LAYOUT, cp=2, train=SHORT).config()
    tokens = random_tokens(session_seed, sequences=config.train.global_batch_size).numpy()
    [found, same] = pool.run(2, count_collectives, config=config, tokens=tokens, layerwise=True)
    assert found == same
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size
    rows, layers = config.train.seq_length // 2, len(parse_layout(LAYOUT).kinds)
    for name in ("gather", "reduce"):
        assert found[name, rows] == micro_batches * layers


@pytest.mark.distributed
def test_tails_travel_beside_the_sparse_branch(pool: WorkerPool, session_seed: int) -> None:
    config = Case("order", "F S", cp=2, train={**SHORT, "global_batch_size": 2}).config()
    tokens = random_tokens(session_seed, sequences=2).numpy()
    for order in pool.run(2, order_of_a_step, config=config, tokens=tokens):
        assert order == [
            "all_gather begins",
            *["sparse branch"] * 2,
            "is waited for",
            "reduce_scatter begins",
            *["its backward pass"] * 2,
            "is waited for",
        ]


BLOCKS = "F S W F S F"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        Case("none", BLOCKS, cp=2, train=SHORT),
        Case("selective", INSIDE, cp=2, pp=2, train={**SHORT, "recompute": Recompute.selective}),
        Case(
            "full",
            "F S W F S F",
            cp=2,
            train={**SHORT, "recompute": Recompute.full},
            documents=True,
        ),
    ],
    ids=lambda case: case.name,
)
def test_what_is_gathered_again_need_not_be_kept(
    case: Case, pool: WorkerPool, session_seed: int
) -> None:
    config = case.config()
    tokens = random_tokens(session_seed, sequences=config.train.global_batch_size).numpy()
    again = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, cp_keep_kv=False)
    )
    keeping, gathering = (
        pool.run(case.world_size, step_with_gathered, config=each, tokens=tokens)
        for each in (config, again)
    )
    planned, plans = (
        make_overview(with_vocabulary(each), case.world_size).ranks for each in (config, again)
    )
    rows = 4 * config.model.num_query_groups * (config.model.head_dim + config.model.value_dim)
    train = config.train
    whole = rows * train.seq_length * train.micro_batch_size
    micro_batches = train.global_batch_size // train.micro_batch_size
    for rank, ((kept, weights), (alive, same)) in enumerate(zip(keeping, gathering, strict=True)):
        assert all(np.array_equal(*pair) for pair in zip(weights, same, strict=True))
        # Of one block the key and the value, whatever the number of blocks and micro-batches.
        assert max(alive) == 2 < max(kept)
        before, now = planned[rank // 2], plans[rank // 2]
        more = (len(alive) - len(kept)) * whole / 2 / micro_batches
        assert now.traffic.context_bytes - before.traffic.context_bytes == more > 0
        [saved] = {
            name: before.memory.activations[name] - size
            for name, size in now.memory.activations.items()
            if size != before.memory.activations[name]
        }.items()
        assert saved[0] == "shared key and value"
        assert saved[1] % (whole // 2) == 0
        # Where the loss needs more than attention the block that is gathered again adds nothing.
        added = now.memory.working_set - before.memory.working_set
        assert 0 <= added <= whole
        assert added == whole or train.recompute is not Recompute.full
