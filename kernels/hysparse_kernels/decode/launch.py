"""The cached operations of a decode step on Triton kernels; `cached_attention` specifies them.

A step brings one token to each of its rows (C = 1). Keys are split over programs, enough for the
device even for one long row, and the splits are added up by a second kernel. Nothing waits for the
device: what kernels need of a step is one small tensor, sent once for all layers.

Shapes: A rows of the step, HQ query heads, HKV KV groups, G = HQ // HKV heads per group, D
query/key head dim, DV value head dim, N blocks of the longest row, K selected, X splits,
L = A * HKV pairs of row and group, U tiles of keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels import limits
from hysparse_kernels.arguments import DTYPE_NAMES
from hysparse_kernels.call import SelectionRule
from hysparse_kernels.decode import kernels
from hysparse_kernels.key_value_cache import FP8, Chunk, TokenCache, WindowCache
from hysparse_kernels.reference.selection import offered_scores
from hysparse_kernels.triton.topk import block_topk

_LOG2_E = 1.4426950408889634
_SHARED_MEMORY_BYTES = 96 * 2**10
"""What the tiles of a program may take: two programs of a Hopper multiprocessor's 227 KiB."""
_PROGRAMS_PER_MULTIPROCESSOR = 2
_TILES_PER_FAR_SPLIT = 4
"""Least for a full layer: with fewer keys a split writes too much for what it reads."""
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def why_not(
    query: Tensor, caches: tuple[TokenCache | WindowCache, ...], block_size: int | None = None
) -> str | None:
    """Why these kernels cannot take query [A, 1, HQ, D] with such caches, or None if they can."""
    interpreted = triton.knobs.runtime.interpret
    device = query.device
    if device.type != "cuda" and not interpreted:
        return f"the Triton kernels need a CUDA device, the tensors are on {device.type}"
    heads = query.shape[2] // caches[0].key.shape[-2]
    if heads > (most := limits.DECODE_MAX_HEADS):
        return f"the Triton kernels take up to {most} query heads per KV group, not {heads}"
    if block_size is not None and block_size not in limits.BLOCK_SIZES:
        return f"the Triton kernels take block sizes {limits.BLOCK_SIZES}, not {block_size}"
    stored = [cache.key.dtype for cache in caches]
    for dtype in (query.dtype, *(dtype for dtype in stored if dtype != FP8)):
        if DTYPE_NAMES.get(dtype) not in limits.DECODE_DTYPES:
            return f"the Triton decode kernels take bf16, fp16 and fp32, not {dtype}"
    if (
        FP8 in stored
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) < (8, 9)
    ):
        return "an FP8 cache needs a GPU of compute capability 8.9 or later for Triton"
    width = max(query.shape[-1], *(cache.value.shape[-1] for cache in caches))
    if width > limits.MAX_HEAD_DIM:
        return f"the Triton kernels take head dims up to {limits.MAX_HEAD_DIM}, not {width}"
    return None


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: TokenCache,
    chunk: Chunk,
    *,
    rule: SelectionRule | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Output [A, 1, HQ, DV] and, with a rule, int32 [A, HKV, 1, K]; stores key and value."""
    cache.check_room(chunk)
    _store(key, value, cache, chunk)
    step = _Step.of(query, chunk, cache, None, 64 if rule is None else rule.block_size)
    longest = max(chunk.past) + 1
    tiles = triton.cdiv(longest, step.keys)
    parts = step.partial(step.splits(tiles, _TILES_PER_FAR_SPLIT), 0)
    if rule is None:
        step.attend(parts, kernels.ALL, scale)
        return step.combine(parts), None
    pairs, heads = step.pairs, step.heads
    maxima = parts.m.new_empty(pairs, tiles, heads)
    lse = parts.m.new_empty(pairs, heads)
    step.attend(parts, kernels.ALL, scale, maxima=maxima)
    output = step.combine(parts, lse=lse)
    blocks = triton.cdiv(longest, rule.block_size)
    scores = parts.m.new_empty(len(chunk.rows), step.groups, 1, blocks)
    kernels.scores_kernel[(triton.cdiv(blocks, 32), pairs)](
        maxima, lse, chunk.on_device, scores, len(chunk.rows), step.groups, tiles, blocks,
        HEADS=heads, ROWS=step.rows, BLOCK=rule.block_size, KEYS=step.keys, CHUNK=32,
    )  # fmt: skip
    if rule.forced_first_blocks or rule.forced_recent_blocks or rule.reduce_scores is not None:
        own = chunk.positions[:, None, :, None] // rule.block_size
        scores = offered_scores(rule, scores, own)
    return output, block_topk(scores, rule.num_selected)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: tuple[Tensor, Tensor],
    oracle: TokenCache,
    block_indices: Tensor,
    cache: WindowCache,
    chunk: Chunk,
    *,
    block_size: int,
    window: int,
    sinks: tuple[Tensor | None, Tensor | None],
    scale: float,
) -> Tensor:
    """Gated sum [A, 1, HQ, DV] of the selected blocks and the window; stores key and value."""
    _store(key, value, cache, chunk)
    step = _Step.of(query, chunk, oracle, cache, block_size)
    selection = block_indices.contiguous()
    far = step.splits(selection.shape[-1] * (block_size // step.keys))
    parts = step.partial(far, step.splits(triton.cdiv(window, step.keys)))
    step.attend(parts, kernels.BLOCKS, scale, selection=selection, window=window)
    return step.combine(parts, sinks=sinks, gates=gates)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: WindowCache,
    chunk: Chunk,
    *,
    window: int,
    sink: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention [A, 1, HQ, DV] to the last `window` tokens; stores key and value."""
    _store(key, value, cache, chunk)
    step = _Step.of(query, chunk, None, cache, 64)
    parts = step.partial(0, step.splits(triton.cdiv(window, step.keys)))
    step.attend(parts, kernels.NONE, scale, window=window)
    return step.combine(parts, sinks=(None, sink))


