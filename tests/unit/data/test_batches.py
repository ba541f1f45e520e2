import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hysparse_megatron.config.batch_ramp import BatchRamp
from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.data.read.batches import BatchSource
from hysparse_megatron.data.read.dataset import TokenSamples
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.errors import DataError
from tests.token_files import write_indexed

S = 8


def counting_samples(folder: Path, num_tokens: int = 1001, **options: int) -> TokenSamples:
    """Token t of the stream is t, in documents of 7, so a sample shows its own place."""
    prefix = str(folder / "counting")
    documents = (np.arange(start, min(start + 7, num_tokens)) for start in range(0, num_tokens, 7))
    return TokenSamples(write_indexed(prefix, documents, 60_000), S, **options)


def source(samples: TokenSamples, seed: int = 1, **changes: Any) -> BatchSource:
    arguments = {"global_batch_size": 8, "micro_batch_size": 1}
    return BatchSource(samples, seed=seed, fingerprint="f", **{**arguments, **changes})


def at(step: int) -> Position:
    """Of a step from 0 in batches of 8."""
    return Position(8 * step, steps=step)


def ids_of(microbatch: dict[str, torch.Tensor]) -> list[int]:
    return (microbatch["tokens"][:, 0] // S).tolist()


def test_samples_cover_the_stream_and_overlap_by_one(tmp_path: Path) -> None:
    samples = counting_samples(tmp_path)
    assert samples.num_samples == len(samples) == 125
    assert samples.num_tokens == 1001
    for sample_id in (0, 1, 77, 124):
        sample = samples[sample_id]
        assert sample.dtype == np.int64
        assert sample.tolist() == list(range(sample_id * S, sample_id * S + S + 1))
    assert samples.read([3, 1]).shape == (2, S + 1)
    for outside in (-1, 125):
        with pytest.raises(IndexError):
            samples[outside]


def test_one_token_fewer_is_one_sample_fewer(tmp_path: Path) -> None:
    assert counting_samples(tmp_path, 17).num_samples == 2
    assert counting_samples(tmp_path, 16).num_samples == 1
    with pytest.raises(DataError, match=r"counting\.bin: 8 tokens are fewer than one sample of 8"):
        counting_samples(tmp_path, 8)


def test_token_outside_the_vocabulary_is_refused_when_read(tmp_path: Path) -> None:
    samples = counting_samples(tmp_path, vocab_size=500)
    samples[61]
    with pytest.raises(DataError, match=r"counting\.bin: token id 500 at offset 1000 "):
        samples[62]


def test_microbatch_tensors(tmp_path: Path) -> None:
    samples = counting_samples(tmp_path)
    batches = source(samples, micro_batch_size=4)
    microbatches = list(batches.microbatches(at(3)))
    assert len(microbatches) == 2
    ids = batches.sample_ids(at(3)).tolist()
    assert [i for batch in microbatches for i in ids_of(batch)] == ids
    for microbatch in microbatches:
        assert set(microbatch) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert all(tensor.shape == (4, S) for tensor in microbatch.values())
        assert all(tensor.is_contiguous() for tensor in microbatch.values())
        assert torch.equal(microbatch["labels"], microbatch["tokens"] + 1)
        assert torch.equal(microbatch["position_ids"], torch.arange(S).repeat(4, 1))
        assert torch.equal(microbatch["loss_mask"], torch.ones(4, S))
        types = {name: tensor.dtype for name, tensor in microbatch.items()}
        assert types.pop("loss_mask") == torch.float32
        assert set(types.values()) == {torch.int64}


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_ids_do_not_depend_on_ranks_or_microbatches(
    tmp_path: Path, seed: int, micro_batch_size: int, data_parallel_size: int
) -> None:
    samples = counting_samples(tmp_path)
    expected = source(samples, seed)
    ranks = [
        source(
            samples,
            seed,
            micro_batch_size=micro_batch_size,
            data_parallel_size=data_parallel_size,
            data_parallel_rank=rank,
        )
        for rank in range(data_parallel_size)
    ]
    for step in (0, 1, 14, 15, 16, 1000):
        batch_ids = expected.sample_ids(at(step))
        seen = np.full(8, -1)
        for rank, batches in enumerate(ranks):
            assert np.array_equal(batches.sample_ids(at(step)), batch_ids)
            for m, microbatch in enumerate(batches.microbatches(at(step))):
                first = (m * data_parallel_size + rank) * micro_batch_size
                seen[first : first + micro_batch_size] = ids_of(microbatch)
        assert np.array_equal(seen, batch_ids)


def test_order_is_one_stream_cut_by_the_global_batch(tmp_path: Path, seed: int) -> None:
    """Neither the number of steps nor where a run stops is known to the source."""
    samples = counting_samples(tmp_path)
    batches = source(samples, seed)
    stream = np.concatenate([batches.sample_ids(at(step)) for step in range(47)])
    first, second = stream[:125], stream[125:250]
    assert sorted(first) == sorted(second) == list(range(125))
    assert not np.array_equal(first, second)
    resumed = source(samples, seed)
    assert np.array_equal(resumed.sample_ids(Position(160)), stream[160:168])
    halves = source(samples, seed, global_batch_size=4)
    assert np.array_equal(halves.sample_ids(Position(13)), stream[13:17])
    assert not np.array_equal(source(samples, seed + 1).sample_ids(at(0)), stream[:8])


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("data_parallel_size", [1, 2])
def test_any_batch_sizes_read_every_sample_of_two_epochs_once(
    tmp_path: Path, seed: int, data_parallel_size: int, document_mask: bool
) -> None:
    """A start after the other, each with a batch size or ramp of its own, on the same position."""
    draw = random.Random(seed)
    samples = counting_samples(tmp_path)
    position, trained_on, sizes = Position(), [], []
    while position.samples < 2 * samples.num_samples:
        final = draw.choice([4, 8, 16])
        ramp = BatchRamp(2, 2, draw.randint(1, 200)) if draw.random() < 0.5 else None
        ranks = [
            source(
                samples,
                seed,
                global_batch_size=final,
                micro_batch_size=2 // data_parallel_size,
                data_parallel_size=data_parallel_size,
                data_parallel_rank=rank,
                document_mask=document_mask,
                ramp=ramp,
            )
            for rank in range(data_parallel_size)
        ]
        for _ in range(draw.randint(1, 6)):
            size = ramp.size_at(position.place, final) if ramp else final
            read = [
                i for one in ranks for batch in one.microbatches(position) for i in ids_of(batch)
            ]
            assert sorted(read) == sorted(ranks[0].sample_ids(position).tolist())
            trained_on += ranks[0].sample_ids(position).tolist()
            position = ranks[0].after(position)
            sizes.append(size)
            assert len(trained_on) == position.samples == sum(sizes)
    for epoch in range(2):
        once = trained_on[epoch * samples.num_samples : (epoch + 1) * samples.num_samples]
        assert sorted(once) == list(range(samples.num_samples))


def test_prepared_corpus_feeds_batches(shared_corpus: PreparedCorpus) -> None:
    samples = TokenSamples(shared_corpus.train_prefix, 32, shared_corpus.vocab_size)
    batches = BatchSource(
        samples,
        seed=0,
        fingerprint=shared_corpus.fingerprint,
        global_batch_size=4,
        micro_batch_size=2,
        data_parallel_size=2,
        data_parallel_rank=1,
    )
    (microbatch,) = batches.microbatches(Position(20))
    assert torch.equal(microbatch["tokens"][:, 1:], microbatch["labels"][:, :-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 3},
        {"data_parallel_size": 3},
        {"data_parallel_rank": 1},
        {"global_batch_size": 0},
    ],
)
def test_impossible_shapes_are_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"divisible|outside|at least"):
        source(counting_samples(tmp_path), **changes)


