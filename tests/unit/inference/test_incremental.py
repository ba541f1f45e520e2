"""Tokens that come in one by one, or in chunks, give what they give all at once."""

import contextlib
import random
from unittest import mock

import pytest
import torch
from hysparse_kernels import FP8
from incremental import (
    assert_equal,
    at_once,
    make_cache,
    random_model,
    step_by_step,
    without_near_ties,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.inference.forward import advance
from hysparse_megatron.model import attend_cached
from tests.unit.model.tiny_models import VARIANTS as ATTENTION
from tests.unit.model.tiny_models import VOCABULARY, tiny_config, tiny_model

BLOCK, WINDOW = 4, 5
"""Of the tiny models."""

EXPERTS = [
    "model.moe.num_experts=6",
    "model.moe.num_active_experts=2",
    "model.moe.expert_ffn_hidden_size=12",
]
VARIANTS: dict[str, list[str]] = {
    **ATTENTION,
    "full only": ["model.layout=F F"],
    "windows only": ["model.layout=W W W"],
    "full and windows": ["model.layout=W F W"],
    "gate of the full baseline": ["model.layout=F F", "model.full_gate=head"],
    "gate per channel of full layers": ["model.layout=F S F", "model.full_gate=channel"],
    "rotated by YaRN, and biases": [
        "model.layout=F S W F",
        "model.rope_scaling.type=yarn",
        "model.rope_scaling.factor=4",
        "model.rope_scaling.original_max_position_embeddings=7",
        "model.qkv_bias=true",
    ],
    "a window of one, blocks of one": [
        "model.layout=F S W",
        "model.window=1",
        "model.block_size=1",
    ],
    "forced blocks": [
        "model.layout=F S S F",
        "model.num_selected_blocks=3",
        "model.forced_first_blocks=1",
        "model.forced_recent_blocks=1",
    ],
    "experts": ["model.layout=F S W F", *EXPERTS],
    "experts by sigmoid, a shared one, a dense layer": [
        "model.layout=F S S",
        *EXPERTS,
        "model.moe.router_score=sigmoid",
        "model.moe.balancing=bias",
        "model.moe.shared_expert_ffn_hidden_size=8",
        "model.moe.num_dense_first_layers=1",
    ],
}


def lengths_at_borders(rng: random.Random, count: int) -> list[int]:
    """At, before and after the borders of blocks and windows, and anywhere."""
    borders = [1, BLOCK, WINDOW, 2 * BLOCK, 2 * WINDOW, 3 * WINDOW, 6 * BLOCK]
    near = [max(1, border + rng.randint(-1, 1)) for border in rng.sample(borders, count - 1)]
    return [*near, rng.randint(25, 45)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_by_step_is_at_once(variant: str, groups: ProcessGroupCollection, seed: int) -> None:
    """Sequences of different lengths, from prompts of different lengths, in random chunks."""
    rng = random.Random(seed)
    config, model = random_model(VARIANTS[variant], groups, seed)
    lengths = lengths_at_borders(rng, count=4)
    sequences, expected = without_near_ties(model, lengths, VOCABULARY)
    prompts = [rng.randint(1, length) for length in lengths]
    cache = make_cache(config, lengths)
    found = step_by_step(model, cache, sequences, prompts, chunk=rng.randint(1, 2 * WINDOW))
    assert_equal(found, expected)
    assert cache.lengths == lengths


@pytest.mark.parametrize("chunk", [1, 2, BLOCK, WINDOW, 7, 64])
def test_any_chunk_of_the_prompt(chunk: int, groups: ProcessGroupCollection, seed: int) -> None:
    config, model = random_model(["model.layout=F S W F"], groups, seed)
    lengths = [29, 8]
    sequences, expected = without_near_ties(model, lengths, VOCABULARY)
    found = step_by_step(model, make_cache(config, lengths), sequences, lengths, chunk)
    assert_equal(found, expected)


@pytest.mark.thorough
def test_a_long_text_in_the_paper_s_proportions(groups: ProcessGroupCollection, seed: int) -> None:
    """Windows of two blocks, many more blocks than are selected, room to spare in the cache."""
    overrides = ["model.layout=F S S F S", "model.window=8", "model.num_selected_blocks=4"]
    config, model = random_model(overrides, groups, seed)
    lengths = [151, 120]
    sequences, expected = without_near_ties(model, lengths, VOCABULARY)
    cache = make_cache(config, [200, 120])
    found = step_by_step(model, cache, sequences, [101, 40], chunk=33)
    assert_equal(found, expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_a_coarser_cache(storage: torch.dtype, groups: ProcessGroupCollection, seed: int) -> None:
    """Moves logits by less than a number in it may be off; weights are as they are drawn.

    Without oracles that are read, whose picks it may change.
    """
    config = tiny_config("model.layout=F W F", "model.init_std=0.05")
    model = tiny_model(config, groups).eval()
    torch.manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (29,))
    exact = at_once(model, tokens)
    cache = make_cache(config, [29], full_dtype=storage)
    (found,) = step_by_step(model, cache, [tokens], [20], chunk=6)
    error = (found.logits - exact.logits).abs().max() / exact.logits.abs().max()
    assert 1e-6 < error < 1 / 16


def test_a_model_in_bf16(groups: ProcessGroupCollection, seed: int) -> None:
    """Up to its own noise; without oracles, whose picks noise would change."""
    config, model = random_model(["model.layout=F W F W", "train.precision=bf16"], groups, seed)
    tokens = torch.randint(0, VOCABULARY, (29,))
    exact = at_once(model, tokens)
    bf16 = {"full_dtype": torch.bfloat16, "window_dtype": torch.bfloat16}
    (found,) = step_by_step(model, make_cache(config, [29], **bf16), [tokens], [9], chunk=4)
    error = (found.logits - exact.logits).abs().max() / exact.logits.abs().max()
    assert error < 0.05


def test_nothing_stays_on_a_module(groups: ProcessGroupCollection, seed: int) -> None:
    """Two caches in turn, over one model, do not know of each other."""
    config, model = random_model(["model.layout=F S W F"], groups, seed)
    lengths = [18, 23]
    sequences, expected = without_near_ties(model, lengths, VOCABULARY)
    caches = [make_cache(config, [length]) for length in lengths]

    def contents() -> dict[str, dict[str, int]]:
        return {
            name: {key: id(value) for key, value in vars(module).items()}
            for name, module in model.named_modules()
        }

    before = contents()
    first = step_by_step(model, caches[0], [sequences[0][:11]], [4], chunk=3)
    second = step_by_step(model, caches[1], [sequences[1]], [7], chunk=5)
    rest = step_by_step(model, caches[0], [sequences[0]], [18], chunk=2)
    assert contents() == before
    assert_equal(second, expected[1:])
    joined = torch.cat([first[0].logits, rest[0].logits])
    torch.testing.assert_close(joined, expected[0].logits, rtol=1e-4, atol=1e-4)


def test_training_goes_on_as_before(groups: ProcessGroupCollection, seed: int) -> None:
    """Generation between two forward passes changes no bit of the second."""
    config, model = random_model(["model.layout=F S W F"], groups, seed)
    tokens = torch.randint(0, VOCABULARY, (29,))
    before = at_once(model, tokens)
    step_by_step(model, make_cache(config, [29]), [tokens], [12], chunk=5)
    assert torch.equal(at_once(model, tokens).logits, before.logits)


def test_no_room_is_said(groups: ProcessGroupCollection, seed: int) -> None:
    config, model = random_model(["model.layout=W"], groups, seed)
    cache = make_cache(config, [4, 9])
    with pytest.raises(
        ValueError, match="sequence 0 has room for 4 tokens: 0 are in the cache and"
    ):
        step_by_step(model, cache, [torch.arange(5), torch.arange(9)], [5, 9], chunk=5)


def test_layers_hand_their_backend_on(groups: ProcessGroupCollection, seed: int) -> None:
    config, model = random_model(["model.layout=F S W", "model.backend=reference"], groups, seed)
    names = [f"cached_{kind}_attention" for kind in ("full", "sparse", "window")]
    with contextlib.ExitStack() as stack:
        watched = [
            stack.enter_context(
                mock.patch.object(attend_cached, name, wraps=getattr(attend_cached, name))
            )
            for name in names
        ]
        advance(model, make_cache(config, [8]), [0], [[1, 2, 3]])
    for name, operation in zip(names, watched, strict=True):
        assert [call.kwargs["backend"] for call in operation.call_args_list] == ["reference"], name
