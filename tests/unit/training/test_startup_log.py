"""What the start-up log says about the data, and what data-parallel ranks send when."""

from types import SimpleNamespace

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from hysparse_megatron.config.compose import compose
from hysparse_megatron.data.sources import BlendedCorpus
from hysparse_megatron.model.offload import describe_offload
from hysparse_megatron.training.data_parallel import describe_overlap
from hysparse_megatron.training.startup_log import _describe_data


def corpus(train_tokens: int) -> SimpleNamespace:
    facts = {"validation_tokens": 10, "vocab_size": 300, "fingerprint": "0" * 64}
    return SimpleNamespace(train_tokens=train_tokens, **facts)


def blend(*sizes: int, weights: tuple[float, ...]) -> BlendedCorpus:
    return BlendedCorpus(tuple(map(corpus, sizes)), weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "tokens", "told"),
    [
        (corpus(1000), 250, "the whole run of 250 tokens reads the data 0.25 times"),
        (corpus(1000), 4000, "the whole run of 4,000 tokens reads the data 4 times"),
        (
            corpus(1000),
            5_000_000,
            "WARNING: the whole run of 5,000,000 tokens reads the data 5,000",
        ),
        # The part that is read most often: 0.9 of 1,000 tokens from 100 of them.
        (blend(100, 10_000, weights=(9.0, 1.0)), 1000, "WARNING: the whole run of 1,000 tokens"),
        (blend(100, 10_000, weights=(1.0, 9.0)), 100, "reads the data 0.1 times"),
    ],
)
def test_how_often_the_data_are_read(data, tokens: int, told: str) -> None:
    said: list[str] = []
    _describe_data(data, tokens, said.append)
    assert said[0].startswith(f"data: {data.train_tokens:,} training")
    assert told in said[1]
    assert said[1].startswith("WARNING") == told.startswith("WARNING")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "sends between steps"),
        ({"overlap_grad_reduce": True}, "sends gradients beside the backward pass, in 6 buckets"),
        (
            {
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
                "num_distributed_optimizer_instances": 4,
            },
            "sends gradients beside the backward pass and parameters beside the forward pass, in 6 "
            "buckets, with 4 instances of the optimizer",
        ),
    ],
)
def test_what_data_parallel_ranks_send(settings: dict, told: str) -> None:
    chunk = SimpleNamespace(
        ddp_config=DistributedDataParallelConfig(**settings),
        bucket_groups=[object()] * 2,
        expert_parallel_bucket_groups=[object()],
    )
    assert describe_overlap([chunk, chunk]) == f"data parallel: {told}"  # type: ignore[list-item]


def test_what_waits_on_the_host() -> None:
    config = compose(["train.offload_activations=true", "train.recompute=full"])
    told = describe_offload(config.train.recompute_text, config.train.offload_min_bytes)
    assert "1,048,576 bytes and more wait for the backward pass in host memory" in told
    assert "(recompute full)" in told
