"""Attention on a GPU with autograd: which kernels run a forward and its backward.

Those of hopper/ where they take the call, those of triton/ elsewhere, and cuDNN's for causal
attention where it is faster; reference/attention.py specifies what they compute.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim,
N = ceil(S / block_size) blocks, K selected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.build_lists import build_block_lists
from hysparse_kernels.call import AttentionCall, CausalKeys, OracleOutput, SelectedKeys, WindowKeys
from hysparse_kernels.hopper import launch as hopper
from hysparse_kernels.triton import kernels
from hysparse_kernels.triton.launch import (
    KeySchedule,
    Saved,
    forward,
    key_value_gradients,
    query_gradient,
)
from hysparse_kernels.triton.sink import sink_gradient
from hysparse_kernels.triton.topk import Selector


def attend(call: AttentionCall) -> OracleOutput:
    """The attention of a call and, of causal keys, the blocks that every query selects."""
    query, key, queries = call.query, call.key, call.queries
    selector = None
    match call.keys:
        case CausalKeys(rule, select):
            if select:
                last = call.query_start + query.shape[1]
                selector = Selector(rule, last, call.cu_seqlens, queries)
            size = rule.block_size if select else 64
            schedule = KeySchedule(
                kernels.CAUSAL, keys=size, cu_seqlens=call.cu_seqlens, queries=queries
            )
        case SelectedKeys(indices, size, lists):
            if lists is None:
                heads = query.shape[2] // key.shape[2]
                lists = build_block_lists(indices, heads, size, call.cu_seqlens, queries)
            schedule = KeySchedule(kernels.BLOCKS, keys=size, lists=lists, queries=queries)
        case WindowKeys(window):
            schedule = KeySchedule(
                kernels.WINDOW, keys=32, window=window, cu_seqlens=call.cu_seqlens, queries=queries
            )
    return _attend(call, schedule, selector)


def _attend(call: AttentionCall, schedule: KeySchedule, selector: Selector | None) -> OracleOutput:
    query, key, value = call.query, call.key, call.value
    batch, sequence = query.shape[:2]
    one_row = batch > 1 and schedule.packed
    if one_row:
        query, key, value = (tensor.flatten(0, 1).unsqueeze(0) for tensor in (query, key, value))
    output, lse, indices = _Attention.apply(
        query, key, value, call.sink, schedule, call.scale, selector, call.accumulate
    )
    if not one_row:
        return OracleOutput(output, lse, indices)
    lse = lse.unflatten(2, (batch, sequence)).squeeze(0).transpose(0, 1).contiguous()
    if indices is not None:
        indices = indices.unflatten(2, (batch, sequence)).squeeze(0).transpose(0, 1).contiguous()
    return OracleOutput(output.unflatten(1, (batch, sequence)).squeeze(0), lse, indices)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Attention(torch.autograd.Function):
    """(output, lse, indices or None) of one schedule; first order only, as `reference`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        schedule: KeySchedule,
        scale: float,
        selector: Selector | None,
        accumulate: KeyValueGradients | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        query, key, value = (_unit_stride(tensor) for tensor in (query, key, value))
        by_cudnn = _cudnn_is_faster(query, key, value, schedule, selector)
        ctx.hopper = not by_cudnn and hopper.why_not(query, key, value, schedule, selector) is None
        if ctx.hopper:
            query, key, value = (hopper.aligned(tensor) for tensor in (query, key, value))
        if by_cudnn:
            output, lse, indices = _cudnn_forward(query, key, value, scale)
        else:
            run = hopper.forward if ctx.hopper else forward
            output, lse, indices = run(query, key, value, sink, schedule, scale, selector)
        ctx.mark_non_differentiable(*([lse] if indices is None else [lse, indices]))
        ctx.save_for_backward(query, key, value, sink, output, lse)
        ctx.schedule, ctx.scale, ctx.accumulate = schedule, scale, accumulate
        return output, lse, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
        query, key, value, sink, output, lse = ctx.saved_tensors
        schedule, scale = ctx.schedule, ctx.scale
        grad = _unit_stride(grad)
        saved = Saved(query, key, value, output, lse, grad)
        d_key = d_value = None
        keys_too = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if _cudnn_knows(schedule) and _cudnn_takes(query, value):
            start = 0 if schedule.queries is None else schedule.queries.start
            gradients = _cudnn_gradients(saved, scale, start, ctx.accumulate, keys_too)
            return *gradients, *[None] * 5
        if ctx.hopper:
            d_query, d_key, d_value, delta = hopper.gradients(
                saved, schedule, scale, ctx.accumulate, keys_too
            )
        else:
            d_query, delta = query_gradient(saved, schedule, scale)
            delta = delta.unflatten(1, (key.shape[2], -1))
            if keys_too:
                d_key, d_value = key_value_gradients(saved, delta, schedule, scale, ctx.accumulate)
        d_sink = None if sink is None else sink_gradient(sink, lse, delta)
        return d_query, d_key, d_value, d_sink, *[None] * 4