def test_documents_of_a_batch(tmp_path: Path) -> None:
    samples = counting_samples(tmp_path)  # documents of 7 tokens, samples of 8
    assert samples.document_starts(0).tolist() == [0, 7]
    assert samples.document_starts(2).tolist() == [5]  # tokens 16 .. 24, and 21 starts one
    assert samples.document_starts(6).tolist() == [1, 8]  # 48 .. 56: the last label starts one
    batches = source(samples, micro_batch_size=4, document_mask=True)
    plain = source(samples, micro_batch_size=4)
    for batch, same in zip(batches.microbatches(at(3)), plain.microbatches(at(3)), strict=True):
        assert torch.equal(batch["tokens"], same["tokens"])
        tokens = batch["tokens"].flatten()
        row_starts = torch.arange(4 * S) % S == 0
        expected = [*torch.nonzero((tokens % 7 == 0) | row_starts).flatten().tolist(), 4 * S]
        assert batch["cu_seqlens"].dtype == torch.int32
        assert batch["cu_seqlens"].tolist() == expected
        assert torch.equal(batch["loss_mask"], (batch["labels"] % 7 != 0).float())


def test_documents_of_several_sequences_and_none(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "parts")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(np.arange(6), [2, 4])
    builder.add_document(np.arange(0), [0])
    builder.add_document(np.arange(12), [5, 0, 7])
    builder.finalize(f"{prefix}.idx")
    samples = TokenSamples(prefix, S)
    assert samples.document_starts(0).tolist() == [0, 6]
    assert samples.document_starts(1).tolist() == []
