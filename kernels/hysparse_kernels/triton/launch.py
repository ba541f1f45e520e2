"""How the attention kernels of kernels.py are launched: tiles, memory, results.

`forward`, `query_gradient` and `key_value_gradients` take the same arguments for every mode; packed
documents come as one batch row, [1, B * S, ...].

Shapes: B batch, S queries and Sk keys of a row, HQ query heads, HKV KV groups, D query/key head
dim, DV value head dim, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import triton
from torch import Tensor

from hysparse_kernels import limits
from hysparse_kernels.accumulation import KeyValueGradients
from hysparse_kernels.arguments import DTYPE_NAMES
from hysparse_kernels.block_lists import BlockLists, TokenTile
from hysparse_kernels.documents import Pieces, cut
from hysparse_kernels.query_range import QueryRange
from hysparse_kernels.triton import kernels
from hysparse_kernels.triton.topk import Selector

_LOG2_E = 1.4426950408889634
_SHARED_MEMORY_BYTES = 200 * 2**10
"""What tiles may take of a Hopper multiprocessor's 227 KiB; the compiler needs some for itself."""


def why_not(
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    block_size: int | None = None,
) -> str | None:
    """Why these kernels cannot take such inputs, or None if they can. None means any."""
    interpreted = triton.knobs.runtime.interpret
    if device.type != "cuda" and not interpreted:
        return f"the Triton kernels need a CUDA device, the tensors are on {device.type}"
    taken = dtype is None or DTYPE_NAMES.get(dtype) in limits.DTYPES
    if not taken and not interpreted:
        return f"the Triton kernels take {' and '.join(limits.DTYPES)}, not {dtype}"
    if head_dim is not None and head_dim > limits.MAX_HEAD_DIM:
        return f"the Triton kernels take head dims up to {limits.MAX_HEAD_DIM}, not {head_dim}"
    if block_size is not None and block_size not in limits.BLOCK_SIZES:
        return f"the Triton kernels take block sizes {limits.BLOCK_SIZES}, not {block_size}"
    longest = block_size == limits.BLOCK_SIZES[-1]
    if longest and head_dim is not None and head_dim > limits.LONGEST_BLOCK_MAX_HEAD_DIM:
        return f"blocks of {block_size} keys with head dim {head_dim} do not fit into shared memory"
    return None


