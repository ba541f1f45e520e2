"""The bytes that caches hold, measured, and what the paper's layout saves."""

import dataclasses

import pytest
import torch
from hysparse_kernels import FP8

from hysparse_megatron.architecture.kv_cache import kv_cache_bytes
from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.config.compose import compose
from hysparse_megatron.inference.kv_cache import KvCache

CONTEXT = 32_768
PAPER_FACTOR = 9.47
BF16 = torch.bfloat16


def kinds(model: ModelConfig) -> list[LayerKind]:
    return list(parse_layout(model.layout).kinds)


def cache_of(model: ModelConfig, *capacities: int, full_dtype: torch.dtype = BF16) -> KvCache:
    return KvCache(
        model, kinds(model), capacities, full_dtype=full_dtype, window_dtype=BF16, device="cpu"
    )


def fill(cache: KvCache, model: ModelConfig, tokens: int, piece: int = 8192) -> None:
    """Keys and values of so many tokens into every layer, as attention layers store them."""
    for start in range(0, tokens, piece):
        chunk = cache.chunk([0], [min(piece, tokens - start)])
        shape = (1, chunk.width, model.num_query_groups)
        key, value = torch.randn(*shape, model.head_dim), torch.randn(*shape, model.value_dim)
        for layer in cache.layers:
            layer.append(chunk, key, value)
        cache.advance(chunk)


def test_the_mini_twin_holds_a_ninth_at_32k() -> None:
    """Both caches are full of tokens; windows and blocks are those of the paper's 80B model."""
    held = {}
    for name in ("hysparse_80b_a3b_mini", "full_80b_a3b_mini"):
        model = compose([f"model={name}", "model.window=128", "model.block_size=64"]).model
        cache = cache_of(model, CONTEXT)
        fill(cache, model, CONTEXT)
        assert cache.lengths == [CONTEXT]
        held[name] = cache.num_bytes
        assert cache.num_bytes == kv_cache_bytes(model, kinds(model), CONTEXT)
    factor = held["full_80b_a3b_mini"] / held["hysparse_80b_a3b_mini"]
    assert factor == pytest.approx(PAPER_FACTOR, rel=0.01)


def test_so_does_the_true_geometry() -> None:
    held = {}
    for name in ("hysparse_80b_a3b", "hybrid_swa_80b_a3b", "full_80b_a3b"):
        model = compose([f"model={name}"]).model
        cache = cache_of(model, CONTEXT)  # memory that nothing is written to is not taken
        held[name] = cache.num_bytes
        assert cache.num_bytes == kv_cache_bytes(model, kinds(model), CONTEXT)
    factor = held["full_80b_a3b"] / held["hysparse_80b_a3b"]
    assert factor == pytest.approx(PAPER_FACTOR, rel=0.01)
    assert held["hybrid_swa_80b_a3b"] == held["hysparse_80b_a3b"]


def test_fp8_halves_the_full_layers() -> None:
    model = compose(["model=hysparse_80b_a3b"]).model
    wide, narrow = (cache_of(model, CONTEXT, full_dtype=d).bytes_by_kind() for d in (BF16, FP8))
    assert narrow[LayerKind.SPARSE] == wide[LayerKind.SPARSE] > 0
    # One exponent for the 128 channels of a key or value head.
    assert narrow[LayerKind.FULL] == wide[LayerKind.FULL] * (128 + 1) // (2 * 128)
    assert narrow[LayerKind.WINDOW] == 0


def test_sequences_take_room_for_their_own_length() -> None:
    """On a device without memory the same bytes are counted."""
    model = compose(["model=tiny_hysparse"]).model
    cache = cache_of(model, 700, 30, 100)
    planned = sum(kv_cache_bytes(model, kinds(model), tokens) for tokens in (700, 100))
    short = kv_cache_bytes(model, kinds(model), 30)
    ring = kv_cache_bytes(model, [LayerKind.SPARSE] * 6, model.window)
    # Rings are all as long as the longest sequence needs them.
    assert cache.num_bytes == planned + short + ring - ring * 30 // model.window
    meta = KvCache(
        model, kinds(model), (700, 30, 100), full_dtype=BF16, window_dtype=BF16, device="meta"
    )
    assert meta.bytes_by_kind() == cache.bytes_by_kind()


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_tensor_ranks_share_the_groups(ranks: int) -> None:
    model = dataclasses.replace(compose(["model=hysparse_80b_a3b"]).model, num_query_groups=4)
    whole = kv_cache_bytes(model, kinds(model), 4096)
    of_rank = KvCache(
        model,
        kinds(model),
        [4096],
        full_dtype=BF16,
        window_dtype=BF16,
        device="meta",
        tensor_parallel_size=ranks,
    )
    assert of_rank.num_bytes == whole // min(ranks, 4)