def _cudnn_knows(schedule: KeySchedule) -> bool:
    """Whether this is causal attention without documents, which is all that cuDNN knows."""
    return schedule.mode == kernels.CAUSAL and not schedule.packed


def _cudnn_takes(query: Tensor, value: Tensor) -> bool:
    """Whether cuDNN's backward of causal attention can run; it is the fastest one there is."""
    return (
        query.is_cuda
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
        and query.shape[1] > 1  # a square, or a rectangle before it, of one token is refused
        and query.shape[-1] % 8 == value.shape[-1] % 8 == 0
        and value.shape[-1] <= 128
        and query.shape[-1] <= 192
    )


_LONG = 8192
"""Tokens from which on our forward pass is at least as fast as cuDNN's, given `_MANY_HEADS`."""
_MANY_HEADS = 16


def _cudnn_is_faster(
    query: Tensor, key: Tensor, value: Tensor, schedule: KeySchedule, selector: Selector | None
) -> bool:
    """Whether this is causal attention that cuDNN's forward pass can run and beats ours at.

    It makes no selection. Measured on one H100, ours / cuDNN's time at 2,048, 4,096, 8,192, 16,384
    and 32,768 tokens: 64 heads in 4 groups 1.28 1.07 0.97 0.89 0.92, 32 in 8 groups 1.52 1.40 1.33
    1.05 0.96, 32 in 32 groups 2.0 0.93 0.91 1.07 0.93, 64 in 4 of 192/128 1.14 0.97 0.94 0.83 0.84.
    """
    if selector is not None or schedule.queries is not None:
        return False
    if not _cudnn_knows(schedule) or not _cudnn_takes(query, value):
        return False
    many_heads = query.shape[2] // key.shape[2] >= _MANY_HEADS
    return not (many_heads and query.shape[1] >= _LONG)


def _cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, None]:
    """Output [B, S, HQ, DV] and lse [B, HQ, S], fp32; no selection."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, False, scale=scale
    )
    return output.transpose(1, 2), lse.squeeze(-1), None


def _cudnn_gradients(
    saved: Saved, scale: float, start: int, accumulate: KeyValueGradients | None, keys_too: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key and value; none of key and value where `accumulate` gets them or
    where none are asked for.

    Causal attention to cuDNN is a square. Of queries from position `start` on it is one behind a
    rectangle of keys that all of them see; the gradients of the two parts, which share output and
    lse, add up.
    """
    key, value = saved.key, saved.value
    queries = saved.query.shape[1]
    square = slice(start, start + queries)
    d_query, d_key, d_value = _cudnn_backward(saved, square, scale, causal=True)
    parts = [(square, (d_key, d_value))]
    if start > 0:
        before = slice(0, start)
        d_before, *d_rectangle = _cudnn_backward(saved, before, scale, causal=False)
        d_query = d_query + d_before
        parts.append((before, (d_rectangle[0], d_rectangle[1])))
    if not keys_too:
        return d_query, None, None
    if key.shape[1] == queries:
        if accumulate is None:
            return d_query, d_key, d_value
        accumulate.add(d_key, d_value)
        return d_query, None, None
    if accumulate is None:
        sums = (key.new_zeros(key.shape), value.new_zeros(value.shape))
    else:
        key_sum, value_sum, add = accumulate.buffers(key, value)
        sums = (key_sum, value_sum) if add else (key_sum.zero_(), value_sum.zero_())
    for keys, gradients in parts:
        for total, gradient in zip(sums, gradients, strict=True):
            total[:, keys] += gradient
    return d_query, *(sums if accumulate is None else (None, None))


def _cudnn_backward(
    saved: Saved, keys: slice, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query and of some keys and values, given output and lse of all that was seen."""
    lse = saved.lse.unsqueeze(-1)
    key, value = saved.key[:, keys].transpose(1, 2), saved.value[:, keys].transpose(1, 2)
    grad, query, output = (
        tensor.transpose(1, 2) for tensor in (saved.grad, saved.query, saved.output)
    )
    # Dropout is off, so that its random state is not used.
    random_state = torch.zeros((), dtype=torch.int64, device=query.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, output, lse, random_state, random_state,
        None, None, None, query.shape[2], key.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    d_query, d_key, d_value = (gradient.transpose(1, 2) for gradient in gradients)
    return d_query, d_key, d_value
