"""Checkpoints: any layout can load them; how several ranks write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hysparse_megatron.checkpoint.store import (
    latest_checkpoint,
    problems_of,
    read_manifest,
    resolve,
    step_directory,
)
from hysparse_megatron.checkpoint.tensors import INDEX, read_weights
from hysparse_megatron.config.schema import Precision
from tests.distributed.cases import (
    EXPERTS,
    HALF_BATCH,
    INSIDE,
    INTERLEAVED,
    MUON,
    SHORT,
    TWO_INSIDE,
    Case,
    random_tokens,
)
from tests.distributed.checkpoint_jobs import (
    Continuation,
    fail_in_background,
    imported_late,
    load_and_train,
    load_error,
    load_weights,
    save_beyond_limit,
    train_and_save,
    weights_without_pickle,
    write_and_fail,
    write_files,
)
from tests.distributed.comparison import ReferenceFor
from tests.distributed.pool import WorkerPool

pytestmark = pytest.mark.distributed

SAVE_AFTER, STEPS = 2, 4
EVAL_TOLERANCE, LOSS_TOLERANCE = 1e-6, 1e-5

QKV_BIAS = {"qkv_bias": True}
SAVED = Case("tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True, model=QKV_BIAS, train=SHORT)
LOADED = [
    Case("one-process", model=QKV_BIAS, train=SHORT),
    Case("pp4", TWO_INSIDE, pp=4, model=QKV_BIAS, train=SHORT),
    Case("pp2-vpp2", INTERLEAVED, pp=2, vpp=2, model=QKV_BIAS, train=SHORT),
    Case("dp2", dp=2, model=QKV_BIAS, train=SHORT),
    Case("tp4", tp=4, model=QKV_BIAS, train=SHORT),
    Case("cp2", cp=2, model=QKV_BIAS, train=SHORT),
    SAVED,
]
INSTANCES = Case("dp2-cp2-2-instances", dp=2, cp=2, instances=2, model=QKV_BIAS, train=SHORT)


SavedRun = tuple[Path, list[np.ndarray], Continuation]
"""A run directory, its data, and how the run went on after the save."""


def save_run(case: Case, pool: WorkerPool, reference_for: ReferenceFor, run_dir: Path) -> SavedRun:
    config = case.config()
    tokens = reference_for(config).tokens[:STEPS]
    runs = pool.run(
        case.world_size,
        train_and_save,
        config=config,
        tokens=tokens,
        run_dir=run_dir,
        save_after=SAVE_AFTER,
    )
    return run_dir, tokens, runs[0]


def assert_goes_on(
    case: Case, saved_as: Case, pool: WorkerPool, saved: SavedRun, **options: Any
) -> list[Continuation]:
    """Losses within rounding at any size, and to the bit at the saved one."""
    run_dir, tokens, original = saved
    runs = pool.run(
        case.world_size,
        load_and_train,
        config=case.config(),
        tokens=tokens,
        run_dir=run_dir,
        **options,
    )
    for run in runs:
        assert run.first_step == SAVE_AFTER
        assert abs(run.eval_loss - original.eval_loss) <= EVAL_TOLERANCE
        np.testing.assert_allclose(run.losses, original.losses, rtol=0, atol=LOSS_TOLERANCE)
        if case is saved_as:
            assert run.losses == original.losses
            assert run.grad_norms == original.grad_norms
    return runs


@pytest.fixture(scope="module")
def saved(
    pool: WorkerPool, reference_for: ReferenceFor, tmp_path_factory: pytest.TempPathFactory
) -> SavedRun:
    """Saved at TP 2 x PP 2."""
    run = save_run(SAVED, pool, reference_for, tmp_path_factory.mktemp("run"))
    # The batches were chosen on one process; this run is known to go the same way.
    wanted = reference_for(SAVED.config()).losses[SAVE_AFTER:STEPS]
    np.testing.assert_allclose(run[2].losses, wanted, rtol=0, atol=LOSS_TOLERANCE)
    return run


def test_what_ranks_import_stands_in_what_they_are_forked_from(
    pool: WorkerPool, saved: SavedRun, tmp_path: Path
) -> None:
    """Else each of some thousand imports it anew: tests/forks.py has the list."""
    run_dir, tokens, _ = saved
    common = {"config": LOADED[0].config(), "tokens": tokens}
    save = {"job": train_and_save, "run_dir": tmp_path / "run", "save_after": SAVE_AFTER}
    for own in (save, {"job": load_and_train, "run_dir": run_dir}):
        [late] = pool.run(1, imported_late, **own, **common)
        assert late == [], own["job"]


@pytest.mark.parametrize("case", [*LOADED, INSTANCES], ids=lambda case: case.name)
def test_any_layout_continues(case: Case, pool: WorkerPool, saved: SavedRun) -> None:
    runs = assert_goes_on(case, SAVED, pool, saved)
    if case.instances > 1:
        each_instance_is_whole(runs, case.instances)


def each_instance_is_whole(runs: list[Continuation], instances: int) -> None:
    """Main parameters, two moments and a step count of every parameter, alike in all instances."""
    per_instance = len(runs) // instances
    first = runs[:per_instance]
    whole = 3 * sum(piece.value.size for piece in first[0].parameters.values())
    counts = sum(len(run.optimizer) for run in first) // 4
    assert sum(tensor.size for run in first for tensor in run.optimizer) == whole + counts
    for one, other in zip(runs[:-per_instance], runs[per_instance:], strict=True):
        for mine, theirs in zip(one.optimizer, other.optimizer, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("case", [LOADED[2], INSTANCES], ids=lambda case: case.name)
def test_chain_of_layouts_returns_to_the_first(
    case: Case, pool: WorkerPool, saved: SavedRun, tmp_path: Path
) -> None:
    """TP 2 x PP 2 -> saved again by another without a step between -> TP 2 x PP 2."""
    run_dir, tokens, original = saved
    pool.run(
        case.world_size,
        load_and_train,
        config=case.config(),
        tokens=tokens[:SAVE_AFTER],
        run_dir=run_dir,
        save_to=tmp_path,
    )
    runs = pool.run(
        SAVED.world_size, load_and_train, config=SAVED.config(), tokens=tokens, run_dir=tmp_path
    )
    # Saving and loading moves numbers and never computes with them.
    assert runs[0].eval_loss == original.eval_loss
    assert runs[0].losses == original.losses
    assert runs[0].grad_norms == original.grad_norms


def test_weights_need_no_pickle(pool: WorkerPool, saved: SavedRun) -> None:
    """From the shares of four ranks; the same numbers as megatron-core loads into one process."""
    run_dir, _, _ = saved
    [read] = pool.run(1, weights_without_pickle, run_dir=run_dir)
    [loaded] = pool.run(1, load_weights, config=LOADED[0].config(), run_dir=run_dir)
    for name, piece in loaded.items():
        assert np.array_equal(read[name], piece.value), name
    assert loaded.keys() == read.keys()


def test_checkpoint_of_another_model_is_refused(pool: WorkerPool, saved: SavedRun) -> None:
    run_dir, _, _ = saved
    other = Case("wider", model={"ffn_hidden_size": 96})
    [message] = pool.run(1, load_error, config=other.config(), run_dir=run_dir)
    assert "cannot be loaded into this model" in message
    assert str(run_dir) in message


# Writing with several ranks -----------------------------------------------------------------------


@pytest.fixture
def checkpoints(pool: WorkerPool, tmp_path: Path) -> Path:
    """Checkpoints after 100 and 200 steps, of one small file per rank of two."""
    directory = tmp_path / "checkpoints"
    pool.run(2, write_files, checkpoints=directory, steps=(100, 200))
    return directory


def test_manifest_names_the_files_of_all_ranks(checkpoints: Path) -> None:
    directory = step_directory(checkpoints, 200)
    manifest = read_manifest(directory)
    assert (manifest["step"], manifest["fact"]) == (200, 7)
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert sizes == {"__0_0.distcp": 100, "__1_0.distcp": 101, INDEX: 2}
    (directory / "__1_0.distcp").write_bytes(b"cut short")
    assert problems_of(directory)
    assert latest_checkpoint(checkpoints)[0] == step_directory(checkpoints, 100)


def test_one_rank_that_fails_fails_all(pool: WorkerPool, checkpoints: Path) -> None:
    before = sorted(checkpoints.iterdir())
    expected = {
        300: "rank 1: OSError: [Errno 28] No space left on device",
        200: "step-00000200 exists already and is not written over",
    }
    for step, text in expected.items():
        messages = pool.run(2, write_and_fail, checkpoints=checkpoints, step=step)
        # Every rank must know, or one goes on training while the others stop.
        assert len(set(messages)) == 1
        assert text in messages[0]
        assert sorted(checkpoints.iterdir()) == before
        assert latest_checkpoint(checkpoints) == (step_directory(checkpoints, 200), [])


def test_one_rank_that_cannot_write_its_share_fails_all(pool: WorkerPool, tmp_path: Path) -> None:
    """The failure happens inside megatron-core's writer, as on a full disk."""
    case = Case("tp2", tp=2)
    messages = pool.run(2, save_beyond_limit, config=case.config(), run_dir=tmp_path)
    for message in messages:
        assert (
            "step-00000002 was not written; rank 1: OSError: [Errno 27] File too large" in message
        )
        assert "__1_0.distcp has 100 of at least" in message
        assert "bytes free" in message
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(checkpoints) == (step_directory(checkpoints, 1), [])


