"""The same layout goes on from a checkpoint bit by bit, with dropout, in everything it has."""

from pathlib import Path

import numpy as np
import pytest

from hysparse_megatron.config.schema import Precision
from tests.distributed.cases import EXPERTS, HALF_BATCH, INSIDE, MUON, SEQ_LENGTH, VOCAB, Case
from tests.distributed.checkpoint_jobs import (
    Continuation,
    TokenFiles,
    load_and_train,
    train_and_save,
    train_while_saving,
)
from tests.distributed.pool import WorkerPool
from tests.distributed.reassemble import whole
from tests.token_files import write_indexed

pytestmark = pytest.mark.distributed

SAVE_AFTER, STEPS = 2, 4
DROPOUT = {"hidden_dropout": 0.1}
BF16 = {**HALF_BATCH, "precision": Precision.bf16}
WARM_UP = {"warmup_steps": 10}
"""So that no two steps have one learning rate."""

CASES = [
    Case("one-process", model=DROPOUT, train=HALF_BATCH, optim=WARM_UP),
    Case("dp2", dp=2, model=DROPOUT, train=HALF_BATCH, optim=WARM_UP),
    Case("tp2-pp2-sp", INSIDE, tp=2, pp=2, sp=True, model=DROPOUT, train=HALF_BATCH, optim=WARM_UP),
    Case("tp2-cp2", tp=2, cp=2, model=DROPOUT, train=HALF_BATCH, optim=WARM_UP),
    Case("experts-ep2-dp2", dp=2, ep=2, model={**EXPERTS, **DROPOUT}, train=HALF_BATCH),
    Case("bf16", model=DROPOUT, train=BF16),
    Case("muon-one-process", model=DROPOUT, train=HALF_BATCH, optim=MUON),
    Case("muon-dp2", dp=2, model=DROPOUT, train=HALF_BATCH, optim=MUON),
    Case("muon-bf16-tp2-dp2", tp=2, dp=2, model=DROPOUT, train=BF16, optim=MUON),
]


@pytest.fixture
def tokens(session_seed: int, tmp_path: Path) -> TokenFiles:
    """So many that no sample is read twice."""
    lengths = np.random.default_rng(session_seed).integers(20, 60, size=100)
    documents = [
        np.random.default_rng([session_seed, number]).integers(0, VOCAB, size=length)
        for number, length in enumerate(lengths)
    ]
    assert lengths.sum() > STEPS * HALF_BATCH["global_batch_size"] * SEQ_LENGTH
    return TokenFiles(write_indexed(str(tmp_path / "tokens"), documents, VOCAB), STEPS)


def assert_equal(actual: Continuation, expected: Continuation) -> None:
    assert len(expected.losses) == STEPS - SAVE_AFTER
    assert actual.eval_loss == expected.eval_loss
    assert actual.losses == expected.losses
    assert actual.grad_norms == expected.grad_norms
    assert actual.learning_rates == expected.learning_rates
    assert len(expected.optimizer) > 0
    for name in ("read", "buffers", "optimizer"):
        both = zip(getattr(expected, name), getattr(actual, name), strict=True)
        assert all(np.array_equal(one, other) for one, other in both), name
    for one, other in zip(expected.streams, actual.streams, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert actual.parameters.keys() == expected.parameters.keys()
    for name, piece in expected.parameters.items():
        assert np.array_equal(piece.value, actual.parameters[name].value), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_layout_continues_bit_by_bit(
    case: Case, pool: WorkerPool, tokens: TokenFiles, tmp_path: Path
) -> None:
    job = {"config": case.config(), "tokens": tokens, "run_dir": tmp_path}
    through = pool.run(case.world_size, train_and_save, save_after=SAVE_AFTER, **job)
    resumed = pool.run(case.world_size, load_and_train, **job)
    for expected, actual in zip(through, resumed, strict=True):
        assert_equal(actual, expected)
    # Without this, equal could mean untouched.
    if "warmup_steps" in case.optim:
        assert len(set(resumed[0].learning_rates)) == STEPS - SAVE_AFTER
    first, second = resumed[0].streams
    assert not np.array_equal(first["default"], second["default"])
    assert not np.array_equal(resumed[0].read[0], resumed[0].read[1])
    final = whole([(run.place, run.parameters) for run in resumed])
    loaded = whole([(run.place, run.first) for run in resumed])
    changed = [name for name in final if not np.array_equal(final[name], loaded[name])]
    assert "embedding.word_embeddings.weight" in changed


BESIDE_TRAINING = ("tp2-pp2-sp", "tp2-dp2", "experts-ep2-dp2", "bf16", "muon-bf16-tp2-dp2")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in BESIDE_TRAINING], ids=lambda case: case.name
)
def test_a_save_beside_training_holds_what_was_when_it_began(
    case: Case, pool: WorkerPool, tokens: TokenFiles, tmp_path: Path
) -> None:
    """Bit by bit, though every weight and moment changes before the first is written."""
    job = {"config": case.config(), "tokens": tokens, "run_dir": tmp_path}
    through = pool.run(case.world_size, train_while_saving, save_after=SAVE_AFTER, **job)
    resumed = pool.run(case.world_size, load_and_train, **job)
    for expected, actual in zip(through, resumed, strict=True):
        assert_equal(actual, expected)
