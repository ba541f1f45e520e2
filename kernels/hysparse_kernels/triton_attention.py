"""The operations on Triton kernels, with autograd; `reference` specifies what they mean.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim,
N = ceil(S / block_size) blocks, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hysparse_kernels import triton_kernels as kernels
from hysparse_kernels._reference_selection import ReduceScores
from hysparse_kernels.block_lists import BlockLists, TokenTile, build_block_lists
from hysparse_kernels.reference import OracleOutput

_LOG2_E = 1.4426950408889634
_SCRATCH_BYTES = 256 * 2**20
"""Most memory for the raw block maxima of the oracle; long sequences take several launches."""
_SHARED_MEMORY_BYTES = 200 * 2**10
"""What tiles may take of a Hopper multiprocessor's 227 KiB; the compiler needs some for itself."""
_MAX_HEAD_DIM = 256
_BLOCK_SIZES = (16, 32, 64, 128)


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
    if dtype not in (None, torch.bfloat16, torch.float16) and not interpreted:
        return f"the Triton kernels take bf16 and fp16, not {dtype}"
    if head_dim is not None and head_dim > _MAX_HEAD_DIM:
        return f"the Triton kernels take head dims up to {_MAX_HEAD_DIM}, not {head_dim}"
    if block_size is not None and block_size not in _BLOCK_SIZES:
        return f"the Triton kernels take block sizes {_BLOCK_SIZES}, not {block_size}"
    if block_size == 128 and head_dim is not None and head_dim > 128:
        return f"blocks of 128 keys with head dim {head_dim} do not fit into shared memory"
    return None


