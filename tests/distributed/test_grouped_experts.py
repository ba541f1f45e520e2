"""Experts in grouped products on ranks that share them: as one after another, but for rounding."""

import numpy as np
import pytest

from tests.distributed.cases import FEW, Case, experts, random_tokens
from tests.distributed.jobs import group_experts
from tests.distributed.pool import WorkerPool
from tests.distributed.ranks import RankRun, train

pytestmark = pytest.mark.distributed

STEPS = 3
CASES = [
    # Each rank has all experts, and gathers updated ones beside the forward pass.
    Case("dp2-ep1", "F S", dp=2, model=experts(), train=FEW),
    Case("dp2-ep2", "F S", dp=2, ep=2, model=experts(), train=FEW),
    Case("tp2-sp-ep2", "F S", tp=2, sp=True, ep=2, model=experts(), train=FEW),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_grouped_experts_round_differently_at_most(
    case: Case, pool: WorkerPool, session_seed: int
) -> None:
    tokens = [random_tokens(session_seed, step).numpy() for step in range(STEPS)]

    def run(grouped: bool) -> list[RankRun]:
        return pool.run(
            case.world_size,
            train,
            config=case.config(),
            tokens=tokens,
            gradient_steps=range(1),
            mutate=group_experts if grouped else None,
        )

    for expected, found in zip(run(grouped=False), run(grouped=True), strict=True):
        assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
        # Adam makes whole steps of what rounding leaves of a gradient of 0.
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)
        assert found.gradients[0].keys() == expected.gradients[0].keys()
        for name, piece in expected.gradients[0].items():
            wanted, got = piece.value, found.gradients[0][name].value
            assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted) + 1e-8, name
