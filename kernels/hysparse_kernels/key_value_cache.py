"""Keys and values kept for tokens to come: all of them for a full layer, the last few for a window.

A cache holds sequences of different lengths, its rows. One step adds tokens to some of them, a
`Chunk`: a whole prompt or a piece of one, or one token each. Lengths are kept by the caller.

Shapes: R rows of a cache, T tokens that it has room for, W entries of a ring, A rows of a step, C
columns of a step (tokens of its longest row), HKV KV groups, D key head dim, DV value head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_FP8_LARGEST = torch.finfo(FP8).max
_LEAST_EXPONENT, _BIAS = -126, 127
"""Of normal fp32 numbers, whose exponent bits hold exponent + bias."""


@dataclass(frozen=True)
class Chunk:
    """The tokens that one step adds to a cache.

    Row i of the step's tensors [A, C, ...] belongs to row `rows[i]` of the cache, which holds
    `past[i]` tokens, and brings `new[i]` more (at least 1) in its first columns. What stands in the
    columns after them is not looked at.
    """

    rows: tuple[int, ...]
    past: tuple[int, ...]
    new: tuple[int, ...]
    device: torch.device
    numbers: Tensor | None = None
    """See `replayed`."""

    @classmethod
    def replayed(
        cls, rows: Sequence[int], capacities: Sequence[int], device: torch.device
    ) -> Chunk:
        """One token for each row, in a step that a CUDA graph records once and replays.

        How many tokens a row has at a replay stands on the device alone, in `numbers` [3, A] (rows,
        past, new) of the result, which starts at 0 past: whoever replays counts them up. Sizes of
        launches are those of full rows: `capacities[i]` tokens, the new one included. Only for what
        reads `numbers`, as the Triton kernels do.
        """
        ones = (1,) * len(rows)
        numbers = torch.tensor([list(rows), [0] * len(rows), ones], device=device)
        return cls(tuple(rows), tuple(most - 1 for most in capacities), ones, device, numbers)

    @property
    def width(self) -> int:
        """C."""
        return max(self.new)

    @property
    def spans(self) -> list[tuple[int, int, int, int]]:
        """(i, row of the cache, past, new) of every row of the step."""
        return list(zip(itertools.count(), self.rows, self.past, self.new, strict=False))

    @cached_property
    def on_device(self) -> Tensor:
        """int64 [3, A]: rows, past and new. Sent once; the host does not wait for it."""
        if self.numbers is not None:
            return self.numbers
        numbers = torch.tensor([self.rows, self.past, self.new])
        if self.device.type != "cuda":
            return numbers.to(self.device)
        return numbers.pin_memory().to(self.device, non_blocking=True)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [A, C]: where each column stands in its sequence, from 0."""
        columns = torch.arange(self.width, device=self.device)
        return self.on_device[1].unsqueeze(1) + columns


