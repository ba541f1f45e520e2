"""Decode steps recorded as a CUDA graph against those launched one by one."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import ParallelConfig
from hysparse_megatron.inference.generate import CacheDtype, Settings, generate, new_cache, prefill
from hysparse_megatron.inference.load import LoadedModel, build_model
from hysparse_megatron.inference.steps import EagerSteps, GraphedSteps, why_no_graph
from hysparse_megatron.runtime import device as runtime_device
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.runtime.process_groups import destroy_process_groups

pytestmark = pytest.mark.usefixtures("seed")
VOCABULARY = 256
SIZES = [
    "model=tiny_hysparse",
    "model.layout=F 2*S W F S",
    f"model.vocab_size={VOCABULARY}",
    "model.hidden_size=256",
    "model.num_attention_heads=16",
    "model.num_query_groups=4",
    "model.head_dim=64",
    "model.block_size=32",
    "model.num_selected_blocks=2",
    "model.window=48",
    "model.init_std=0.1",
    "train.precision=bf16",
]


@pytest.fixture
def loaded(seed: int) -> Iterator[LoadedModel]:
    device = runtime_device.start(Rank(0, 1, 0, 1), ParallelConfig(timeout_seconds=60))
    config = compose(SIZES)
    model, groups = build_model(config, device, VOCABULARY)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    yield LoadedModel(config, model, groups, device, VOCABULARY, Path(), None)
    destroy_process_groups()
    runtime_device.stop()


def prompts(lengths: list[int]) -> list[list[int]]:
    return [[random.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("dtype", [CacheDtype.model, CacheDtype.fp8])
def test_a_graph_computes_what_single_launches_do(loaded: LoadedModel, dtype: CacheDtype) -> None:
    """Rows of different lengths, over borders of blocks and windows; one ends before the others.

    A graph's launches are those of full rows, so that sums are split up in another way.
    """
    lengths, steps = [97, 1, 46, 160], 40
    texts = prompts(lengths)
    chosen = [prompts([steps])[0] for _ in lengths]
    results = []
    for kind in (EagerSteps, GraphedSteps):
        cache = new_cache(loaded, [length + steps for length in lengths], dtype)
        prefill(loaded, cache, texts, 64)
        assert why_no_graph(loaded, cache) is None
        taken = kind(loaded, cache)
        rows, logits = [0, 1, 2, 3], []
        for step in range(steps):
            if step == 25:
                rows = [0, 2, 3]
            logits.append(taken.logits(rows, [chosen[row][step] for row in rows]).clone())
        assert cache.lengths == [97 + steps, 26, 46 + steps, 160 + steps]
        results.append(logits)
    for eager, graphed in zip(*results, strict=True):
        scale = eager.abs().max()
        assert scale > 0.1
        assert (eager - graphed).abs().max() <= 2e-2 * scale


def test_generation_records_its_steps(loaded: LoadedModel) -> None:
    texts = prompts([30, 5])
    with_graph = Settings(max_new_tokens=24)
    without = dataclasses.replace(with_graph, cuda_graph=False)
    made = [generate(loaded, texts, settings) for settings in (with_graph, without, with_graph)]
    assert made[0].tokens == made[2].tokens
    agreeing = sum(
        a == b
        for one, other in zip(made[0].tokens, made[1].tokens, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert agreeing >= 12  # of 48: random logits have near-ties, after which texts differ


def test_a_full_row_is_refused(loaded: LoadedModel) -> None:
    cache = new_cache(loaded, [6, 9], CacheDtype.model)
    prefill(loaded, cache, prompts([5, 5]), 64)
    steps = GraphedSteps(loaded, cache)
    steps.logits([0, 1], [1, 2])
    with pytest.raises(ValueError, match="sequence 0 has room for 6 tokens"):
        steps.logits([0, 1], [3, 4])
