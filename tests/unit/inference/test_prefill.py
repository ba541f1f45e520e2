"""Prompts that are taken in together, in pieces of any size, give what each gives all at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hysparse_kernels import FP8, TokenCache
from incremental import assert_close, make_cache, random_model, without_near_ties
from megatron.core.process_groups_config import ProcessGroupCollection

from hysparse_megatron.inference import generate as generation
from hysparse_megatron.inference.generate import Settings, prefill
from hysparse_megatron.inference.load import LoadedModel
from tests.unit.model.tiny_models import VOCABULARY
from tests.unit.single_process import DEVICE
from tools.generate import _parser

LENGTHS = [23, 1, 40, 9, 3, 9]


@pytest.fixture
def loaded(groups: ProcessGroupCollection, seed: int) -> LoadedModel:
    config, model = random_model(["model.layout=F S S W F S"], groups, seed)
    return LoadedModel(config, model, groups, DEVICE, VOCABULARY, Path(), None)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Rows of every step, and how many tokens it brings to each."""
    taken: list[tuple[list[int], list[int]]] = []
    real = generation.advance

    def advance(
        model: Any, cache: Any, rows: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> Any:
        taken.append((list(rows), [len(of_row) for of_row in tokens]))
        return real(model, cache, rows, tokens)

    monkeypatch.setattr(generation, "advance", advance)
    return taken


@pytest.mark.parametrize("chunk", [1, 7, 10, 40, 4096])
def test_prompts_of_different_lengths(
    chunk: int, loaded: LoadedModel, steps: list[tuple[list[int], list[int]]]
) -> None:
    sequences, expected = without_near_ties(loaded.model, LENGTHS, VOCABULARY)
    cache = make_cache(loaded.config, [length + 2 for length in LENGTHS])
    found = prefill(loaded, cache, [tokens.tolist() for tokens in sequences], chunk)
    for logits, computed in zip(found, expected, strict=True):
        assert_close(logits.unsqueeze(0), computed)
    assert cache.lengths == LENGTHS
    assert all(len(rows) * max(new) <= chunk for rows, new in steps), "padding included"


def test_short_prompts_are_taken_in_together(
    loaded: LoadedModel, steps: list[tuple[list[int], list[int]]]
) -> None:
    """Shortest first; a long one alone and in pieces."""
    cache = make_cache(loaded.config, LENGTHS)
    prefill(loaded, cache, [[1] * length for length in LENGTHS], 30)
    together = [([1, 4, 3], [1, 3, 9]), ([5], [9]), ([0], [23]), ([2], [30]), ([2], [10])]
    assert steps == together


def test_a_chunk_of_an_fp8_cache_widens_it_once(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the oracles F S S and F S, once for themselves and once for all that read them."""
    reads = []
    real = TokenCache.read

    def read(cache: TokenCache, *given: Any) -> Any:
        reads.append(cache)
        return real(cache, *given)

    monkeypatch.setattr(TokenCache, "read", read)
    cache = make_cache(loaded.config, [20], full_dtype=FP8)
    prefill(loaded, cache, [[1] * 20], 16)
    assert len(reads) == 2 * 2 * 2


def test_the_command_has_the_same_default() -> None:
    args = _parser().parse_args(["--run-dir", "runs/one"])
    assert args.prefill_chunk == Settings(max_new_tokens=1).prefill_chunk
