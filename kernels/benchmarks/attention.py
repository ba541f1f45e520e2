"""Time the attention operations beside their peers: `python kernels/benchmarks/attention.py`.

Needs a CUDA device. Every row is one operation, forward alone and backward alone, in the same run;
medians of 200 ms of repetitions. "clustered" selections take block 0, the own block and the one
before, the rest drawn once per 64 tokens with 5 % noise; "random" ones are drawn per token.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hysparse_kernels as hk

BLOCK, SELECTED, WINDOW = 64, 16, 128
Output = Callable[[], Tensor]


def selection(sequence: int, groups: int, clustered: bool) -> Tensor:
    """Block indices int32 [1, groups, S, SELECTED]: ascending, -1 padding last."""
    own = torch.arange(sequence, device="cuda") // BLOCK
    blocks = -(-sequence // BLOCK)
    drawn = torch.rand(groups, sequence, SELECTED, device="cuda")
    if clustered:
        shared = torch.rand(groups, blocks, SELECTED, device="cuda")[:, own]
        drawn = torch.where(torch.rand_like(drawn) < 0.05, drawn, shared)
    ids = (drawn * (own[None, :, None] + 1)).long()
    if clustered:
        ids[..., 0], ids[..., 1], ids[..., 2] = 0, own, (own - 1).clamp(min=0)
    ids = ids.sort(-1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = ids.masked_fill(repeated, blocks).sort(-1).values
    return ids.masked_fill(ids == blocks, -1).to(torch.int32)[None]


def median_ms(function: Callable[[], object]) -> float:
    """Median time of one call in milliseconds."""
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def table(sequence: int, heads: int, groups: int, head_dim: int, value_dim: int) -> None:
    """Print the rows of one shape, bf16, batch 1."""

    def normal(count: int, width: int) -> Tensor:
        return torch.randn(1, sequence, count, width, device="cuda", dtype=torch.bfloat16)

    query, key, value = normal(heads, head_dim), normal(groups, head_dim), normal(groups, value_dim)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    grad = normal(heads, value_dim)
    sink = torch.zeros(heads, device="cuda", requires_grad=True)
    print(f"\nS {sequence}, heads {heads}/{groups}, dims {head_dim}/{value_dim}")

    def row(name: str, operation: Output) -> None:
        try:
            torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                forward = median_ms(operation)
            output = operation()
            backward = median_ms(
                lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)
            )
        except RuntimeError as error:
            print(f"  {name:34s} refused: {str(error).splitlines()[0][:80]}")
            return
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"  {name:34s} forward {forward:8.2f} ms  backward {backward:8.2f} ms  {peak:6.2f} GiB"
        )

    def sdpa(backend: SDPBackend) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
        with sdpa_kernel(backend):
            result = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return result.transpose(1, 2)

    picks = {"block_size": BLOCK, "num_selected": SELECTED, "backend": "triton"}
    row("causal, cuDNN", lambda: sdpa(SDPBackend.CUDNN_ATTENTION))
    row("causal, FlashAttention of torch", lambda: sdpa(SDPBackend.FLASH_ATTENTION))
    row(
        "oracle without indices", lambda: hk.oracle_attention(*inputs, **picks, select=False).output
    )
    row("oracle with indices", lambda: hk.oracle_attention(*inputs, **picks).output)
    for clustered in (True, False):
        ids = selection(sequence, groups, clustered)
        build = median_ms(
            lambda ids=ids: hk.prepare_selection(ids, heads, block_size=BLOCK, backend="triton")
        )
        lists = hk.prepare_selection(ids, heads, block_size=BLOCK, backend="triton")
        union = lists.counts.float().mean().item()
        kind = "clustered" if clustered else "random"
        print(f"  {kind} selection: lists {build:.2f} ms, mean union {union:.1f} blocks")
        row(
            f"block-sparse, {kind}, sink",
            lambda ids=ids, lists=lists: hk.block_sparse_attention(
                *inputs, ids, block_size=BLOCK, sink=sink, lists=lists, backend="triton"
            ),
        )
    row(
        f"window {WINDOW}, sink",
        lambda: hk.sliding_window_attention(*inputs, window=WINDOW, sink=sink, backend="triton"),
    )


def main() -> None:
    """Print what ran where, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence", type=int, nargs="+", default=[32768])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{time.strftime('%Y-%m-%d')}  {torch.cuda.get_device_name()}  torch {torch.__version__}  "
        f"triton {triton.__version__}  cuDNN {torch.backends.cudnn.version()}  "
        f"python {platform.python_version()}\ncommand: {' '.join(sys.argv)}"
    )
    for sequence in arguments.sequence:
        for heads, groups, head_dim, value_dim in (
            (64, 4, 128, 128),
            (64, 4, 192, 128),
            (32, 8, 128, 128),
        ):
            table(sequence, heads, groups, head_dim, value_dim)


if __name__ == "__main__":
    main()
