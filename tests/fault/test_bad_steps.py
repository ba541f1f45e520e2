"""Faults 3, 19 and 20: other numbers of ranks, NaN on one of them, many in a row, and spikes."""

from collections.abc import Callable, Iterator

import pytest

from hysparse_megatron.architecture.model import Balancing, MoeConfig, RouterScore
from tests.distributed.cases import Case
from tests.distributed.pool import WorkerPool
from tests.fault.fault_jobs import decide_about_one_rank, one_bad_step
from tests.fault.faulty_runs import STEPS, FaultyRun
from tests.run.run_commands import facts

NewRun = Callable[..., FaultyRun]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(max_workers=4)
    yield workers
    workers.close()


EXPERTS = MoeConfig(
    num_experts=4,
    num_active_experts=2,
    expert_ffn_hidden_size=16,
    router_score=RouterScore.sigmoid,
    balancing=Balancing.bias,
    bias_update_rate=0.01,
)
CASES = [
    Case("dp2", dp=2),
    Case("tp2_pp2", tp=2, pp=2, sp=True, layout="F 2*S F S | 2*S F"),
    Case("experts", dp=2, ep=2, model={"moe": EXPERTS}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("bad_rank", ["first", "last"])
def test_nan_on_one_rank_changes_nothing_on_any(
    case: Case, bad_rank: str, pool: WorkerPool
) -> None:
    # With pipeline stages the loss, which is spoiled, is computed on the last one.
    spoiled = case.world_size - 1 if bad_rank == "last" else case.world_size // 2
    if case.pp == 1 and bad_rank == "first":
        spoiled = 0
    ranks = pool.run(
        case.world_size, one_bad_step, config=case.config(), fault=f"nan@{spoiled}:2", seed=3
    )
    for rank in ranks:
        assert [result.skipped for result in rank.results] == [False, True, False]
        assert rank.changed[0]
        assert rank.changed[1] == []
        assert rank.changed[2]


def test_what_one_rank_sees_decides_for_all(pool: WorkerPool) -> None:
    """A NaN mostly spreads by itself, by reduced losses and gradients; this must not need it."""
    for bad_rank in (0, 1):
        found = pool.run(2, decide_about_one_rank, bad_rank=bad_rank)
        assert found == ["not finite", "not finite"]
    assert pool.run(2, decide_about_one_rank, bad_rank=2) == [None, None]


def test_nans_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(new_run: NewRun) -> None:
    run = new_run()
    bad = "nan@0:3,nan@1:7,nan@0:8,nan@1:9"
    output = run.run("train.guard.max_bad_steps=3", code=4, fault=bad)
    assert "NumericalStop: 3 bad steps in a row up to step 9: loss not finite on rank 1" in output
    run.assert_ended("numerical_stop", 4, None, "3 bad steps in a row up to step 9")
    assert run.checkpoints() == [4], "none after step 8, the second bad one"
    assert run.status()["checkpoint_step"] == 4
    ids = [run.row(step)["sample_ids"] for step in (3, 7, 8, 9)]
    assert len({number for step in ids for number in step}) == 4 * 4, "each sample once"
    assert str(ids[-1]) in output
    assert run.row(9)["skipped_steps"] == 4
    assert not run.row(6)["skipped"]


def test_only_what_was_seen_to_be_good_is_gone_on_from(
    straight: FaultyRun, new_run: NewRun
) -> None:
    """Weights that one rank's update spoils are not saved; nor is a checkpoint of finite weights
    that lead to nothing but bad steps taken a second time."""
    run, settings = new_run(), ["train.eval_interval=0", "checkpoint.keep=1"]
    output = run.run(*settings, code=4, fault="nan_weight@1:8")
    told = "weights or optimizer state on rank 1 are not finite after step 8"
    assert f"NumericalStop: {told}" in output
    run.assert_ended("numerical_stop", 4, None, told)
    assert not run.row(8)["skipped"], "loss and gradient were good"
    assert run.checkpoints() == [4]

    bad = "nan@0:9,nan@0:10,nan@0:11"
    output = run.run(*settings, "train.guard.max_bad_steps=3", code=4, fault=bad)
    assert "resuming after step 4" in output
    assert f"the next start goes on from {run.checkpoint(4)}" in output
    assert run.checkpoints() == [4]
    assert run.status()["checkpoint_step"] == 4
    [aside] = (run.run_dir / "checkpoints").glob("step-00000008.aside-*")
    assert str(aside) in output

    output = run.run("checkpoint.keep=1", code=0)
    assert "resuming after step 4" in output
    assert run.checkpoints() == [8, STEPS], "no good step followed the last one"
    assert facts(run.run_dir).items() <= facts(straight.run_dir).items()


def test_a_numerical_stop_waits_for_deletions_however_long(new_run: NewRun) -> None:
    """Rank 0 deletes alone; the others would take a wait beyond the timeout for its death."""
    run, timeout = new_run(), 8
    settings = ["checkpoint.interval=2", "checkpoint.keep=1", "train.guard.max_bad_steps=3"]
    fault = f"slow@0:2:prune/{2 * timeout},nan@0:6,nan@0:7,nan@0:8"
    run.run(*settings, f"parallel.timeout_seconds={timeout}", code=4, fault=fault)
    run.assert_ended("numerical_stop", 4, None, "3 bad steps in a row up to step 8")
    assert run.checkpoints() == [4]


def test_a_spike_is_skipped_also_right_after_a_resume(new_run: NewRun) -> None:
    """The past that it stands out of is that of the start before."""
    run = new_run()
    guard = ["train.guard.spike_window=6"]
    run.run(*guard, code=3, fault="spike@0:3,sigterm@1:7")
    assert not run.row(3)["skipped"], "too little past yet"
    output = run.run(*guard, code=0, fault="spike@0:8:100")
    assert "SKIPPED" in output
    assert run.row(8)["bad"] == "loss spike"
    assert run.row(8)["skipped_steps"] == 1
    assert run.row(8)["loss"] > 100
    assert run.row(9)["loss"] < 10
    assert not any(run.row(step)["skipped"] for step in range(9, STEPS + 1))


def test_other_numbers_of_ranks_go_on_alike(new_run: NewRun) -> None:
    """DP 2 -> 1 -> 2 with one global batch. Without dropout, which differs between ranks."""
    straight, run = new_run(), new_run()
    same = "model.hidden_dropout=0"
    straight.run(same, code=0)
    run.run(same, code=3, fault="sigterm@1:4")
    run.ranks = 1
    run.run(same, code=3, fault="sigterm@0:8")
    run.ranks = 2
    run.run(same, code=0)
    assert run.sample_ids() == straight.sample_ids()
    for step in range(1, STEPS + 1):
        assert run.row(step)["loss"] == pytest.approx(straight.row(step)["loss"], abs=1e-5)
