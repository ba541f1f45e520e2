"""Launching the Hopper kernels: which inputs they take, descriptors, ring depths, grids.

They compute what the portable kernels of triton/launch.py compute, for the shapes that matter
most. Packed documents come as one batch row, [1, B * S, ...].

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim,
N blocks, K selected.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from hysparse_kernels import limits
from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.hopper.common import BLOCKS, SPAN
from hysparse_kernels.hopper.dkv import dkv_kernel
from hysparse_kernels.hopper.dq import dq_kernel
from hysparse_kernels.hopper.forward import forward_kernel
from hysparse_kernels.hopper.geometry import ROWS, Geometry, descriptor, stages
from hysparse_kernels.hopper.oracle import oracle_kernel
from hysparse_kernels.query_range import QueryRange
from hysparse_kernels.triton import kernels as portable
from hysparse_kernels.triton.launch import KeySchedule, Saved, gradient_buffers
from hysparse_kernels.triton.topk import Selector

_LOG2_E = 1.4426950408889634
_KEYS = limits.HOPPER_BLOCK_SIZE
"""Keys per step of the window and block-sparse kernels: one block."""
_ORACLE_KEYS = 128
SWITCH = "HYSPARSE_HOPPER"
"""Environment variable; 0 runs the portable kernels on Hopper GPUs too."""


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device has the instructions that these kernels are made of."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: KeySchedule,
    selector: Selector | None = None,
) -> str | None:
    """Why these kernels cannot take such a call, or None."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH} is 0"
    if not is_hopper(query.device):
        return f"they need a GPU of compute capability 9.0, the tensors are on {query.device}"
    reason = why_not_shape(query.shape[2] // key.shape[2], query.shape[3], value.shape[3])
    if reason is None and schedule.lists is not None and schedule.keys != _KEYS:
        reason = f"they take selected blocks of {_KEYS} keys, not {schedule.keys}"
    if reason is None and schedule.lists is not None and schedule.lists.part.rows != ROWS:
        reason = f"they take 4, 8, ... 64 heads per group, not {schedule.lists.part.heads}"
    if reason is None and selector is not None:
        blocks = triton.cdiv(selector.longest, selector.rule.block_size)
        if selector.rule.reduce_scores is not None:
            reason = "they do not hand out scores, which reduce_scores asks for"
        elif selector.rule.block_size not in limits.HOPPER_ORACLE_BLOCK_SIZES:
            reason = f"they select blocks of {limits.HOPPER_ORACLE_BLOCK_SIZES} keys"
        elif blocks > limits.HOPPER_ORACLE_MAX_BLOCKS:
            reason = f"they rank up to {limits.HOPPER_ORACLE_MAX_BLOCKS} blocks, not {blocks}"
    return reason


def why_not_shape(heads: int, width: int, value_width: int) -> str | None:
    """Why these kernels do not take so many heads per group and such head dims, or None."""
    if (width, value_width) not in limits.HOPPER_HEAD_DIMS:
        return f"they take head dims 64, 128 (values too) and 192/128, not {width}/{value_width}"
    if heads > limits.HOPPER_MAX_HEADS or heads & (heads - 1):
        return f"they take 1, 2, 4, ... {limits.HOPPER_MAX_HEADS} heads per group, not {heads}"
    return None


def aligned(tensor: Tensor) -> Tensor:
    """[B, S, heads, width] of 16-bit numbers such that the copy engine can fetch it.

    It wants rows that start at multiples of 16 bytes; a tensor without is copied, which takes a
    fraction of what the portable kernels would take longer.
    """
    sizes = zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    steps_fit = all(step % 8 == 0 for step, size in sizes if size > 1)
    if tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and steps_fit:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _Tiles:
    """What the forward and dQ kernels are launched over."""

    mode: int
    packed: bool
    number: int
    table: Tensor | None
    """int32 [tiles, 3] for packed documents: first token, first key of its document, one past the
    last token."""
    forward_index: tuple[Any, ...]
    """starts, bits, counts and capacity of a selection's forward_index; none without."""
    range: bool
    """Whether the queries are a range of a row's positions."""
    queries: tuple[int, int, int]
    """query_start, queries and gap, see QueryRange."""

    def constants(self) -> dict[str, Any]:
        return {"PACKED": self.packed, "RANGE": self.range}

    @classmethod
    def of(cls, schedule: KeySchedule, size: Geometry) -> _Tiles:
        place = schedule.queries is not None, QueryRange.arguments(schedule.queries)
        index = schedule.forward_index()
        if schedule.lists is not None:
            return cls(BLOCKS.value, False, schedule.lists.starts.shape[1], None, index, *place)
        pieces = schedule.query_pieces(2 * size.tokens, size.sequence, 0)
        packed = schedule.cu_seqlens is not None
        return cls(SPAN.value, packed, pieces.number, pieces.table, index, *place)


def _window(schedule: KeySchedule, size: Geometry) -> int:
    return size.keys if schedule.mode == portable.CAUSAL else min(schedule.window, size.keys)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    schedule: KeySchedule,
    scale: float,
    selector: Selector | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """output [B, S, HQ, DV], lse [B, HQ, S] fp32 and, with a selector, indices [B, HKV, S, K]."""
    size = Geometry.of(query, key, value)
    output = query.new_empty(*query.shape[:3], size.value_width)
    lse = query.new_empty(size.batch, query.shape[2], size.sequence, dtype=torch.float32)
    tiles = _Tiles.of(schedule, size)
    if schedule.mode == portable.CAUSAL:
        indices = _oracle(query, key, value, output, lse, tiles, size, scale, selector)
        return output, lse, indices
    items = tiles.number * size.batch * size.groups
    programs = min(items, _multiprocessors(query.device))
    q_stages = 1 if size.split else 2
    fixed = 2 * ROWS * 2 * (size.width * q_stages + size.own_output_width)
    forward_kernel[(programs,)](
        *size.queries(query), *size.key_tiles(key, _KEYS), size.value_tiles(value, _KEYS),
        size.rows(output, size.value_width), output, lse, sink,
        *tiles.forward_index, tiles.table,
        size.sequence, *tiles.queries, size.groups, tiles.number, items,
        size.together(tiles.number, programs), programs,
        _window(schedule, size), scale * _LOG2_E,
        MODE=tiles.mode, **tiles.constants(), **size.constants(), KEYS=_KEYS,
        STAGES=stages(4, _KEYS * size.key_bytes, fixed), Q_STAGES=q_stages,
        HAS_SINK=sink is not None, num_warps=4,
    )  # fmt: skip
    return output, lse, None


def _oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    tiles: _Tiles,
    size: Geometry,
    scale: float,
    selector: Selector | None,
) -> Tensor | None:
    """Fill output and lse; block indices if there is a selector."""
    items = tiles.number * size.batch * size.groups
    programs = min(items, _multiprocessors(query.device))
    indices, scratch, blocks, selected, block_size, forced = None, None, 1, 1, _KEYS, (0, 0)
    if selector is not None:
        rule = selector.rule
        block_size, selected = rule.block_size, rule.num_selected
        forced = (rule.forced_first_blocks, rule.forced_recent_blocks)
        blocks = triton.cdiv(selector.longest, block_size)
        shape = (size.batch, size.groups, size.sequence, selected)
        indices = torch.empty(shape, dtype=torch.int32, device=query.device)
        scratch = lse.new_empty(programs * 2 * ROWS * (blocks + 1))
    fixed = 2 * ROWS * 2 * (size.width + size.own_output_width)
    oracle_kernel[(programs,)](
        *size.queries(query),
        *size.key_tiles(key, _ORACLE_KEYS), size.value_tiles(value, _ORACLE_KEYS),
        size.rows(output, size.value_width), output, lse, indices, scratch, tiles.table,
        size.sequence, *tiles.queries, size.groups, tiles.number, items,
        size.together(tiles.number, programs), programs,
        scale * _LOG2_E, blocks, selected, *forced, **size.constants(), KEYS=_ORACLE_KEYS,
        STAGES=stages(2, _ORACLE_KEYS * size.key_bytes, fixed), **tiles.constants(),
        SCORES=selector is not None, BLOCK=block_size,
        BLOCKS=max(128, triton.next_power_of_2(blocks)),
        SELECTED=triton.next_power_of_2(selected), num_warps=4,
    )  # fmt: skip
    return indices


