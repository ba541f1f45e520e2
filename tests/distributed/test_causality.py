"""No layout lets a token know the future, or with document masks another document.

The loss at position i depends on tokens <= i and on label i. Labels are held fixed here, so after
a change of token t every loss before position t must be what it was; with document masks also
every loss after the end of its document.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from hysparse_megatron.architecture.model import MoeConfig
from tests.distributed.cases import (
    HALF_BATCH,
    INSIDE,
    INTERLEAVED,
    SEQ_LENGTH,
    VOCAB,
    Case,
    documents_of,
    random_tokens,
)
from tests.distributed.jobs import TokenLosses, token_losses
from tests.distributed.pool import WorkerPool

pytestmark = pytest.mark.distributed

CASES = [
    Case("one-process", train=HALF_BATCH),
    Case("tp2-sp", tp=2, sp=True, train=HALF_BATCH),
    Case("pp2-inside", INSIDE, pp=2, train=HALF_BATCH),
    Case("tp2-mqa", tp=2, model={"num_query_groups": 1}, train=HALF_BATCH),
    Case("pp2-vpp2", INTERLEAVED, pp=2, vpp=2, train=HALF_BATCH),
    Case("tp2-pp2-sp-inside", INSIDE, tp=2, pp=2, sp=True, train=HALF_BATCH),
]
TOLERANCE, SEEN = 5e-6, 1e-4
NOTICING = 4
"""Positions of which one sees a change: a single loss may be the same by chance."""

MIXED = "F S W F S | S W F"
EXPERTS = {"moe": MoeConfig(num_experts=8, num_active_experts=2, expert_ffn_hidden_size=32)}
APART = [
    Case("one-process", MIXED.replace("|", ""), train=HALF_BATCH, documents=True),
    Case("tp2-sp", MIXED.replace("|", ""), tp=2, sp=True, train=HALF_BATCH, documents=True),
    Case("tp2-mqa", tp=2, model={"num_query_groups": 1}, train=HALF_BATCH, documents=True),
    Case("pp2-inside", MIXED, pp=2, train=HALF_BATCH, documents=True),
    Case("pp2-vpp2", INTERLEAVED, pp=2, vpp=2, train=HALF_BATCH, documents=True),
    Case("tp2-pp2-sp-inside", MIXED, tp=2, pp=2, sp=True, train=HALF_BATCH, documents=True),
    Case("moe-tp2-sp-ep2", tp=2, sp=True, ep=2, model=EXPERTS, train=HALF_BATCH, documents=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_past_does_not_change(case: Case, pool: WorkerPool, session_seed: int) -> None:
    positions, runs = change_tokens(case, pool, session_seed)
    selection_changed = False
    for number, position in enumerate(positions, start=1):
        before, after = (losses_of(runs, batch) for batch in (0, number))
        change = np.abs(after - before)
        assert change[..., :position].max(initial=0.0) <= TOLERANCE
        # Every sequence notices at once: logits of the changed token and of the next come from it.
        assert change[..., position : position + NOTICING].max(-1).min() > SEEN
        for run in runs:
            for layer, indices in run[0].selections.items():
                other = run[number].selections[layer]
                assert np.array_equal(indices[..., :position, :], other[..., :position, :])
                selection_changed |= not np.array_equal(indices, other)
    assert selection_changed, "no selection ever depended on the changed tokens"


@pytest.mark.parametrize("case", APART, ids=lambda case: case.name)
def test_documents_do_not_see_one_another(case: Case, pool: WorkerPool, session_seed: int) -> None:
    later = noticed = 0
    for change, start, stop, position in changes_by_document(case, pool, session_seed):
        assert change[:position].max(initial=0.0) <= TOLERANCE
        assert change[stop:].max(initial=0.0) <= TOLERANCE
        if stop - position >= NOTICING:
            assert change[position : position + NOTICING].max() > SEEN
            noticed += 1
        assert start <= position < stop
        later += len(change[stop:]) > 0
    assert later, "every changed document was the last one"
    assert noticed, "every changed position was at the end of its document"


@pytest.mark.parametrize("letters", ["8*F", "8*W", "F 7*S"])
def test_without_masks_they_do(letters: str, pool: WorkerPool, session_seed: int) -> None:
    case = Case(f"seeing-{letters[:1]}", letters, train=HALF_BATCH)
    seen = [
        change[stop:].max(initial=0.0)
        for change, _, stop, _ in changes_by_document(case, pool, session_seed)
    ]
    assert max(seen) > SEEN


def changes_by_document(
    case: Case, pool: WorkerPool, seed: int
) -> Iterator[tuple[np.ndarray, int, int, int]]:
    """For every sequence and changed position: how much each loss [S] changed, where the document
    of that position starts and ends, and the position."""
    positions, runs = change_tokens(case, pool, seed)
    for number, position in enumerate(positions, start=1):
        change = np.abs(losses_of(runs, number) - losses_of(runs, 0))
        for sequence, losses in enumerate(change.reshape(-1, SEQ_LENGTH)):
            borders = [*documents_of(sequence), SEQ_LENGTH]
            start = max(border for border in borders if border <= position)
            stop = min(border for border in borders if border > position)
            yield losses, start, stop, position


def test_a_leak_is_found(pool: WorkerPool, session_seed: int) -> None:
    positions, runs = change_tokens(CASES[0], pool, session_seed, leak=True)
    for number, position in enumerate(positions, start=1):
        change = np.abs(losses_of(runs, number) - losses_of(runs, 0))
        assert change[..., :position].max() > SEEN


def change_tokens(
    case: Case, pool: WorkerPool, seed: int, leak: bool = False
) -> tuple[list[int], list[list[TokenLosses]]]:
    """Some positions, and by rank the losses of a batch and of its changes at those positions."""
    random = np.random.default_rng([seed, len(case.name)])
    tokens = random_tokens(seed, sequences=HALF_BATCH["global_batch_size"]).numpy()
    # One from each part of the sequence: inside the window, at a block's edge, and anywhere.
    positions = [
        int(random.integers(1, 4)),
        4 * int(random.integers(2, SEQ_LENGTH // 4)),
        *(int(position) for position in random.integers(4, SEQ_LENGTH - NOTICING + 1, size=2)),
    ]
    batches = [tokens]
    for position in positions:
        changed = tokens.copy()
        shift = random.integers(1, VOCAB, size=len(tokens))
        changed[:, position] = (changed[:, position] + shift) % VOCAB
        batches.append(changed)
    runs = pool.run(
        case.world_size,
        token_losses,
        config=case.config(),
        batches=batches,
        labels=tokens[:, 1:].copy(),
        leak=leak,
    )
    return positions, runs


def losses_of(runs: list[list[TokenLosses]], batch: int) -> np.ndarray:
    """Losses [M, B, S] of the last stage, which are the same on all of its tensor ranks."""
    found = [run[batch].losses for run in runs if run[batch].losses is not None]
    for other in found[1:]:
        assert np.array_equal(found[0], other)
    return found[0]
