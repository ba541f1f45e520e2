"""The gradient of the sinks on Triton: a program adds up the rows of a head, always in one order.

Shapes: B batch, S queries of a row, HQ query heads in HKV KV groups, G = HQ / HKV.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 1024


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Of sink [HQ], in its dtype; lse [B, HQ, S] and delta [B, HKV, G, S], any strides, fp32.

    Each row's loss falls by delta times the share of its softmax that the sink takes.
    """
    gradient = torch.empty_like(sink)
    batch, groups, heads, sequence = delta.shape
    _sink_kernel[(groups * heads,)](
        sink, lse, delta, gradient, *delta.stride(), batch, heads, sequence, ROWS=_ROWS
    )
    return gradient


@triton.jit(do_not_specialize=["d_b", "d_g", "d_h", "d_s", "batch", "heads", "sequence"])
def _sink_kernel(
    sink, lse, delta, gradient, d_b, d_g, d_h, d_s, batch, heads, sequence, ROWS: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    logit = tl.load(sink + head).to(tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, batch * sequence, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < batch * sequence
        b, s = row // sequence, row % sequence
        place = (b * tl.num_programs(0) + head) * sequence + s
        row_lse = tl.load(lse + place, mask=valid, other=float("-inf"))
        place = b * d_b + (head // heads) * d_g + (head % heads) * d_h + s * d_s
        row_delta = tl.load(delta + place, mask=valid, other=0.0)
        # Rows that see nothing have no softmax, not even the sink's.
        seen = row_lse != float("-inf")
        total += tl.where(seen, tl.exp(logit - tl.where(seen, row_lse, 0.0)) * row_delta, 0.0)
    tl.store(gradient + head, (-tl.sum(total)).to(gradient.dtype.element_ty))