@dataclass(frozen=True)
class _Parts:
    """Softmax of each split of keys before they are added up: m and l [L, X, G] and acc
    [L, X, G, DV] in fp32; the first `far` splits belong to the far branch."""

    m: Tensor
    l: Tensor  # noqa: E741
    acc: Tensor
    far: int
    near: int


@dataclass(frozen=True)
class _Step:
    """One layer's launches of a step: its caches, sizes and tiles."""

    query: Tensor
    chunk: Chunk
    oracle: TokenCache | None
    ring: WindowCache | None
    groups: int
    heads: int
    """G."""
    keys: int
    """Keys of a tile, which divide a block."""
    block_size: int
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        query: Tensor,
        chunk: Chunk,
        oracle: TokenCache | None,
        ring: WindowCache | None,
        block_size: int,
    ) -> _Step:
        """For a query [A, 1, HQ, D] and the caches that it reads."""
        caches = [cache for cache in (oracle, ring) if cache is not None]
        groups, value_dim = caches[0].value.shape[-2:]
        dot = _dot_type(query.dtype, [cache.key.dtype for cache in caches])
        fine = query.dtype == torch.float32 or dot != torch.float32
        constants = {
            "WIDTH": max(16, triton.next_power_of_2(query.shape[-1])),
            "VALUE_WIDTH": max(16, triton.next_power_of_2(value_dim)),
            "DOT": _TYPES[dot],
            # fp16 and FP8 numbers fit into tf32 as they are.
            "PRECISION": "ieee" if fine else "tf32",
        }
        widths = constants["WIDTH"] + constants["VALUE_WIDTH"]
        # fp32 products are unrolled into so much code that large ones take minutes to compile.
        most = 64 if widths * dot.itemsize <= 1024 else 16
        return cls(
            query if query.stride(-1) == 1 else query.contiguous(),
            chunk, oracle, ring, groups, query.shape[2] // groups,
            min(block_size, most), block_size, constants,
        )  # fmt: skip

    @property
    def pairs(self) -> int:
        """A * HKV."""
        return len(self.chunk.rows) * self.groups

    @property
    def rows(self) -> int:
        """G, padded to what a matrix product takes."""
        return max(16, triton.next_power_of_2(self.heads))

    @property
    def stages(self) -> int:
        """Software-pipeline depth: one tile less than that waits in shared memory."""
        caches = [cache for cache in (self.oracle, self.ring) if cache is not None]
        numbers = self.keys * (self.constants["WIDTH"] + self.constants["VALUE_WIDTH"])
        largest = max(cache.key.dtype.itemsize for cache in caches)
        return min(4, 1 + _SHARED_MEMORY_BYTES // (numbers * largest))

    def splits(self, tiles: int, least: int = 1) -> int:
        """Into how many programs to cut `tiles`, each of at least `least` if there are as many."""
        wanted = triton.cdiv(_programs(self.query.device), self.pairs)
        return max(1, min(triton.cdiv(tiles, least), wanted))

    def partial(self, far: int, near: int) -> _Parts:
        """Memory for so many splits of either branch."""
        shape = (self.pairs, far + near, self.heads)
        value_dim = (self.ring if self.oracle is None else self.oracle).value.shape[-1]  # type: ignore[union-attr]
        m_parts, l_parts = self.query.new_empty((2, *shape), dtype=torch.float32)
        acc_parts = self.query.new_empty((*shape, value_dim), dtype=torch.float32)
        return _Parts(m_parts, l_parts, acc_parts, far, near)

    def attend(
        self,
        parts: _Parts,
        far_mode: int,
        scale: float,
        *,
        selection: Tensor | None = None,
        maxima: Tensor | None = None,
        window: int = 0,
    ) -> None:
        """Fill `parts` and, if they are wanted, the maxima [L, U, G] of the oracle's tiles."""
        query, oracle, ring, unused = self.query, self.oracle, self.ring, parts.m
        exponents = None if oracle is None else oracle.key_exponent
        far: tuple[Any, ...] = (unused,) * 5
        if oracle is not None:
            scaled = exponents is not None
            far = (
                oracle.key, oracle.value,
                oracle.key_exponent if scaled else unused,
                oracle.value_exponent if scaled else unused,
                oracle.starts_on_device,
            )  # fmt: skip
        kernels.attend_kernel[(parts.far + parts.near, self.pairs)](
            query, self.chunk.on_device, parts.m, parts.l, parts.acc,
            *far, unused if selection is None else selection, unused if maxima is None else maxima,
            *((unused, unused) if ring is None else (ring.key, ring.value)),
            query.stride(0), query.stride(2), len(self.chunk.rows), self.groups, parts.far,
            0 if maxima is None else maxima.shape[1],
            0 if selection is None else selection.shape[-1],
            window, 0 if ring is None else ring.entries,
            scale * _LOG2_E, query.shape[-1], parts.acc.shape[-1],
            FAR=far_mode, NEAR=ring is not None, SCALED=exponents is not None,
            SCORES=maxima is not None, HEADS=self.heads, ROWS=self.rows,
            BLOCK=self.block_size, KEYS=self.keys, **self.constants,
            num_warps=8 if self.rows > 64 else 4, num_stages=self.stages,
        )  # fmt: skip

    def combine(
        self,
        parts: _Parts,
        *,
        lse: Tensor | None = None,
        sinks: tuple[Tensor | None, Tensor | None] = (None, None),
        gates: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Output [A, 1, HQ, DV] of all splits; with lse [L, G] also that, in base 2."""
        unused = parts.m
        value_dim = parts.acc.shape[-1]
        output = self.query.new_empty(*self.query.shape[:3], value_dim)
        given = (unused[..., None], unused[..., None]) if gates is None else gates
        strides = [gate.stride(axis) for gate in given for axis in (0, 2, 3)]
        kernels.combine_kernel[(len(self.chunk.rows), self.query.shape[2])](
            parts.m, parts.l, parts.acc,
            *(unused if sink is None else sink for sink in sinks),
            *given, output, unused if lse is None else lse,
            *strides, self.groups, parts.far + parts.near, parts.far, value_dim,
            FAR=parts.far > 0, NEAR=parts.near > 0,
            FAR_SINK=sinks[0] is not None, NEAR_SINK=sinks[1] is not None,
            LSE=lse is not None, PER_HEAD=given[0].shape[-1] == 1, HEADS=self.heads,
            VALUE_WIDTH=self.constants["VALUE_WIDTH"], CHUNK=32,
        )  # fmt: skip
        return output


def _store(key: Tensor, value: Tensor, cache: TokenCache | WindowCache, chunk: Chunk) -> None:
    """The new tokens' key [A, 1, HKV, D] and value [A, 1, HKV, DV] into the cache."""
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    unused = chunk.on_device
    exponents: tuple[Tensor | None, Tensor | None] = (None, None)
    starts, entries = unused, 0
    if isinstance(cache, TokenCache):
        exponents, starts = (cache.key_exponent, cache.value_exponent), cache.starts_on_device
    else:
        entries = cache.entries
    kernels.store_kernel[(len(chunk.rows), key.shape[2])](
        key, value, chunk.on_device, starts, cache.key, cache.value,
        *(unused if exponent is None else exponent for exponent in exponents),
        key.stride(0), key.stride(2), value.stride(0), value.stride(2),
        len(chunk.rows), key.shape[2], entries, key.shape[-1], value.shape[-1],
        RING=entries > 0, SCALED=exponents[0] is not None,
        WIDTH=triton.next_power_of_2(key.shape[-1]),
        VALUE_WIDTH=triton.next_power_of_2(value.shape[-1]), num_warps=1,
    )  # fmt: skip


def _dot_type(query: torch.dtype, stored: list[torch.dtype]) -> torch.dtype:
    """In which type query and keys, weights and values are multiplied without losing of either.

    FP8 values are weighted by their exponents too, which leave the range of fp16.
    """
    if query == torch.bfloat16 and all(dtype in (query, FP8) for dtype in stored):
        return query
    if query == torch.float16 and all(dtype == query for dtype in stored):
        return query
    return torch.float32


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs keep a device busy."""
    if device.type != "cuda":
        return 8
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
