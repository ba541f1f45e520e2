"""Compile the Hopper kernels for their GPU without one: `python -m tests.kernels.hopper_compiles`.

What runs is the launching code itself, on CPU tensors, with launches turned into compilations.
"""

import functools

import torch
import triton
from hysparse_kernels.build_lists import build_block_lists
from hysparse_kernels.call import SelectionRule
from hysparse_kernels.hopper import launch as hopper
from hysparse_kernels.query_range import QueryRange
from hysparse_kernels.triton import kernels as portable
from hysparse_kernels.triton.launch import KeySchedule, Saved
from hysparse_kernels.triton.topk import Selector
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.driver import driver

from tests.kernels.decode_compiles import SHARED_BYTES, NoGpu

compiled: list[str] = []


def _compile_only(run, self, *args, **kwargs):
    kernel = run(self, *args, **{**kwargs, "warmup": True})
    assert "wgmma" in kernel.asm["ptx"], f"{self.__name__} uses no tensor cores"
    assert kernel.metadata.shared <= SHARED_BYTES[90], f"{self.__name__}: {kernel.metadata.shared}"
    compiled.append(self.__name__)
    return kernel


def _call(
    mode: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    cu_seqlens: Tensor | None = None,
    queries: QueryRange | None = None,
    optional: bool = True,
) -> None:
    """Forward and backward of one mode, one group; with selection or sinks where `optional`."""

    def tensor(count: int, width: int, length: int = 200) -> Tensor:
        return torch.zeros(1, length, count, width, dtype=torch.bfloat16)

    length = 200 if queries is None else queries.queries
    query, key, value = tensor(heads, head_dim, length), tensor(1, head_dim), tensor(1, value_dim)
    indices = torch.zeros(1, 1, length, 2, dtype=torch.int32)
    lists, sink, selector = None, torch.zeros(heads) if optional else None, None
    if mode == portable.BLOCKS:
        lists = build_block_lists(indices, heads, 64, cu_seqlens, queries, with_triton=False)
        cu_seqlens = None
    if mode == portable.CAUSAL:
        sink = None
        selector = Selector(SelectionRule(64, 2), 200, cu_seqlens, queries) if optional else None
    schedule = KeySchedule(
        mode, keys=64, window=100, lists=lists, cu_seqlens=cu_seqlens, queries=queries
    )
    output, lse, _ = hopper.forward(query, key, value, sink, schedule, 0.1, selector)
    saved = Saved(query, key, value, output, lse, torch.zeros_like(output))
    hopper.gradients(saved, schedule, 0.1, None, keys_too=True)


def main() -> None:
    """Every kernel and mode, dense, packed and of ranges, over head dims and two group sizes."""
    driver.set_active(NoGpu(90))
    GluonJITFunction.run = functools.partialmethod(_run)
    hopper._multiprocessors = lambda device: 132
    packed = torch.tensor([0, 50, 50, 200], dtype=torch.int32)
    _call(portable.CAUSAL, 16, 128, 128)
    _call(portable.CAUSAL, 4, 192, 128, packed)
    _call(portable.WINDOW, 16, 64, 64, packed)
    _call(portable.WINDOW, 1, 128, 64)
    _call(portable.BLOCKS, 16, 192, 128)
    _call(portable.BLOCKS, 4, 128, 128, packed)
    part = QueryRange(90, 100, 200)
    _call(portable.CAUSAL, 16, 192, 128, None, part)
    _call(portable.CAUSAL, 4, 128, 128, packed, part)
    _call(portable.WINDOW, 16, 128, 64, None, part)
    _call(portable.WINDOW, 16, 128, 128, packed, part)
    _call(portable.BLOCKS, 16, 128, 128, None, part)
    _call(portable.BLOCKS, 4, 192, 128, packed, part)
    # Full layers and recompute select nothing; sinks are a setting.
    _call(portable.CAUSAL, 4, 128, 128, optional=False)
    _call(portable.CAUSAL, 16, 192, 128, packed, part, optional=False)
    _call(portable.WINDOW, 4, 128, 128, optional=False)
    _call(portable.BLOCKS, 16, 192, 128, packed, optional=False)
    assert set(compiled) == {"oracle_kernel", "forward_kernel", "dq_kernel", "dkv_kernel"}
    print(f"{len(compiled)} compiled for sm_90a with triton {triton.__version__}")


_original = GluonJITFunction.run


def _run(self, *args, **kwargs):
    return _compile_only(_original, self, *args, **kwargs)


if __name__ == "__main__":
    main()
