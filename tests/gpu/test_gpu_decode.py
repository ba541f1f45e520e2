"""The decode kernels on a GPU against the reference: every type and size, repeats, graphs."""

import random

import pytest
import torch
from hysparse_kernels import (
    FP8,
    Chunk,
    TokenCache,
    WindowCache,
    cached_full_attention,
    cached_sparse_attention,
    cached_window_attention,
    resolve_cached_backend,
)
from torch import Tensor

from tests.kernels import decode_cases
from tests.kernels.decode_cases import Case

pytestmark = pytest.mark.usefixtures("seed")
GPU = torch.device("cuda")
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def takes_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.parametrize("dtype", TYPES)
def test_random_steps(dtype: torch.dtype, rng: random.Random) -> None:
    for _ in range(4):  # most of the time goes into compiling each
        case = decode_cases.draw(rng, dtype, on_gpu=True)
        while case.full_dtype == FP8 and not takes_fp8():
            case = decode_cases.draw(rng, dtype, on_gpu=True)
        decode_cases.run(case, GPU, rng.randrange(2**31))


@pytest.mark.parametrize("full_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("dims", [(192, 128), (128, 128)])
def test_paper_sizes(dims: tuple[int, int], full_dtype: torch.dtype, rng: random.Random) -> None:
    """As many splits as the device is given outside of tests."""
    if full_dtype == FP8 and not takes_fp8():
        pytest.skip("needs compute capability 8.9")
    lengths = (32767, 5000, 1)
    bf16 = torch.bfloat16
    case = Case(64, 4, *dims, 64, 16, 128, lengths, (2, 0, 1), bf16, full_dtype)
    decode_cases.compare(case, GPU, rng.randrange(2**31))


class Layers:
    """One layer of each kind with one long row, and a step."""

    def __init__(self, past: int = 4000) -> None:
        def normal(tokens: int, heads: int) -> Tensor:
            return torch.randn(1, tokens, heads, 128, device=GPU, dtype=torch.bfloat16)

        self.oracle = TokenCache([past + 1], 4, 128, 128, torch.bfloat16, GPU)
        self.ring = WindowCache(1, 128, 4, 128, 128, torch.bfloat16, GPU)
        prompt = Chunk((0,), (0,), (past,), GPU)
        for cache in (self.oracle, self.ring):
            cache.append(prompt, normal(past, 4), normal(past, 4))
        self.chunk = Chunk((0,), (past,), (1,), GPU)
        self.step = (normal(1, 64), normal(1, 4), normal(1, 4))
        self.gates = (normal(1, 64)[..., :1], normal(1, 64)[..., :1])
        self.sink = torch.randn(64, device=GPU)

    def run(self) -> list[Tensor]:
        full = cached_full_attention(
            *self.step, self.oracle, self.chunk, block_size=64, num_selected=16,
            forced_first_blocks=1, forced_recent_blocks=1, backend="triton",
        )  # fmt: skip
        assert full.block_indices is not None
        sparse = cached_sparse_attention(
            *self.step, *self.gates, self.oracle, full.block_indices, self.ring, self.chunk,
            block_size=64, window=128, sparse_sink=self.sink, window_sink=self.sink,
            backend="triton",
        )  # fmt: skip
        near = cached_window_attention(
            *self.step, self.ring, self.chunk, window=128, sink=self.sink, backend="triton"
        )
        return [full.output, full.block_indices, sparse, near]


def test_ten_runs_are_equal_to_the_bit() -> None:
    layers = Layers()
    first = layers.run()
    for _ in range(9):
        for before, after in zip(first, layers.run(), strict=True):
            assert torch.equal(before, after)


def test_nothing_waits_for_the_device() -> None:
    layers = Layers()
    layers.run()  # compiles
    layers.chunk = Chunk((0,), (3999,), (1,), GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_can_be_recorded_as_a_graph() -> None:
    layers = Layers()
    wanted = layers.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers.run()
    for tensor in found:
        tensor.zero_()
    graph.replay()
    for before, after in zip(wanted, found, strict=True):
        assert torch.equal(before, after)


def test_offsets_beyond_2_to_the_31(rng: random.Random) -> None:
    """A short row behind so long a one that its first key has number 2.2e9."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of free GPU memory")
    bf16, before = torch.bfloat16, 2_900_000
    far = TokenCache([before, 300], 4, 192, 128, bf16, GPU)
    near = TokenCache([300], 4, 192, 128, bf16, GPU)
    assert before * 4 * 192 > 2**31

    def normal(tokens: int, heads: int, width: int) -> Tensor:
        return torch.randn(1, tokens, heads, width, device=GPU, dtype=bf16)

    tokens = normal(250, 4, 192), normal(250, 4, 128)
    far.append(Chunk((1,), (0,), (250,), GPU), *tokens)
    near.append(Chunk((0,), (0,), (250,), GPU), *tokens)
    step = normal(1, 16, 192), normal(1, 4, 192), normal(1, 4, 128)
    results = [
        cached_full_attention(
            *step, cache, Chunk((row,), (250,), (1,), GPU), block_size=64, num_selected=2,
            backend=backend,
        )
        for cache, row, backend in ((far, 1, "triton"), (near, 0, "triton"), (near, 0, "reference"))
    ]  # fmt: skip
    assert torch.equal(results[0].output, results[1].output)
    assert torch.equal(results[0].block_indices, results[1].block_indices)
    error = (results[0].output.float() - results[2].output.float()).abs().max()
    assert error < 2e-2


def test_auto_takes_the_kernels() -> None:
    layers = Layers()
    query = layers.step[0]
    choice = resolve_cached_backend("auto", query, layers.chunk, layers.oracle, block_size=64)
    assert choice == ("triton", "Triton decode kernels on cuda")