def gradients(
    saved: Saved,
    schedule: KeySchedule,
    scale: float,
    accumulate: KeyValueGradients | None,
    keys_too: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """dQ, dK, dV and delta [B, HKV, G, S] fp32, in other strides; no dK and dV where none are asked
    for or where they were added to `accumulate`."""
    query, key, value, output, lse, grad = saved
    grad = aligned(grad)
    size = Geometry.of(query, key, value)
    pairs = size.batch * size.groups
    # What the second kernel needs of every row, in the order in which it fetches them.
    stride = triton.cdiv(size.sequence * size.heads, 4) * 4  # the copy engine's 16 bytes
    row_lse = lse.new_empty(pairs, stride)
    row_delta = torch.empty_like(row_lse)
    d_query = query.new_empty(query.shape)
    tiles = _Tiles.of(schedule, size)
    items = tiles.number * pairs
    programs = min(items, _multiprocessors(query.device))
    q_desc, k_desc = size.queries(query), size.key_tiles(key, _KEYS)
    g_desc, v_desc = size.rows(grad, size.value_width), size.value_tiles(value, _KEYS)
    q_stages = 1 if size.split else 2
    dq_kernel[(programs,)](
        *q_desc, g_desc, *k_desc, v_desc, *size.queries(d_query),
        output, grad, *grad.stride()[:3], lse, row_lse, row_delta, stride, d_query,
        *tiles.forward_index, tiles.table,
        size.sequence, *tiles.queries, size.groups, tiles.number, items,
        size.together(tiles.number, programs), programs,
        _window(schedule, size), scale, scale * _LOG2_E,
        MODE=tiles.mode, **tiles.constants(), **size.constants(), KEYS=_KEYS,
        STAGES=stages(4, _KEYS * size.key_bytes, 2 * ROWS * size.key_bytes * q_stages),
        Q_STAGES=q_stages, num_warps=4,
    )  # fmt: skip
    delta = row_delta.as_strided(
        (size.batch, size.groups, size.heads, size.sequence),
        (size.groups * stride, stride, 1, size.heads),
    )
    row_lse, row_delta = (rows[:, : size.sequence * size.heads] for rows in (row_lse, row_delta))
    if not keys_too:
        return d_query, None, None, delta

    lists, packed = schedule.lists, schedule.cu_seqlens is not None
    # Of selected blocks several programs add to one sum.
    d_key, d_value, add = gradient_buffers(key, value, accumulate, fp32=lists is not None)
    blocks = triton.cdiv(size.keys, _KEYS)
    work = blocks * pairs
    block_table: tuple[Tensor | None, ...] = (None, None, None)
    work_items: tuple[Tensor | None, ...] = (None,) * 6
    flags = None
    if lists is not None:
        blocks, work, packed = len(lists.table), len(lists.work_items), lists.packed
        block_table = (lists.table.first, lists.table.stop, None)
        work_items = (*lists.work_items.tensors, lists.inverse_part, lists.inverse_bits)
        flags = torch.zeros_like(lists.work_items.after)
    elif schedule.cu_seqlens is not None:
        pieces = schedule.key_pieces(_KEYS, size.keys)
        blocks, block_table = pieces.number, (pieces.first, pieces.stop, pieces.document_stop)
        work = blocks * pairs
    dkv_kernel[(work,)](
        *q_desc, g_desc, *k_desc, v_desc,
        descriptor(row_lse, (1, ROWS)), descriptor(row_delta, (1, ROWS)),
        d_key, d_value, flags, *block_table, *work_items,
        _window(schedule, size), size.keys, *tiles.queries, size.groups, blocks,
        scale, scale * _LOG2_E,
        int(add), MODE=tiles.mode, PACKED=packed, RANGE=tiles.range, **size.constants(),
        KEYS=_KEYS, STAGES=4, ROWS=32 if size.split else 64, num_warps=4,
    )  # fmt: skip
    if accumulate is not None:
        return d_query, None, None, delta
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), delta