def _stages(most: int, bytes_per_stage: int, fixed_bytes: int) -> int:
    """Software-pipeline depth, up to `most`, whose tiles fit into shared memory."""
    return max(1, min(most, (_SHARED_MEMORY_BYTES - fixed_bytes) // bytes_per_stage))


def oracle_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    num_selected: int,
    softmax_scale: float | None = None,
    reduce_scores: ReduceScores | None = None,
    forced_first_blocks: int = 0,
    forced_recent_blocks: int = 0,
    select: bool = True,
) -> OracleOutput:
    """Causal attention and the blocks every query selects (P1 Eq. 3); see `reference`."""
    selector = None
    if select:
        selector = _Selector(
            num_selected, block_size, reduce_scores, forced_first_blocks, forced_recent_blocks
        )
    walk = _Walk(kernels.CAUSAL, keys=block_size if select else 64, selector=selector)
    output, lse, indices = _Attention.apply(
        query, key, value, None, walk, _scale(query, softmax_scale)
    )
    return OracleOutput(output, lse, indices)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    lists: BlockLists | None = None,
) -> Tensor:
    """Attention over the selected blocks (P1 Eq. 6-7); `lists` saves building them again."""
    if lists is None:
        lists = build_block_lists(block_indices, query.shape[2] // key.shape[2], block_size)
    walk = _Walk(kernels.BLOCKS, keys=block_size, lists=lists)
    return _Attention.apply(query, key, value, sink, walk, _scale(query, softmax_scale))[0]


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention over the last `window` tokens (P1 Eq. 5)."""
    walk = _Walk(kernels.WINDOW, keys=32, window=window)
    return _Attention.apply(query, key, value, sink, walk, _scale(query, softmax_scale))[0]


def _scale(query: Tensor, softmax_scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


@dataclass(frozen=True)
class _Walk:
    """What a kernel walks over; see `triton_kernels`."""

    mode: int
    keys: int
    """Keys per step of the forward and dQ kernels."""
    window: int = 0
    lists: BlockLists | None = None
    selector: _Selector | None = None

    def tile(self, heads: int, rows: int) -> TokenTile:
        """The token tile: free to choose, except that lists are made for one."""
        return TokenTile.of(heads, rows) if self.lists is None else self.lists.tile

    def list_arguments(self, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """ids, bits, counts and capacity of the unions, or stand-ins."""
        if self.lists is None:
            return unused, unused, unused, 0
        return self.lists.ids, self.lists.bits, self.lists.counts, self.lists.ids.shape[2]


@dataclass(frozen=True)
class _Shape:
    """Sizes of one call."""

    batch: int
    sequence: int
    query_heads: int
    groups: int
    width: int
    value_width: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> _Shape:
        batch, sequence, query_heads, width = query.shape
        return cls(batch, sequence, query_heads, key.shape[2], width, value.shape[3])

    @property
    def heads(self) -> int:
        """Query heads per KV group."""
        return self.query_heads // self.groups

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


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


class _Attention(torch.autograd.Function):
    """(output, lse, indices or None) of one walk; first order only, as `reference`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        walk: _Walk,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        query, key, value = (_unit_stride(tensor) for tensor in (query, key, value))
        shape = _Shape.of(query, key, value)
        output = query.new_empty(*query.shape[:3], shape.value_width)
        lse = query.new_empty(shape.batch, shape.query_heads, shape.sequence, dtype=torch.float32)
        tile = walk.tile(shape.heads, 128 if shape.row_bytes <= 512 else 64)
        tiles = triton.cdiv(shape.sequence, tile.tokens)
        num_blocks = triton.cdiv(shape.sequence, walk.keys)

        stages = _stages(3, walk.keys * shape.row_bytes, tile.rows * (shape.row_bytes + walk.keys))

        def launch(first: int, last: int, maxima: Tensor) -> None:
            kernels.forward_kernel[(last - first, shape.batch * shape.groups)](
                query, key, value, lse if sink is None else sink, output, lse, maxima,
                *_strides(query, key, value), *walk.list_arguments(lse),
                shape.sequence, shape.groups, walk.window, scale * _LOG2_E,
                shape.width, shape.value_width, first, last, num_blocks,
                MODE=walk.mode, HAS_SINK=sink is not None, SCORES=walk.selector is not None,
                KEYS=walk.keys, **tile.constants(), **shape.constants(query.dtype),
                num_warps=8 if tile.rows >= 128 else 4, num_stages=stages,
            )  # fmt: skip

        indices = None
        if walk.selector is None:
            launch(0, tiles, lse)
        else:
            indices = walk.selector.run(launch, tile, num_blocks, lse, shape)
            ctx.mark_non_differentiable(indices)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(query, key, value, sink, output, lse)
        ctx.walk, ctx.scale = walk, scale
        return output, lse, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
        query, key, value, sink, output, lse = ctx.saved_tensors
        shape = _Shape.of(query, key, value)
        grad = _unit_stride(grad)
        if ctx.walk.mode == kernels.CAUSAL and _cudnn_takes(query, value):
            return *_cudnn_backward(grad, query, key, value, output, lse, ctx.scale), *[None] * 3
        delta = torch.empty_like(lse)
        constants = shape.constants(query.dtype)
        kernels.delta_kernel[(triton.cdiv(shape.sequence, 64), shape.batch * shape.query_heads)](
            output, grad, delta, *_strides(grad), shape.sequence, shape.query_heads,
            shape.value_width, ROWS=64, VALUE_WIDTH=constants["VALUE_WIDTH"],
        )  # fmt: skip
        inputs = (query, key, value, grad, lse, delta)
        d_query = _query_gradient(inputs, shape, ctx.walk, ctx.scale)
        d_key, d_value = _key_value_gradients(inputs, shape, ctx.walk, ctx.scale)
        d_sink = None
        if sink is not None:
            # The sink's softmax weight; rows that see nothing (lse = -inf) have no sink weight.
            weight = torch.exp(sink.float()[None, :, None] - lse)
            weight = torch.where(torch.isinf(lse), 0.0, weight)
            d_sink = -(weight * delta).sum((0, 2)).to(sink.dtype)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sink, None, None


def _cudnn_takes(query: Tensor, value: Tensor) -> bool:
    """Whether cuDNN's backward of causal attention can run; it is the fastest one there is."""
    return (
        query.is_cuda
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
        and query.shape[-1] % 8 == value.shape[-1] % 8 == 0
        and value.shape[-1] <= 128
        and query.shape[-1] <= 192
    )


def _cudnn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; any flash backward will do, given output and lse."""
    grad, query, key, value, output = (
        tensor.transpose(1, 2) for tensor in (grad, query, key, value, output)
    )
    # Dropout is off, so that its random state is not used.
    random_state = torch.zeros((), dtype=torch.int64, device=query.device)
    length = query.shape[2]
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, output, lse.unsqueeze(-1), random_state, random_state,
        None, None, None, length, length, 0.0, True, scale=scale,
    )  # fmt: skip
    d_query, d_key, d_value = (gradient.transpose(1, 2) for gradient in gradients)
    return d_query, d_key, d_value


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _sizes(shape: _Shape, walk: _Walk, scale: float) -> tuple[Any, ...]:
    """The trailing arguments of the two backward kernels."""
    return (
        shape.sequence,
        shape.groups,
        walk.window,
        scale,
        scale * _LOG2_E,
        shape.width,
        shape.value_width,
    )


def _query_gradient(inputs: _Inputs, shape: _Shape, walk: _Walk, scale: float) -> Tensor:
    query, key, value, grad, lse, _ = inputs
    d_query = query.new_empty(query.shape)
    tile = walk.tile(shape.heads, 128 if shape.row_bytes <= 512 else 64)
    stages = _stages(2, walk.keys * shape.row_bytes, tile.rows * (shape.row_bytes + 4 * walk.keys))
    grid = (triton.cdiv(shape.sequence, tile.tokens), shape.batch * shape.groups)
    kernels.dq_kernel[grid](
        *inputs, d_query, *_strides(query, key, value, grad), *walk.list_arguments(lse),
        *_sizes(shape, walk, scale), MODE=walk.mode, KEYS=walk.keys,
        **tile.constants(), **shape.constants(query.dtype),
        num_warps=8 if tile.rows >= 128 else 4, num_stages=stages,
    )  # fmt: skip
    return d_query


def _key_value_gradients(
    inputs: _Inputs, shape: _Shape, walk: _Walk, scale: float
) -> tuple[Tensor, Tensor]:
    """fp32 [B, S, HKV, D] and [B, S, HKV, DV]."""
    query, key, value, grad, lse, _ = inputs
    tile = walk.tile(shape.heads, 64)
    keys = walk.keys if walk.lists is not None else 64
    constants = shape.constants(query.dtype)
    groups = shape.batch * shape.groups
    widths = (shape.width, shape.value_width)
    results = tuple(
        query.new_empty(groups, shape.sequence, width, dtype=torch.float32) for width in widths
    )
    strides = _strides(query, key, value, grad)
    blocks = triton.cdiv(shape.sequence, keys)

    stages = _stages(2, tile.rows * shape.row_bytes, keys * (shape.row_bytes + 4 * tile.rows))

    def launch(grid: tuple[int, ...], into: tuple[Tensor, ...], lists: tuple[Tensor, ...]) -> None:
        kernels.dkv_kernel[grid](
            *inputs, *into, *strides, *lists, *_sizes(shape, walk, scale),
            MODE=walk.mode, KEYS=keys, **tile.constants(), **constants,
            num_warps=8 if keys * shape.width >= 128 * 64 else 4, num_stages=stages,
        )  # fmt: skip

    lists = walk.lists
    if lists is None:
        launch((blocks, groups), results, (lse,) * 5)
    else:
        chunks = lists.chunk_block.numel()
        partials = tuple(
            query.new_empty(chunks, keys, width, dtype=torch.float32) for width in widths
        )
        readers = (lists.chunk_block, lists.chunk_first, lists.chunk_stop)
        launch((chunks,), partials, (*readers, lists.reader_tile, lists.reader_bits))
        names = ("WIDTH", "VALUE_WIDTH")
        for partial, result, width, name in zip(partials, results, widths, names, strict=True):
            kernels.sum_chunks_kernel[(blocks, groups)](
                partial, result, lists.first_chunk, shape.sequence, blocks, width,
                KEYS=keys, WIDTH=constants[name],
            )  # fmt: skip
    d_key, d_value = (
        result.view(shape.batch, shape.groups, shape.sequence, -1).transpose(1, 2)
        for result in results
    )
    return d_key, d_value


@dataclass(frozen=True)
class _Selector:
    """Turns the raw block maxima of the oracle's forward kernel into block indices."""

    num_selected: int
    block_size: int
    reduce_scores: ReduceScores | None
    forced_first_blocks: int
    forced_recent_blocks: int

    def run(self, launch: Any, tile: TokenTile, blocks: int, lse: Tensor, shape: _Shape) -> Tensor:
        """Indices int32 [B, HKV, S, K]; `launch(first, last, maxima)` runs part of the forward."""
        groups = shape.batch * shape.groups
        tiles = triton.cdiv(shape.sequence, tile.tokens)
        step = max(1, min(tiles, _SCRATCH_BYTES // (groups * blocks * tile.rows * 4)))
        maxima = lse.new_empty(groups, step, blocks, tile.rows)
        scores = lse.new_empty(groups * step * tile.tokens * blocks)
        indices = torch.empty(
            shape.batch, shape.groups, shape.sequence, self.num_selected,
            dtype=torch.int32, device=lse.device,
        )  # fmt: skip
        for first in range(0, tiles, step):
            last = min(first + step, tiles)
            launch(first, last, maxima)
            first_token = first * tile.tokens
            tokens = min(last * tile.tokens, shape.sequence) - first_token
            part = scores[: groups * tokens * blocks]
            kernels.group_scores_kernel[(last - first, groups, triton.cdiv(blocks, 32))](
                maxima, lse, part, shape.sequence, shape.groups, first, last, blocks, tokens,
                **tile.constants(), BLOCK=self.block_size, CHUNK=32,
            )  # fmt: skip
            part = part.view(shape.batch, shape.groups, tokens, blocks)
            if self.reduce_scores is not None:
                part = self.reduce_scores(part).contiguous()
            self._select(part, indices, first_token)
        return indices

    def _select(self, scores: Tensor, indices: Tensor, first_token: int) -> None:
        batch, groups, tokens, blocks = scores.shape
        kernels.topk_kernel[(tokens, batch * groups)](
            scores, indices, first_token, tokens, indices.shape[2], blocks, self.num_selected,
            self.forced_first_blocks, self.forced_recent_blocks, BLOCK=self.block_size,
            BLOCKS=triton.next_power_of_2(blocks),
            SELECTED=triton.next_power_of_2(self.num_selected),
        )  # fmt: skip