def test_a_failure_beside_training_reaches_all_ranks(pool: WorkerPool, tmp_path: Path) -> None:
    case = Case("tp2", tp=2)
    outcomes = pool.run(2, fail_in_background, config=case.config(), run_dir=tmp_path)
    for message, returned in outcomes:
        assert returned, "training went on"
        assert (
            "step-00000002 was not written; rank 1: OSError: [Errno 27] File too large" in message
        )
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(checkpoints) == (step_directory(checkpoints, 1), [])


def test_leftover_of_a_killed_write_is_replaced(pool: WorkerPool, checkpoints: Path) -> None:
    unfinished = checkpoints / "step-00000300.tmp"
    unfinished.mkdir()
    (unfinished / "__7_0.distcp").write_bytes(b"of a run with more ranks")
    pool.run(2, write_files, checkpoints=checkpoints, steps=(300,))
    assert not unfinished.exists()
    files = read_manifest(step_directory(checkpoints, 300))["files"]
    assert sorted(files) == ["__0_0.distcp", "__1_0.distcp", INDEX]


EXPERTS_SAVED = Case("ep2-tp2-sp-cp2", tp=2, sp=True, cp=2, ep=2, model=EXPERTS, train=SHORT)
MUON_EXPERTS: dict[str, Any] = {"model": EXPERTS, "train": SHORT, "optim": MUON}
MUON_SAVED = Case("muon-tp2-dp2", tp=2, sp=True, dp=2, ep=2, **MUON_EXPERTS)
CONTINUED = [
    (EXPERTS_SAVED, Case("one-process", model=EXPERTS, train=SHORT)),
    (EXPERTS_SAVED, Case("ep2-pp2-dp2", INSIDE, pp=2, dp=2, ep=2, model=EXPERTS, train=SHORT)),
    (EXPERTS_SAVED, Case("ep4-tp2-dp2", tp=2, sp=True, dp=2, ep=4, model=EXPERTS, train=SHORT)),
    (EXPERTS_SAVED, EXPERTS_SAVED),
    (MUON_SAVED, Case("muon-one-process", **MUON_EXPERTS)),
    (MUON_SAVED, Case("muon-pp2-dp2-ep2", INSIDE, pp=2, dp=2, ep=2, **MUON_EXPERTS)),
    (MUON_SAVED, Case("muon-tp2-ep2", tp=2, sp=True, ep=2, **MUON_EXPERTS)),
    (MUON_SAVED, MUON_SAVED),
]


