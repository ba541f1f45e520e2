"""Sizes of one call of the Hopper kernels, how they cut it into tiles, and what fetches the tiles.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hysparse_kernels.triton.launch import Sizes

ROWS = 64
"""Rows of a part: tokens times query heads of a group."""
_SHARED_BYTES = 226 * 2**10
"""Shared memory for tiles; a multiprocessor gives a program 227 KiB, barriers take the rest."""
_ROUNDS = 16
"""Tiles for each program after which a program's share differs from another's by little."""
_L2_BYTES = 36 * 2**20
"""Of keys and values that are read side by side; the cache has 50 MiB."""


@lru_cache
def _together(groups: int, most: int, tiles: int, programs: int) -> int:
    """Of how many groups, a divisor of all and `most` or fewer, programs take tiles side by side.

    Tiles grow along the sequence. Where a group has few of them for each program, programs that
    take one group after the other are done at very different times: at 8,192 tokens, 4 heads a
    group, the last one takes 1.6 times the average.
    """
    divisors = [number for number in range(1, groups + 1) if groups % number == 0]
    enough = [number for number in divisors if number * tiles >= _ROUNDS * programs]
    return max(number for number in divisors if number <= min([most, *enough[:1]]))


class Geometry(Sizes):
    """Sizes of one call and its tiles."""

    @property
    def split(self) -> bool:
        """Head dim 192 lies in two pieces, 128 and 64: the compiler knows powers of two only."""
        return self.width == 192

    @property
    def first_width(self) -> int:
        """Of the first piece of the head dim."""
        return 128 if self.split else self.width

    @property
    def own_output_width(self) -> int:
        """Width of the place for an output that cannot leave through the place of its query."""
        return 0 if self.first_width == self.value_width else self.value_width

    @property
    def tokens(self) -> int:
        """Tokens of one part (64 rows)."""
        return ROWS // self.heads

    @property
    def key_bytes(self) -> int:
        """Of one key and its value."""
        return 2 * (self.width + self.value_width)

    def together(self, tiles: int, programs: int) -> int:
        """Groups whose tiles the programs take side by side."""
        most = max(1, _L2_BYTES // (self.keys * self.key_bytes))
        return _together(self.batch * self.groups, most, tiles, programs)

    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "TOKENS": self.tokens,
            "HEADS": self.heads,
            "WIDTH": self.first_width,
            "VALUE_WIDTH": self.value_width,
            "SPLIT": self.split,
        }

    def rows(self, tensor: Tensor, width: int) -> TensorDescriptor:
        """One part of a [B, S, HQ, *] tensor."""
        return descriptor(tensor, (1, self.tokens, self.heads, width))

    def queries(self, tensor: Tensor) -> tuple[TensorDescriptor, TensorDescriptor | None]:
        """Both pieces of a [B, S, HQ, D] tensor, or the one there is and None."""
        first = self.rows(tensor, self.first_width)
        return first, self.rows(tensor, 64) if self.split else None

    def key_tiles(
        self, tensor: Tensor, count: int
    ) -> tuple[TensorDescriptor, TensorDescriptor | None]:
        """`count` keys of a [B, Sk, HKV, D] tensor, as `queries`."""
        first = descriptor(tensor, (1, count, 1, self.first_width))
        return first, descriptor(tensor, (1, count, 1, 64)) if self.split else None

    def value_tiles(self, tensor: Tensor, count: int) -> TensorDescriptor:
        """Of `count` keys of a [B, Sk, HKV, DV] tensor."""
        return descriptor(tensor, (1, count, 1, self.value_width))


class _Layout(gl.NVMMASharedLayout):
    """One whose text is made once: each launch asks for that of all its descriptors' layouts."""

    text: str

    @classmethod
    def of(cls, box: tuple[int, ...], dtype: torch.dtype) -> _Layout:
        """Of a `box` in shared memory."""
        elements = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
        found = gl.NVMMASharedLayout.get_default_for(list(box), elements.get(dtype, gl.float32))
        layout = cls(**{field.name: getattr(found, field.name) for field in fields(found)})
        object.__setattr__(layout, "text", repr(found))
        return layout

    def __repr__(self) -> str:
        return self.text


class _Checked(TensorDescriptor):
    """One whose sizes `_place` has checked."""

    def __post_init__(self) -> None:
        pass


@lru_cache(maxsize=1024)
def _place(
    shape: torch.Size, steps: tuple[int, ...], dtype: torch.dtype, box: tuple[int, ...]
) -> tuple[list[int], list[int], list[int], _Layout]:
    """Sizes, strides, box and layout of the descriptors of such tensors.

    It takes the host longer to find and check them than to launch what uses them.
    """
    # A dimension of one element may have any stride, the copy engine wants multiples of 16 bytes.
    strides = [step if size > 1 else 64 for step, size in zip(steps, shape, strict=True)]
    strides[-1] = 1
    base = torch.empty(0, dtype=dtype)
    checked = TensorDescriptor(base, list(shape), strides, list(box), _Layout.of(box, dtype))
    return checked.shape, checked.strides, checked.block_shape, checked.layout


def descriptor(tensor: Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    """How the copy engine fetches a `box` of a tensor, which starts at a multiple of 16 bytes;
    zeros outside."""
    return _Checked(tensor, *_place(tensor.shape, tensor.stride(), tensor.dtype, box))


def stages(most: int, bytes_per_stage: int, fixed_bytes: int) -> int:
    """Depth of a ring of tiles in shared memory, which has `fixed_bytes` of other tiles in it."""
    return min(most, (_SHARED_BYTES - fixed_bytes) // bytes_per_stage)
