"""Checkpoints of any layout generate on one process, and on tensor ranks alike."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from hysparse_megatron.architecture.model import MoeConfig
from hysparse_megatron.inference.sampling import Sampling
from tests.distributed.cases import HALF_BATCH, INSIDE, Case
from tests.distributed.generation_jobs import (
    NEW_TOKENS,
    Sequences,
    all_at_once,
    generated,
    greedy_without_near_ties,
    one_by_one,
    save_run,
)
from tests.distributed.pool import WorkerPool

pytestmark = pytest.mark.distributed

EXPERTS = {"moe": MoeConfig(num_experts=8, num_active_experts=2, expert_ffn_hidden_size=32)}
RUNS = [
    Case("tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True),
    Case("pp2-one-group", "F S W | F S", pp=2, model={"num_query_groups": 1}),
    Case("ep2-tp2-sp", "F S W F S", tp=2, sp=True, ep=2, model=EXPERTS, train=HALF_BATCH),
]
LENGTHS = [30, 17, 5]


@pytest.fixture(scope="module", params=RUNS, ids=lambda case: case.name)
def run_dir(
    request: pytest.FixtureRequest, pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run saved at the layout of a case."""
    case: Case = request.param
    directory = tmp_path_factory.mktemp(case.name)
    pool.run(case.world_size, save_run, config=case.config(), run_dir=directory)
    return directory


@pytest.mark.parametrize("ranks", [1, 2])
def test_step_by_step_is_at_once(
    ranks: int, run_dir: Path, pool: WorkerPool, session_seed: int
) -> None:
    (expected,) = pool.run(
        1, all_at_once, run_dir=run_dir, lengths=LENGTHS, seed=session_seed + ranks
    )
    rng = random.Random(session_seed + ranks)
    found = pool.run(
        ranks,
        one_by_one,
        run_dir=run_dir,
        tokens=expected.tokens,
        prompts=[rng.randint(1, length) for length in LENGTHS],
        chunk=rng.randint(1, 12),
    )
    for rank, of_rank in enumerate(found):
        compared = zip(of_rank.logits, expected.logits, expected.allowed, strict=True)
        for ours, theirs, allowed in compared:
            assert np.abs(ours - theirs).max() <= allowed * np.abs(theirs).max()
        compare_selections(rank, ranks, of_rank, expected)


def compare_selections(rank: int, ranks: int, found: Sequences, expected: Sequences) -> None:
    """A rank has its groups' selections, or with fewer groups than ranks the one of its group."""
    for ours, theirs in zip(found.selections, expected.selections, strict=True):
        assert len(ours) == len(theirs) > 0
        for mine, all_groups in zip(ours, theirs, strict=True):
            groups = len(all_groups)
            first, count = rank * groups // ranks, max(1, groups // ranks)
            assert np.array_equal(mine, all_groups[first : first + count])


def test_ranks_generate_what_one_process_does(
    run_dir: Path, pool: WorkerPool, session_seed: int
) -> None:
    ((prompts, expected, report),) = pool.run(
        1, greedy_without_near_ties, run_dir=run_dir, lengths=[1, 9, 14], seed=session_seed
    )
    found = pool.run(2, generated, run_dir=run_dir, prompts=prompts, sampling=Sampling())
    assert [tokens for tokens, _ in found] == [expected, expected]
    assert [len(tokens) for tokens in expected] == [NEW_TOKENS] * 3
    one, two = (measured_bytes(text) for text in (report, found[0][1]))
    # A group that two ranks read is kept by both.
    assert two == (2 * one if "one-group" in run_dir.name else one)


def test_ranks_draw_alike(run_dir: Path, pool: WorkerPool, session_seed: int) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=session_seed)
    arguments = {"run_dir": run_dir, "prompts": [[5, 3, 8], [1]], "sampling": sampling}
    (first, _), (second, _) = pool.run(2, generated, **arguments)
    assert first == second


def measured_bytes(report: str) -> int:
    match = re.search(r"([\d,]+) bytes measured", report)
    assert match is not None
    return int(match[1].replace(",", ""))
