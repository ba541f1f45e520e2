"""Parameters that every tensor-parallel rank holds stay equal on all of them.

megatron-core sums the gradient of such a parameter over ranks only if it is marked for it; a
forgotten mark lets the ranks drift apart without an error.
"""

import numpy as np
import pytest

from tests.distributed.cases import HALF_BATCH, INSIDE, Case, random_tokens
from tests.distributed.jobs import FORGOTTEN, compile_fusions, forget_sequence_parallel
from tests.distributed.pool import WorkerPool
from tests.distributed.ranks import Mutate, Piece, RankRun, train

pytestmark = pytest.mark.distributed

STEPS = 3
QK_NORM = {"qk_norm": True}
MQA = {"qk_norm": True, "num_query_groups": 1}

CASES = [
    Case("tp2", tp=2, model=QK_NORM, train=HALF_BATCH),
    Case("tp2-sp", tp=2, sp=True, model=QK_NORM, train=HALF_BATCH),
    Case("tp4-2groups", tp=4, model=QK_NORM, train=HALF_BATCH),
    Case("tp4-2groups-sp", tp=4, sp=True, model=QK_NORM, train=HALF_BATCH),
    Case("tp2-mqa", tp=2, model=MQA, train=HALF_BATCH),
    Case("tp4-mqa-sp", tp=4, sp=True, model=MQA, train=HALF_BATCH),
    Case("tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True, model=QK_NORM, train=HALF_BATCH),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_agree(case: Case, pool: WorkerPool, session_seed: int) -> None:
    runs = run_steps(case, pool, session_seed)
    names = {name for run in runs for name, piece in run.final.items() if piece.dim is None}
    expected = {"input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "final_norm"}
    assert {name.split(".")[-2] for name in names} == expected
    assert disagreements(runs) == []


def test_forgotten_mark_is_found(pool: WorkerPool, session_seed: int) -> None:
    case = CASES[1]
    runs = run_steps(case, pool, session_seed, forget_sequence_parallel)
    found = disagreements(runs)
    assert f"gradient of {FORGOTTEN} in step 0" in found
    assert f"value of {FORGOTTEN}" in found


@pytest.mark.parametrize("sp", [False, True])
def test_compiled_fusions_round_differently_at_most(
    sp: bool, pool: WorkerPool, session_seed: int
) -> None:
    """In the first step: Adam makes whole steps of what rounding leaves of a gradient of 0."""
    case = Case("tp2-full", "2*F", tp=2, sp=sp, model=QK_NORM, train=HALF_BATCH)
    plain = run_steps(case, pool, session_seed)
    compiled = run_steps(case, pool, session_seed, compile_fusions)
    for expected, found in zip(plain, compiled, strict=True):
        assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
        assert found.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=1e-5)
        for name, piece in expected.gradients[0].items():
            wanted, got = piece.value, found.gradients[0][name].value
            error = np.linalg.norm(got - wanted)
            assert 0 <= error < 1e-5 * np.linalg.norm(wanted) + 1e-8, name
    [first, *_] = plain
    assert first.gradients[0].keys() == compiled[0].gradients[0].keys()


def run_steps(
    case: Case, pool: WorkerPool, seed: int, mutate: Mutate | None = None
) -> list[RankRun]:
    tokens = [
        random_tokens(seed, step, sequences=HALF_BATCH["global_batch_size"]).numpy()
        for step in range(STEPS)
    ]
    return pool.run(
        case.world_size,
        train,
        config=case.config(),
        tokens=tokens,
        gradient_steps=range(STEPS),
        mutate=mutate,
    )


def disagreements(runs: list[RankRun]) -> list[str]:
    """Replicated gradients and values that are not bitwise equal on all tensor-parallel ranks."""
    found = []
    for run in runs:
        [first] = [other for other in runs if other.place == run.place._replace(tp=0)]
        for step in range(STEPS):
            found += [
                f"gradient of {name} in step {step}"
                for name in _unequal(first.gradients[step], run.gradients[step])
            ]
        found += [f"value of {name}" for name in _unequal(first.final, run.final)]
    return found


def _unequal(first: dict[str, Piece], other: dict[str, Piece]) -> list[str]:
    assert first.keys() == other.keys()
    return [
        name
        for name, piece in first.items()
        if piece.dim is None and not np.array_equal(piece.value, other[name].value)
    ]
