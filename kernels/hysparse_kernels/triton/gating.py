"""The gated sum on Triton: both branches are read once and nothing of their size is kept in fp32.

Shapes: B batch, S sequence, HQ query heads, DV value head dim; a row is one token and head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


def gated_sum(first: Tensor, second: Tensor, first_gate: Tensor, second_gate: Tensor) -> Tensor:
    """See `gating`; arguments are checked there."""
    return _GatedSum.apply(first, second, first_gate, second_gate)


@triton.jit
def _rows(rows, heads, sequence, ROWS: tl.constexpr):
    """Row numbers of a program, their batch, token and head, and which exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    position = row // heads
    return row, position // sequence, position % sequence, row % heads, row < rows


@triton.jit
def _gate(pointer, b, s, h, d, batch, token, head, column, valid, wide, PER_HEAD: tl.constexpr):
    """Sigmoid of the gate logits: [ROWS, 1] or [ROWS, WIDTH], fp32."""
    base = pointer + batch * b + token * s + head * h
    if PER_HEAD:
        logits = tl.load(base, mask=valid, other=0.0)[:, None]
    else:
        logits = tl.load(base[:, None] + column[None, :] * d, mask=wide, other=0.0)
    return tl.sigmoid(logits.to(tl.float32))


@triton.jit
def _forward(
    first, second, first_gate, second_gate, output,
    a_b, a_s, a_h, a_d, c_b, c_s, c_h, c_d, rows, heads, sequence, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    row, batch, token, head, valid = _rows(rows, heads, sequence, ROWS)
    column = tl.arange(0, WIDTH)
    wide = valid[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    a = _gate(first_gate, a_b, a_s, a_h, a_d, batch, token, head, column, valid, wide, PER_HEAD)
    c = _gate(second_gate, c_b, c_s, c_h, c_d, batch, token, head, column, valid, wide, PER_HEAD)
    x = tl.load(first + place, mask=wide, other=0.0).to(tl.float32)
    y = tl.load(second + place, mask=wide, other=0.0).to(tl.float32)
    tl.store(output + place, (a * x + c * y).to(output.dtype.element_ty), mask=wide)


@triton.jit
def _backward(
    first, second, first_gate, second_gate, grad, d_first, d_second, d_first_gate, d_second_gate,
    a_b, a_s, a_h, a_d, c_b, c_s, c_h, c_d, g_b, g_s, g_h, g_d, rows, heads, sequence, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    row, batch, token, head, valid = _rows(rows, heads, sequence, ROWS)
    column = tl.arange(0, WIDTH)
    wide = valid[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    a = _gate(first_gate, a_b, a_s, a_h, a_d, batch, token, head, column, valid, wide, PER_HEAD)
    c = _gate(second_gate, c_b, c_s, c_h, c_d, batch, token, head, column, valid, wide, PER_HEAD)
    x = tl.load(first + place, mask=wide, other=0.0).to(tl.float32)
    y = tl.load(second + place, mask=wide, other=0.0).to(tl.float32)
    where = (batch * g_b + token * g_s + head * g_h)[:, None] + column[None, :] * g_d
    g = tl.load(grad + where, mask=wide, other=0.0).to(tl.float32)
    tl.store(d_first + place, (a * g).to(d_first.dtype.element_ty), mask=wide)
    tl.store(d_second + place, (c * g).to(d_second.dtype.element_ty), mask=wide)
    if PER_HEAD:
        pull = tl.sum(x * g, 1)[:, None] * a * (1.0 - a)
        tl.store(d_first_gate + row[:, None], pull.to(d_first_gate.dtype.element_ty),
                 mask=valid[:, None])  # fmt: skip
        pull = tl.sum(y * g, 1)[:, None] * c * (1.0 - c)
        tl.store(d_second_gate + row[:, None], pull.to(d_second_gate.dtype.element_ty),
                 mask=valid[:, None])  # fmt: skip
    else:
        pull = x * g * a * (1.0 - a)
        tl.store(d_first_gate + place, pull.to(d_first_gate.dtype.element_ty), mask=wide)
        pull = y * g * c * (1.0 - c)
        tl.store(d_second_gate + place, pull.to(d_second_gate.dtype.element_ty), mask=wide)


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, first_gate: Tensor, second_gate: Tensor
    ) -> Tensor:
        first, second = first.contiguous(), second.contiguous()
        ctx.save_for_backward(first, second, first_gate, second_gate)
        output = torch.empty_like(first)
        sizes, constants = _sizes(first, first_gate)
        _forward[(triton.cdiv(sizes[0], _ROWS),)](
            first, second, first_gate, second_gate, output,
            *first_gate.stride(), *second_gate.stride(), *sizes, **constants,
        )  # fmt: skip
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, second, first_gate, second_gate = ctx.saved_tensors
        sizes, constants = _sizes(first, first_gate)
        results = (
            torch.empty_like(first),
            torch.empty_like(second),
            first_gate.new_empty(first_gate.shape),
            second_gate.new_empty(second_gate.shape),
        )
        _backward[(triton.cdiv(sizes[0], _ROWS),)](
            first, second, first_gate, second_gate, grad, *results,
            *first_gate.stride(), *second_gate.stride(), *grad.stride(), *sizes, **constants,
        )  # fmt: skip
        return results


def _sizes(first: Tensor, gate: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    batch, sequence, heads, width = first.shape
    constants = {
        "ROWS": _ROWS,
        "WIDTH": triton.next_power_of_2(width),
        "PER_HEAD": gate.shape[-1] == 1,
    }
    return (batch * sequence * heads, heads, sequence, width), constants