class TokenCache:
    """All keys [T, HKV, D] and values [T, HKV, DV] of a full layer, one sequence after another.

    Row r has room for `capacities[r]` tokens from `starts[r]` on. With dtype `FP8` (e4m3) a key or
    value head of a token is divided by a power of two, the least with which its largest channel
    fits; the exponents, int8 [T, HKV], are kept beside. A number x then comes back with an error of
    at most |x| / 16, or of 2^-17 of the head's largest one where that is more.
    """

    def __init__(
        self,
        capacities: Sequence[int],
        num_groups: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.capacities = tuple(capacities)
        self.starts = (0, *itertools.accumulate(capacities))
        self.starts_on_device = torch.tensor(self.starts, device=device)
        total = self.starts[-1]
        self.key = torch.empty(total, num_groups, key_dim, dtype=dtype, device=device)
        self.value = torch.empty(total, num_groups, value_dim, dtype=dtype, device=device)
        self.key_exponent: Tensor | None = None
        self.value_exponent: Tensor | None = None
        if dtype == FP8:
            self.key_exponent, self.value_exponent = (
                torch.empty(total, num_groups, dtype=torch.int8, device=device) for _ in range(2)
            )

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        kept = (self.key, self.value, self.key_exponent, self.value_exponent)
        return [tensor for tensor in kept if tensor is not None]

    def append(self, chunk: Chunk, key: Tensor, value: Tensor) -> None:
        """Store the new tokens' key [A, C, HKV, D] and value [A, C, HKV, DV], of any float dtype.

        Raises ValueError where a row has no room for them.
        """
        self.check_room(chunk)
        for given, kept, exponent in (
            (key, self.key, self.key_exponent),
            (value, self.value, self.value_exponent),
        ):
            for i, row, past, new in chunk.spans:
                first = self.starts[row] + past
                places = slice(first, first + new)
                if exponent is None:
                    kept[places] = given[i, :new].to(kept.dtype)
                else:
                    kept[places], exponent[places] = to_fp8(given[i, :new])

    def check_room(self, chunk: Chunk) -> None:
        """Raises ValueError where a row has no room for the new tokens."""
        for _, row, past, new in chunk.spans:
            if past + new > self.capacities[row]:
                raise ValueError(
                    f"row {row} of the cache has room for {self.capacities[row]} tokens: "
                    f"{past} are there and {new} more were given"
                )

    def read(self, row: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Key [1, stop, HKV, D] and value [1, stop, HKV, DV] of a row's first `stop` tokens.

        Views where the cache has that dtype.
        """
        tokens = slice(self.starts[row], self.starts[row] + stop)
        key = _widened(self.key, self.key_exponent, tokens, dtype)
        value = _widened(self.value, self.value_exponent, tokens, dtype)
        return key.unsqueeze(0), value.unsqueeze(0)


class WindowCache:
    """Keys and values of the last tokens of every row, a ring: [R, W, HKV, D], [R, W, HKV, DV].

    The token at position p stands in entry p modulo W.
    """

    def __init__(
        self,
        num_rows: int,
        entries: int,
        num_groups: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.entries = entries
        ring = (num_rows, entries, num_groups)
        self.key = torch.empty(*ring, key_dim, dtype=dtype, device=device)
        self.value = torch.empty(*ring, value_dim, dtype=dtype, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [self.key, self.value]

    def append(self, chunk: Chunk, key: Tensor, value: Tensor) -> None:
        """Store the last of the new tokens' key [A, C, HKV, D] and value [A, C, HKV, DV]."""
        for i, row, past, new in chunk.spans:
            done = new - min(new, self.entries)
            for places in self._places(past + done, new - done):
                stop = done + places.stop - places.start
                self.key[row, places] = key[i, done:stop]
                self.value[row, places] = value[i, done:stop]
                done = stop

    def before(
        self, row: int, position: int, count: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Of the `count` tokens before `position`, oldest first, as `TokenCache.read`."""
        places = self._places(position - count, count)
        key, value = (
            torch.cat([ring[row : row + 1, part] for part in places], 1).to(dtype)
            for ring in (self.key, self.value)
        )
        return key, value

    def _places(self, position: int, count: int) -> list[slice]:
        """The entries of `count` tokens from `position` on, in at most two pieces."""
        first = position % self.entries
        stop = min(first + count, self.entries)
        return [slice(first, stop), slice(0, first + count - stop)]


def to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] as e4m3 numbers and int8 exponents [...]: x is about number * 2^exponent."""
    wide = tensor.float()
    _, exponent = torch.frexp(wide.abs().amax(-1) / _FP8_LARGEST)
    exponent = exponent.clamp(_LEAST_EXPONENT, _BIAS)
    return (wide * _power_of_two(-exponent).unsqueeze(-1)).to(FP8), exponent.to(torch.int8)


def from_fp8(numbers: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_fp8`, in `dtype`."""
    # Without rounding in all types of fp32's range; fp16 may not have the power of two.
    wide = torch.float32 if dtype == torch.float16 else dtype
    return (numbers.to(wide) * _power_of_two(exponent).to(wide).unsqueeze(-1)).to(dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, without rounding."""
    return ((exponent.int() + _BIAS) << 23).view(torch.float32)


def _widened(kept: Tensor, exponent: Tensor | None, places: slice, dtype: torch.dtype) -> Tensor:
    if exponent is None:
        return kept[places].to(dtype)
    return from_fp8(kept[places], exponent[places], dtype)
