"""Every implementation that is timed, ours and others', behind one form.

A peer is made for some inputs, which may take long and is never timed, and is then a call that
returns the output. Shapes: see `problem`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hysparse_kernels as hk
import torch
import torch.nn.functional as F
from hysparse_kernels.benchmarking.problem import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import fla_peer

Call = Callable[[], Any]
"""Returns the output, or a tuple that starts with it."""


class Refused(RuntimeError):
    """The peer cannot do this problem here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One implementation of one operation."""

    name: str
    """Key in results and ratios."""
    label: str
    make: Callable[[Inputs], Call]
    """May raise Refused, or any RuntimeError that the implementation itself raises."""
    has_sink: bool = False


def _sdpa(backend: SDPBackend) -> Callable[[Inputs], Call]:
    def make(inputs: Inputs) -> Call:
        if not inputs.query.is_cuda:
            raise Refused("needs a CUDA device")

        def call() -> Tensor:
            query, key, value = (tensor.transpose(1, 2) for tensor in inputs.leaves)
            with sdpa_kernel(backend):
                result = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )
            return result.transpose(1, 2)

        return call

    return make


def _sdpa_on_cpu(inputs: Inputs) -> Call:
    if inputs.query.is_cuda:
        raise Refused("timed on CPU only")

    def call() -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in inputs.leaves)
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return result.transpose(1, 2)

    return call


def _oracle(select: bool) -> Callable[[Inputs], Call]:
    def make(inputs: Inputs) -> Call:
        problem = inputs.problem
        return lambda: hk.oracle_attention(
            *inputs.leaves,
            block_size=problem.block_size,
            num_selected=problem.num_selected,
            select=select,
            backend=inputs.backend,
        )

    return make


def _block_sparse(inputs: Inputs) -> Call:
    problem = inputs.problem
    assert inputs.indices is not None
    indices = inputs.indices
    lists = hk.prepare_selection(
        indices, problem.heads, block_size=problem.block_size, backend=inputs.backend
    )
    return lambda: hk.block_sparse_attention(
        *inputs.leaves,
        indices,
        block_size=problem.block_size,
        sink=inputs.sink,
        lists=lists,
        backend=inputs.backend,
    )


def _fla(inputs: Inputs) -> Call:
    assert inputs.indices is not None
    reason = fla_peer.why_not(inputs.problem, inputs.query.device)
    if reason is not None:
        raise Refused(reason)
    return fla_peer.make(*inputs.leaves, inputs.indices, inputs.problem)


def _window(inputs: Inputs) -> Call:
    return lambda: hk.sliding_window_attention(
        *inputs.leaves, window=inputs.problem.window, sink=inputs.sink, backend=inputs.backend
    )


def _flex(inputs: Inputs) -> Call:
    """FlexAttention of torch: compiled on CUDA, as its users run it, and eager elsewhere."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    problem, device = inputs.problem, inputs.query.device
    window = problem.window

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    size = (None, None, problem.sequence, problem.sequence)
    compiled = device.type == "cuda"
    if compiled:
        torch.compiler.reset()  # or it stops compiling after a few problem sizes
    # Uncompiled, the mask is made in full first: 17 GB at 128k tokens.
    mask = create_block_mask(visible, *size, device=device, _compile=compiled)
    attend: Callable[..., Any] = flex_attention
    if compiled:
        # Its backward is timed again and again on the buffers of one forward.
        torch._functorch.config.donated_buffer = False
        attend = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in inputs.leaves)
        return attend(query, key, value, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return call


ORACLE = (
    Peer("cudnn", "cuDNN, no indices", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("flash", "FlashAttention of torch, no indices", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("sdpa", "SDPA of torch on CPU, no indices", _sdpa_on_cpu),
    Peer("no_indices", "hysparse oracle, no indices", _oracle(select=False)),
    Peer("hysparse", "hysparse oracle, lse and indices", _oracle(select=True)),
)
SPARSE = (
    Peer("fla", "fla-core NSA selected branch, no sink", _fla),
    Peer("hysparse", "hysparse block-sparse, sink", _block_sparse, has_sink=True),
)
WINDOW = (
    Peer("flex", "FlexAttention, no sink", _flex),
    Peer("hysparse", "hysparse window, sink", _window, has_sink=True),
)
OTHERS = ("cudnn", "flash", "sdpa", "fla", "flex", "torch")
"""Names of the peers that are not ours."""
BY_TABLE = {"oracle": ORACLE, "sparse": SPARSE, "window": WINDOW}


def output_of(result: Any) -> Tensor:
    """The output [B, S, HQ, DV] in what a call returned."""
    return result if isinstance(result, Tensor) else result[0]
