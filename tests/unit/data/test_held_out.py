"""Which samples an evaluation reads: from all over the split, however they are computed."""

from typing import Any

import numpy as np
import pytest

from hysparse_megatron.data.read.dataset import TokenSamples
from hysparse_megatron.data.read.held_out import EvaluationBatches
from tests.token_files import write_indexed

S = 8


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> TokenSamples:
    """125 samples; token t of the stream is t, in documents of 7, so a sample shows its place."""
    prefix = str(tmp_path_factory.mktemp("samples") / "counting")
    documents = (np.arange(start, min(start + 7, 1001)) for start in range(0, 1001, 7))
    return TokenSamples(write_indexed(prefix, documents, 60_000), S)


def counted(evaluation: EvaluationBatches) -> list[int]:
    """Ids of the samples of a rank whose loss counts, in the order in which they are computed."""
    found = []
    for batch in range(evaluation.num_batches):
        for microbatch in evaluation.microbatches(batch):
            rows = microbatch["loss_mask"].bool()
            assert (rows.all(1) | ~rows.any(1)).all()
            found += (microbatch["tokens"][rows.all(1), 0] // S).tolist()
    return found


@pytest.mark.parametrize("num_samples", [1, 7, 24, 124, 125, 126, 10_000])
def test_samples_are_spread_over_the_split(samples: TokenSamples, num_samples: int) -> None:
    evaluation = EvaluationBatches(
        samples, num_samples=num_samples, global_batch_size=8, micro_batch_size=4
    )
    assert evaluation.num_samples == min(num_samples, 125)
    assert evaluation.num_batches == -(-evaluation.num_samples // 8)
    found = counted(evaluation)
    assert found == sorted(set(found))
    assert len(found) == evaluation.num_samples
    gaps = np.diff([*found, 125 + found[0]])  # round the end: no part is left out
    assert gaps.max() - gaps.min() <= 1
    assert counted(evaluation) == found, "the same at every evaluation"


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
@pytest.mark.parametrize(("global_batch_size", "micro_batch_size"), [(8, 2), (16, 1), (400, 100)])
def test_batches_and_ranks_do_not_choose(
    samples: TokenSamples, data_parallel_size: int, global_batch_size: int, micro_batch_size: int
) -> None:
    """Also where the split is smaller than one global batch."""
    shape: dict[str, Any] = {"num_samples": 30, "global_batch_size": global_batch_size}
    found: list[int] = []
    for rank in range(data_parallel_size):
        evaluation = EvaluationBatches(
            samples,
            **shape,
            micro_batch_size=micro_batch_size,
            data_parallel_size=data_parallel_size,
            data_parallel_rank=rank,
        )
        assert len(evaluation.sample_ids(0)) == global_batch_size
        found += counted(evaluation)
    assert sorted(found) == samples.held_out_ids(30).tolist()
    with pytest.raises(IndexError):
        evaluation.sample_ids(evaluation.num_batches)


def test_documents_stay_apart(samples: TokenSamples) -> None:
    """Also in rows that only fill up the batch, none of whose tokens count."""
    evaluation = EvaluationBatches(
        samples, num_samples=1, global_batch_size=2, micro_batch_size=2,
        document_mask=True,
    )  # fmt: skip
    [batch] = evaluation.microbatches(0)
    assert batch["cu_seqlens"].tolist() == [0, 7, 8, 15, 16]
    assert batch["loss_mask"].tolist() == [[1.0] * 6 + [0.0, 1.0], [0.0] * 8]


def test_without_samples_is_no_evaluation(samples: TokenSamples) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        EvaluationBatches(samples, num_samples=0, global_batch_size=2, micro_batch_size=2)
