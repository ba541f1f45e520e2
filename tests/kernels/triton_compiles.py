"""Compile the portable kernels for GPUs without one: `python -m tests.kernels.triton_compiles`.

What runs is the launching code itself, on CPU tensors, with launches turned into compilations.
"""

import collections
import functools

import torch
import triton
from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.autograd import attend
from hysparse_kernels.build_lists import build_block_lists
from hysparse_kernels.call import AttentionCall, CausalKeys, SelectedKeys, SelectionRule, WindowKeys
from hysparse_kernels.query_range import QueryRange
from hysparse_kernels.triton.gating import gated_sum
from hysparse_kernels.triton.topk import block_topk
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.kernels.decode_compiles import SHARED_BYTES, NoGpu

DTYPE = torch.bfloat16
compiled: collections.Counter[str] = collections.Counter()


def _call(
    heads: int,
    dims: tuple[int, int],
    block_size: int,
    cu_seqlens: torch.Tensor | None,
    queries: QueryRange | None = None,
    optional: bool = True,
) -> None:
    """Forward and backward of every operation, two groups; selection, sinks where `optional`."""
    length = 200 if queries is None else queries.queries

    def tensor(count: int, width: int, tokens: int = length) -> torch.Tensor:
        return torch.zeros(1, tokens, count, width, dtype=DTYPE, requires_grad=True)

    query = tensor(2 * heads, dims[0])
    key, value = tensor(2, dims[0], 200), tensor(2, dims[1], 200)
    sink = torch.zeros(2 * heads, requires_grad=True) if optional else None
    start, accumulate = 0, None
    if queries is not None:
        start, accumulate = queries.start, KeyValueGradients()
        key, value = accumulate.attach(key, value)
    # What was compiled has not run: the indices are any numbers.
    indices = torch.zeros(1, 2, length, 2, dtype=torch.int32)
    build_block_lists(indices, heads, block_size, cu_seqlens, queries)
    lists = build_block_lists(indices, heads, block_size, cu_seqlens, queries, with_triton=False)
    outputs = []
    for keys, its_sink in (
        (CausalKeys(SelectionRule(block_size, 2), select=optional), None),
        (SelectedKeys(indices, block_size, lists), sink),
        (WindowKeys(100), sink),
    ):
        call = AttentionCall(
            query, key, value, keys, sink=its_sink, cu_seqlens=cu_seqlens, query_start=start,
            accumulate=accumulate,
        )  # fmt: skip
        outputs.append(attend(call).output)
    torch.cat(outputs).sum().backward()
    if queries is not None or not optional:
        return
    block_topk(torch.zeros(3, 40), 4)
    for width in (1, dims[1]):
        gates = (tensor(2 * heads, width), tensor(2 * heads, width))
        branch = tensor(2 * heads, dims[1])
        gated_sum(branch, branch, *gates).sum().backward()


def _run(self: JITFunction, *args: object, **kwargs: object) -> object:
    kernel = _original(self, *args, **{**kwargs, "warmup": True})
    name, shared = self.__name__, kernel.metadata.shared
    limit = SHARED_BYTES[driver.active.get_current_target().arch]
    assert shared <= limit, f"{name} takes {shared} bytes of shared memory"
    compiled[name] += 1
    return kernel


_original = JITFunction.run


def main() -> None:
    """Every kernel and mode, dense and packed, and of a range of queries with one sum."""
    JITFunction.run = functools.partialmethod(_run)
    driver.set_active(NoGpu(90))
    _call(16, (128, 128), 64, None)
    packed = torch.tensor([0, 50, 50, 200], dtype=torch.int32)
    _call(3, (96, 64), 32, packed)
    _call(4, (64, 64), 32, packed, QueryRange(30, 100, 200))
    _call(4, (128, 128), 64, packed, optional=False)
    assert set(compiled) == {
        "forward_kernel", "dq_kernel", "dkv_kernel", "group_scores_kernel", "topk_kernel",
        "forward_index_kernel", "map_kernel", "count_kernel", "compact_kernel", "work_item_kernel",
        "_forward", "_backward", "_sink_kernel",
    }  # fmt: skip
    print(f"{compiled.total()} compiled with triton {triton.__version__}")


if __name__ == "__main__":
    main()
