"""Compile the decode kernels for a GPU without one: `python -m tests.kernels.decode_compiles`.

What runs is the launching code itself, on CPU tensors, with launches turned into compilations.
"""

import collections
import functools

import torch
import triton
import triton.language as tl
from hysparse_kernels import FP8, Chunk, TokenCache, WindowCache
from hysparse_kernels.call import SelectionRule
from hysparse_kernels.decode import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_BYTES = {90: 227 * 2**10, 80: 163 * 2**10}
"""What a program may have on an H100 and an A100."""
CPU = torch.device("cpu")
compiled: collections.Counter[str] = collections.Counter()


class NoGpu:
    """Stands in for a driver: says what to compile for, and can do nothing else."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _call(
    dtype: torch.dtype,
    heads: int,
    dims: tuple[int, int],
    block_size: int,
    stored: torch.dtype | None = None,
) -> None:
    """A step of one layer of each kind, two rows and two groups."""
    key_dim, value_dim = dims

    def tensor(count: int, width: int) -> torch.Tensor:
        return torch.zeros(2, 1, count, width, dtype=dtype)

    key, value, query = tensor(2, key_dim), tensor(2, value_dim), tensor(2 * heads, key_dim)
    cache = TokenCache([200, 300], 2, *dims, dtype if stored is None else stored, CPU)
    ring = WindowCache(2, 128, 2, *dims, dtype, CPU)
    chunk = Chunk((1, 0), (250, 130), (1, 1), CPU)
    sink = torch.zeros(2 * heads)
    step = (query, key, value)
    rule = SelectionRule(block_size, 2)
    _, selection = launch.full_attention(*step, cache, chunk, rule=rule, scale=0.1)
    assert selection is not None
    launch.full_attention(*step, cache, chunk, rule=None, scale=0.1)
    for width in (1, value_dim):
        gates = (tensor(2 * heads, width), tensor(2 * heads, width))
        launch.sparse_attention(
            *step, gates, cache, selection, ring, chunk,
            block_size=block_size, window=128, sinks=(sink, sink), scale=0.1,
        )  # fmt: skip
    launch.window_attention(*step, ring, chunk, window=128, sink=None, scale=0.1)


def _run(self: JITFunction, *args: object, **kwargs: object) -> object:
    kernel = _original(self, *args, **{**kwargs, "warmup": True})
    capability = driver.active.get_current_target().arch
    name, shared = self.__name__, kernel.metadata.shared
    assert shared <= SHARED_BYTES[capability], f"{name} takes {shared} bytes of shared memory"
    if name == "attend_kernel" and kwargs["DOT"] != tl.float32:
        products = ("mma.sync", "wgmma")
        assert any(x in kernel.asm["ptx"] for x in products), f"{name} uses no tensor cores"
    compiled[name] += 1
    return kernel


_original = JITFunction.run


def main() -> None:
    """Every kernel, over types, head dims, group and block sizes."""
    JITFunction.run = functools.partialmethod(_run)
    for capability in (90, 80):
        driver.set_active(NoGpu(capability))
        _call(torch.bfloat16, 16, (192, 128), 64)
        _call(torch.bfloat16, 1, (96, 96), 32)
        _call(torch.float16, 3, (64, 64), 128)
        _call(torch.float32, 16, (128, 128), 64)
        _call(torch.bfloat16, 64, (256, 256), 64)
    driver.set_active(NoGpu(90))
    _call(torch.bfloat16, 16, (192, 128), 64, FP8)
    _call(torch.float16, 4, (128, 128), 64, FP8)
    _call(torch.float32, 20, (256, 256), 128, FP8)
    _call(torch.bfloat16, 128, (128, 128), 64, FP8)
    assert set(compiled) == {
        "store_kernel", "attend_kernel", "combine_kernel", "scores_kernel", "topk_kernel"
    }  # fmt: skip
    print(f"{compiled.total()} compiled with triton {triton.__version__}")


if __name__ == "__main__":
    main()
