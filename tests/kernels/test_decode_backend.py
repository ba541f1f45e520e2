"""Which steps of generation run on the decode kernels, and what a refusal says."""

from collections.abc import Callable

import pytest
import torch
from hysparse_kernels import (
    FP8,
    BackendUnavailable,
    Chunk,
    TokenCache,
    WindowCache,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
    resolve_cached_backend,
)
from hysparse_kernels.decode import launch

CPU = torch.device("cpu")
ONE, TWO = Chunk((0,), (3,), (1,), CPU), Chunk((0,), (3,), (2,), CPU)


def caches(dtype: torch.dtype = torch.float32, dim: int = 8) -> tuple[TokenCache, WindowCache]:
    window_dtype = torch.bfloat16 if dtype == FP8 else dtype
    return (
        TokenCache([8], 1, dim, dim, dtype, CPU),
        WindowCache(1, 4, 1, dim, dim, window_dtype, CPU),
    )


def test_on_a_cpu_auto_is_the_reference_and_says_why() -> None:
    why = "the Triton kernels need a CUDA device, the tensors are on cpu"
    for chunk in (ONE, TWO):
        query = torch.zeros(1, chunk.width, 2, 8)
        choice = resolve_cached_backend("auto", query, chunk, *caches())
        assert choice == ("reference", f"plain PyTorch: {why}")
        with pytest.raises(BackendUnavailable, match=why):
            resolve_cached_backend("triton", query, chunk, *caches())
        with pytest.raises(ValueError, match="backend: got 'cuda'"):
            resolve_cached_backend("cuda", query, chunk, *caches())


def test_longer_chunks_take_what_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of any type, up to the head dims and block sizes of its kernels."""
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", True)

    def choice(dim: int, block_size: int) -> str:
        query = torch.zeros(1, 2, 2, dim, dtype=torch.bfloat16)
        return resolve_cached_backend(
            "auto", query, TWO, *caches(FP8, dim), block_size=block_size
        ).name

    assert choice(8, 64) == "triton"
    assert choice(8, 48) == choice(260, 64) == choice(192, 128) == "reference"


@pytest.mark.parametrize(
    ("query", "cached", "block_size", "why"),
    [
        ((torch.float64, 2, 8), caches(), 64, "bf16, fp16 and fp32, not torch.float64"),
        ((torch.float32, 2, 8), caches(torch.float64), 64, "and fp32, not torch.float64"),
        ((torch.float32, 2, 8), caches(), 48, r"block sizes \(16, 32, 64, 128\), not 48"),
        ((torch.float32, 129, 8), caches(), 64, "128 query heads per KV group, not 129"),
        ((torch.float32, 2, 8), caches(dim=260), 64, "head dims up to 256, not 260"),
    ],
)
def test_a_refusal_says_what_is_not_taken(
    query: tuple[torch.dtype, int, int],
    cached: tuple[TokenCache, WindowCache],
    block_size: int,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", True)
    dtype, heads, dim = query
    tensor = torch.zeros(1, 1, heads, dim, dtype=dtype)
    with pytest.raises(BackendUnavailable, match=why):
        resolve_cached_backend("triton", tensor, ONE, *cached, block_size=block_size)
    choice = resolve_cached_backend("auto", tensor, ONE, *cached, block_size=block_size)
    assert choice.name == "reference"


@pytest.mark.parametrize(("stored", "heads"), [(torch.float32, 128), (FP8, 3)])
def test_what_is_taken(stored: torch.dtype, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", True)
    tensor = torch.zeros(1, 1, heads, 8, dtype=torch.bfloat16)
    assert resolve_cached_backend("auto", tensor, ONE, *caches(stored)).name == "triton"


def test_every_operation_refuses_by_name() -> None:
    oracle, ring = caches()
    query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 1, 8)
    gate, selection = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    blocks = {"block_size": 64, "backend": "triton"}
    calls: list[Callable[[], object]] = [
        lambda: cached_full_attention(query, key, key, oracle, ONE, num_selected=1, **blocks),
        lambda: cached_sparse_attention(
            query, key, key, gate, gate, oracle, selection, ring, ONE, window=4, **blocks
        ),
        lambda: cached_window_attention(query, key, key, ring, ONE, window=4, backend="triton"),
    ]
    for call in calls:
        with pytest.raises(BackendUnavailable, match="need a CUDA device"):
            call()
