"""Random numbers agree between ranks where they must, and differ where they must."""

import itertools

import numpy as np
import pytest

from hysparse_megatron.config.schema import Precision, Recompute
from tests.distributed.cases import (
    EXPERTS,
    HALF_BATCH,
    INSIDE,
    LAYOUT,
    Case,
    random_tokens,
    without_cuts,
)
from tests.distributed.jobs import DropoutRun, dropout_in_steps, initial_weights
from tests.distributed.pool import WorkerPool
from tests.distributed.ranks import train
from tests.distributed.reassemble import whole

pytestmark = pytest.mark.distributed

DROPOUT = {"hidden_dropout": 0.25}
SEQUENCES = HALF_BATCH["global_batch_size"]


def dropout_case(name: str, layout: str = LAYOUT, **sizes: int) -> Case:
    return Case(name, layout, model=DROPOUT, train=HALF_BATCH, **sizes)  # type: ignore[arg-type]


def run_dropout(
    case: Case, pool: WorkerPool, seed: int, steps: tuple[int, ...] = (0,)
) -> list[list[DropoutRun]]:
    """By rank and step, what was dropped."""
    return pool.run(
        case.world_size,
        dropout_in_steps,
        config=case.config(),
        tokens=random_tokens(seed, sequences=SEQUENCES).numpy(),
        steps=steps,
    )


def assert_equal(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    assert len(one) == len(other) > 0
    for first, second in zip(one, other, strict=True):
        assert np.array_equal(first, second)


def assert_nothing_shared(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    """No draw of one stands anywhere in the other: streams that differ, not streams that lag."""
    assert one
    assert other
    for first, second in itertools.product(one, other):
        assert not np.array_equal(first, second)


def test_masks_drop_the_configured_share(pool: WorkerPool, session_seed: int) -> None:
    [[run]] = run_dropout(dropout_case("one-process"), pool, session_seed)
    # Embedding, and attention and feed-forward of 8 layers, in 2 micro-batches.
    assert len(run.dropped) == 2 * (1 + 2 * 8)
    assert np.mean([mask.mean() for mask in run.dropped]) == pytest.approx(0.25, abs=0.02)
    for one, other in itertools.combinations(run.dropped, 2):
        assert not np.array_equal(one, other)


def test_tensor_ranks_agree_without_sequence_parallelism(
    pool: WorkerPool, session_seed: int
) -> None:
    """They hold the same residual stream, and it must stay the same."""
    [[first], [second]] = run_dropout(dropout_case("tp2", tp=2), pool, session_seed)
    assert_equal(first.dropped, second.dropped)
    assert_equal(first.residual, second.residual)


def test_tensor_ranks_differ_with_sequence_parallelism(pool: WorkerPool, session_seed: int) -> None:
    """They hold other tokens, and the same mask for both halves would be no randomness."""
    [[first], [second]] = run_dropout(dropout_case("tp2-sp", tp=2, sp=True), pool, session_seed)
    assert first.dropped[0].shape[0] == 16
    assert_nothing_shared(first.dropped, second.dropped)


def test_data_parallel_ranks_differ(pool: WorkerPool, session_seed: int) -> None:
    [[first], [second]] = run_dropout(dropout_case("dp2", dp=2), pool, session_seed)
    assert_nothing_shared(first.dropped, second.dropped)


def test_stages_differ(pool: WorkerPool, session_seed: int) -> None:
    [[first], [second]] = run_dropout(dropout_case("pp2", INSIDE, pp=2), pool, session_seed)
    assert_nothing_shared(first.dropped, second.dropped)


@pytest.mark.parametrize("sp", [False, True])
def test_streams_depend_on_the_step_alone(pool: WorkerPool, session_seed: int, sp: bool) -> None:
    case = dropout_case("tp2", tp=2, sp=sp)
    for first, second, first_again in run_dropout(case, pool, session_seed, (0, 1, 0)):
        assert_nothing_shared(first.dropped, second.dropped)
        assert_equal(first.dropped, first_again.dropped)


RECOMPUTED = [
    Case("one-process"),
    Case("tp2", tp=2),
    Case("tp2-sp", tp=2, sp=True),
    Case("tp2-pp2-sp-inside", INSIDE, tp=2, pp=2, sp=True),
]


@pytest.mark.parametrize("case", RECOMPUTED, ids=lambda case: case.name)
def test_recompute_drops_the_same(case: Case, pool: WorkerPool, session_seed: int) -> None:
    """Layers are computed a second time with the first time's masks, so nothing changes at all."""
    tokens = [random_tokens(session_seed, step, sequences=SEQUENCES).numpy() for step in range(2)]
    results = []
    for recompute in Recompute:
        again = Case(
            case.name,
            case.layout,
            tp=case.tp,
            pp=case.pp,
            sp=case.sp,
            model=DROPOUT,
            train={**HALF_BATCH, "recompute": recompute},
        )
        run = pool.run(case.world_size, train, config=again.config(), tokens=tokens)[0]
        results.append((run.losses, run.grad_norms))
    assert results[0] == results[1] == results[2]


BF16 = {"precision": Precision.bf16}

LAYOUTS = [
    Case("tp2", tp=2),
    Case("tp4", tp=4),
    Case("pp2", INSIDE, pp=2),
    Case("pp4-vpp2", pp=4, vpp=2),
    Case("dp2", dp=2),
    Case("tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True),
    Case("tp2-pp2-tied", INSIDE, tp=2, pp=2, model={"tie_embeddings": True}),
    Case("tp2-mqa-wide", tp=2, model={"num_query_groups": 1, "value_head_dim": 12}),
    Case("dp2-ep2", dp=2, ep=2, model=EXPERTS),
    Case(
        "tp2-sp-ep2-bf16", tp=2, sp=True, ep=2, model=EXPERTS, train={"precision": Precision.bf16}
    ),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_all_layouts_start_from_the_same_weights(case: Case, pool: WorkerPool) -> None:
    alone = Case("one-process", without_cuts(case.layout), model=case.model, train=case.train)
    expected = whole(pool.run(1, initial_weights, config=alone.config()))
    parts = pool.run(case.world_size, initial_weights, config=case.config())
    actual = whole(parts, tolerance=0.0)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(value, actual[name]), name
    for (one_place, one), (other_place, other) in itertools.combinations(parts, 2):
        if one_place.tp == other_place.tp:
            continue
        for name in one.keys() & other.keys():
            # Sinks start at zero everywhere.
            if one[name].dim is not None and not name.endswith("_sink"):
                assert not np.array_equal(one[name].value, other[name].value), name


def test_layers_do_not_start_alike(pool: WorkerPool) -> None:
    [(_, weights)] = pool.run(1, initial_weights, config=Case("one-process").config())
    values = [weights[f"decoder.layers.{layer}.mlp.linear_fc1.weight"].value for layer in range(8)]
    assert_nothing_shared(values[:4], values[4:])