@dataclass(frozen=True)
class KeySchedule:
    """The keys that a kernel iterates over; see `kernels`."""

    mode: int
    keys: int
    """Keys per step of the forward and dQ kernels."""
    window: int = 0
    lists: BlockLists | None = None
    cu_seqlens: Tensor | None = None
    """Documents of the one batch row, for CAUSAL and WINDOW."""
    queries: QueryRange | None = None
    """Which positions the queries are; None for all of the row."""

    @property
    def packed(self) -> bool:
        """Whether the batch is one row of packed documents."""
        return self.cu_seqlens is not None or (self.lists is not None and self.lists.packed)

    def query_pieces(self, size: int, tokens: int, first_token: int) -> _Pieces:
        """Tiles of `size` of the queries, or their number alone where none is cut."""
        if self.queries is None or self.cu_seqlens is None:
            return self.key_pieces(size, tokens, first_token)
        offsets = self.queries.queries_from(self.cu_seqlens)
        return _Pieces.of(cut(offsets, size, tokens, first_token, self.cu_seqlens))

    def key_pieces(self, size: int, keys: int, first_key: int = 0) -> _Pieces:
        """The same of the keys."""
        if self.cu_seqlens is None:
            return _Pieces(triton.cdiv(keys, size))
        return _Pieces.of(cut(self.cu_seqlens, size, keys, first_key))

    def query_tile(self, shape: Shape) -> tuple[TokenTile, int]:
        """The token tile of the forward and dQ kernels, and how many of them share a union."""
        if self.lists is None:
            return TokenTile.of(shape.heads, 128 if shape.row_bytes <= 512 else 64), 1
        # Wide rows and long blocks leave no room for more than half of the lists' tile.
        half = shape.row_bytes > 768 or self.keys > 64 or self.lists.tile.rows > 128
        return (self.lists.part, 2) if half else (self.lists.tile, 1)

    def forward_index(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
        """starts, bits, counts and capacity of the forward index; none without."""
        if self.lists is None:
            return None, None, None, 0
        starts = self.lists.starts
        return starts, self.lists.bits, self.lists.counts, starts.shape[2]

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time names of the mode."""
        return {
            "MODE": self.mode,
            "PACKED": self.cu_seqlens is not None,
            "RANGE": self.queries is not None,
        }


class _Pieces(NamedTuple):
    number: int
    first: Tensor | None = None
    stop: Tensor | None = None
    document_first: Tensor | None = None
    """Among the keys, as document_stop."""
    document_stop: Tensor | None = None

    @property
    def table(self) -> Tensor | None:
        """int32 [number, 3]: first, document_first and stop of each; None where none is cut."""
        if self.first is None or self.document_first is None or self.stop is None:
            return None
        return torch.stack((self.first, self.document_first, self.stop), 1)

    @classmethod
    def of(cls, pieces: Pieces) -> _Pieces:
        return cls(
            len(pieces), pieces.first, pieces.stop, pieces.document_first, pieces.document_stop
        )


@dataclass(frozen=True)
class Sizes:
    """Of one call."""

    batch: int
    sequence: int
    """Queries of a row."""
    keys: int
    """Of a row."""
    query_heads: int
    groups: int
    width: int
    value_width: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Self:
        """The sizes of query [B,S,HQ,D], key [B,Sk,HKV,D] and value [B,Sk,HKV,DV]."""
        batch, sequence, query_heads, width = query.shape
        keys, groups = key.shape[1:3]
        return cls(batch, sequence, keys, query_heads, groups, width, value.shape[3])

    @property
    def heads(self) -> int:
        """Query heads per KV group."""
        return self.query_heads // self.groups


class Shape(Sizes):
    """Sizes as the portable kernels take them."""

    @property
    def rows(self) -> int:
        """B * HKV, what the kernels' second grid axis counts."""
        return self.batch * self.groups

    @property
    def row_bytes(self) -> int:
        """Shared memory of one query/key row and one value row, in 2-byte elements."""
        constants = self.constants(torch.bfloat16)
        return 2 * (constants["WIDTH"] + constants["VALUE_WIDTH"])

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """The kernels' compile-time names of these sizes."""
        return {
            "WIDTH": max(16, triton.next_power_of_2(self.width)),
            "VALUE_WIDTH": max(16, triton.next_power_of_2(self.value_width)),
            "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
        }


class Saved(NamedTuple):
    """What a backward starts from; the last dimension of all but lse is contiguous."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor
    grad: Tensor
    """Gradient of the output."""


def _stages(most: int, bytes_per_stage: int, fixed_bytes: int) -> int:
    """Software-pipeline depth, up to `most`, whose tiles fit into shared memory."""
    return max(1, min(most, (_SHARED_MEMORY_BYTES - fixed_bytes) // bytes_per_stage))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


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
    shape = Shape.of(query, key, value)
    output = query.new_empty(*query.shape[:3], shape.value_width)
    lse = query.new_empty(shape.batch, shape.query_heads, shape.sequence, dtype=torch.float32)
    tile, split = schedule.query_tile(shape)
    stages = _stages(
        3, schedule.keys * shape.row_bytes, tile.rows * (shape.row_bytes + schedule.keys)
    )

    def launch(first_token: int, tokens: int, maxima: Tensor | None, num_blocks: int = 0) -> None:
        pieces = schedule.query_pieces(tile.tokens, tokens, first_token)
        kernels.forward_kernel[(pieces.number, shape.rows)](
            query, key, value, sink, output, lse, maxima,
            *_strides(query, key, value),
            pieces.first, pieces.stop, pieces.document_first, *schedule.forward_index(),
            *QueryRange.arguments(schedule.queries),
            shape.sequence, shape.groups, schedule.window, scale * _LOG2_E,
            shape.width, shape.value_width, first_token, tokens, num_blocks,
            HAS_SINK=sink is not None, SCORES=selector is not None, **schedule.constants(),
            SPLIT=split, KEYS=schedule.keys, **tile.constants(), **shape.constants(query.dtype),
            num_warps=8 if tile.rows >= 128 else 4, num_stages=stages,
        )  # fmt: skip

    if selector is not None:
        return output, lse, selector.run(launch, tile, lse, shape.groups)
    launch(0, shape.sequence, None)
    return output, lse, None


def query_gradient(saved: Saved, schedule: KeySchedule, scale: float) -> tuple[Tensor, Tensor]:
    """dQ [B, S, HQ, D] in the query's dtype and delta [B, HQ, S] fp32, the sum of output * grad."""
    query, key, value, output, lse, grad = saved
    shape = Shape.of(query, key, value)
    d_query = query.new_empty(query.shape)
    delta = torch.empty_like(lse)
    tile, split = schedule.query_tile(shape)
    stages = _stages(
        2, schedule.keys * shape.row_bytes, tile.rows * (shape.row_bytes + 4 * schedule.keys)
    )
    pieces = schedule.query_pieces(tile.tokens, shape.sequence, 0)
    kernels.dq_kernel[(pieces.number, shape.rows)](
        query, key, value, output, grad, lse, delta, d_query,
        *_strides(query, key, value, output, grad),
        pieces.first, pieces.stop, pieces.document_first, *schedule.forward_index(),
        *_sizes(shape, schedule, scale), **schedule.constants(),
        SPLIT=split, KEYS=schedule.keys, **tile.constants(), **shape.constants(query.dtype),
        num_warps=8 if tile.rows >= 128 else 4, num_stages=stages,
    )  # fmt: skip
    return d_query, delta


def key_value_gradients(
    saved: Saved,
    delta: Tensor,
    schedule: KeySchedule,
    scale: float,
    accumulate: KeyValueGradients | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dK [B, Sk, HKV, D] and dV [B, Sk, HKV, DV] in the key's dtype.

    Without a result where they were added to `accumulate`.
    """
    query, key, value, _, lse, grad = saved
    shape = Shape.of(query, key, value)
    lists = schedule.lists
    d_key, d_value, add = gradient_buffers(key, value, accumulate, fp32=lists is not None)
    tile = TokenTile.of(shape.heads, 64) if lists is None else lists.part
    keys = 64 if lists is None else schedule.keys
    stages = _stages(2, tile.rows * shape.row_bytes, keys * (shape.row_bytes + 4 * tile.rows))
    ends: tuple[Tensor | None, ...]
    if lists is None:
        pieces = schedule.key_pieces(keys, shape.keys)
        grid: tuple[int, ...] = (pieces.number, shape.rows)
        ends = (pieces.first, pieces.stop, pieces.document_stop)
        work_items: tuple[Any, ...] = (0, *(None,) * 7)
    else:
        grid = (len(lists.work_items),)
        ends = (lists.table.first, lists.table.stop, None)
        flags = torch.zeros_like(lists.work_items.after)
        work_items = (
            len(lists.table), *lists.work_items.tensors, flags,
            lists.inverse_part, lists.inverse_bits,
        )  # fmt: skip
    kernels.dkv_kernel[grid](
        query, key, value, grad, lse, delta, d_key, d_value, *_strides(query, key, value, grad),
        *ends, *work_items, shape.keys, *_sizes(shape, schedule, scale),
        **schedule.constants(), ADDS=int(add), KEYS=keys,
        **tile.constants(), **shape.constants(query.dtype),
        num_warps=8 if keys * shape.width >= 128 * 64 else 4, num_stages=stages,
    )  # fmt: skip
    if accumulate is not None:
        return None, None
    return d_key.to(key.dtype), d_value.to(value.dtype)


def gradient_buffers(
    key: Tensor, value: Tensor, accumulate: KeyValueGradients | None, *, fp32: bool
) -> tuple[Tensor, Tensor, bool]:
    """Where dK [B, Sk, HKV, D] and dV [B, Sk, HKV, DV] go, and whether they are added to it."""
    if accumulate is not None:
        return accumulate.buffers(key, value)
    kinds = tuple(torch.float32 if fp32 else tensor.dtype for tensor in (key, value))
    return (
        torch.empty(key.shape, dtype=kinds[0], device=key.device),
        torch.empty(value.shape, dtype=kinds[1], device=value.device),
        False,
    )


def _sizes(shape: Shape, schedule: KeySchedule, scale: float) -> tuple[Any, ...]:
    """The trailing arguments of the two backward kernels."""
    return (
        *QueryRange.arguments(schedule.queries),
        shape.sequence,
        shape.groups,
        schedule.window,
        scale,
        scale * _LOG2_E,
        shape.width,
        shape.value_width,
    )