@pytest.fixture(scope="module")
def saved_as(
    pool: WorkerPool, reference_for: ReferenceFor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], SavedRun]:
    """Each is saved once."""
    made: dict[str, SavedRun] = {}

    def save(case: Case) -> SavedRun:
        if case.name not in made:
            folder = tmp_path_factory.mktemp(case.name)
            made[case.name] = save_run(case, pool, reference_for, folder)
        return made[case.name]

    return save


@pytest.mark.parametrize(("saved", "case"), CONTINUED, ids=lambda case: case.name)
def test_experts_continue_at_any_size(
    saved: Case, case: Case, pool: WorkerPool, saved_as: Callable[[Case], SavedRun]
) -> None:
    """Weights, moments and the routers' biases; of Muon the momentum too: its slices, its matrices
    dealt to other ranks, and those of experts."""
    assert_goes_on(case, saved, pool, saved_as(saved))


MQA_BIAS = {"num_query_groups": 1, "qkv_bias": True}
SHARED: dict[str, Any] = {"model": MQA_BIAS, "train": SHORT}
"""A model whose one KV group all tensor-parallel ranks share."""


@pytest.mark.parametrize("optim", [{}, MUON], ids=["adamw", "muon"])
def test_ranks_may_share_a_group_and_stop_sharing(
    optim: dict[str, Any], pool: WorkerPool, reference_for: ReferenceFor, tmp_path: Path
) -> None:
    """TP 4 -> saved again by one process -> and by TP 2 x DP 2, as once it was -> TP 4."""
    case = Case("tp4-sp", tp=4, sp=True, **SHARED, optim=optim)
    run_dir, *run = save_run(case, pool, reference_for, tmp_path / case.name)
    for other in (
        Case("one-process", **SHARED, optim=optim),
        Case("tp2-dp2-in-slices", tp=2, dp=2, **SHARED, optim=optim),
    ):
        again = {"save_to": tmp_path / other.name, "in_slices": other.tp > 1}
        assert_goes_on(other, case, pool, (run_dir, *run), **again)
        run_dir = tmp_path / other.name
    first, last = (read_weights(resolve(path)) for path in (tmp_path / case.name, run_dir))
    assert {name: tensor.tolist() for name, tensor in first.items()} == {
        name: tensor.tolist() for name, tensor in last.items()
    }
    assert_goes_on(case, case, pool, (run_dir, *run))


BF16 = {**HALF_BATCH, "precision": Precision.bf16}


@pytest.mark.parametrize("into_muon", [True, False])
def test_another_optimizer_takes_the_weights_alone(
    into_muon: bool, pool: WorkerPool, session_seed: int, tmp_path: Path
) -> None:
    sequences = HALF_BATCH["global_batch_size"]
    tokens = [random_tokens(session_seed, sequences=sequences).numpy()]
    adamw, muon = (Case("bf16", train=BF16, optim=optim).config() for optim in ({}, MUON))
    first, second = (adamw, muon) if into_muon else (muon, adamw)
    [saved] = pool.run(
        1, train_and_save, config=first, tokens=tokens, run_dir=tmp_path, save_after=1
    )
    [message] = pool.run(1, load_error, config=second, run_dir=tmp_path)
    assert "cannot be loaded into this model" in message
    assert "optim.name must be what the checkpoint was made with" in message
    [loaded] = pool.run(1, load_weights, config=second, run_dir=tmp_path)
    for name, piece in saved.parameters.items():
        assert np.array_equal(piece.value, loaded[name].value), name
