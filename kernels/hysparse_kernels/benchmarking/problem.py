"""One problem size: its tensors, the operations it takes, and how they are counted.

Shapes: B batch, S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim,
K selected blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_TO_BACKWARD = 2.5
"""A backward counts this many forwards when TF/s are printed, as is usual for attention."""


@dataclass(frozen=True)
class Problem:
    """The sizes of one table."""

    sequence: int
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    batch: int = 1
    block_size: int = 64
    num_selected: int = 16
    window: int = 128

    @property
    def shape(self) -> str:
        """The form that `--shapes` takes: HQ/HKV/D/DV."""
        return f"{self.heads}/{self.groups}/{self.head_dim}/{self.value_dim}"

    @property
    def heads_per_group(self) -> int:
        """Query heads that share keys and values."""
        return self.heads // self.groups

    @property
    def num_blocks(self) -> int:
        """Blocks of the sequence, the last one perhaps partial."""
        return -(-self.sequence // self.block_size)

    def __str__(self) -> str:
        dims = f"{self.head_dim}/{self.value_dim}"
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"S {self.sequence}, heads {self.heads}/{self.groups}, dims {dims}{batch}"

    def causal_pairs(self) -> float:
        """(query head, key) pairs of full causal attention: half of S x S, as usual."""
        return self.batch * self.heads * self.sequence**2 / 2

    def window_pairs(self) -> float:
        """The same within the window."""
        width = min(self.window, self.sequence)
        full = self.sequence * width - width * (width - 1) / 2
        return self.batch * self.heads * full

    def forward_flops(self, pairs: float) -> float:
        """Query times key and weight times value, for so many (query head, key) pairs."""
        return 2 * (self.head_dim + self.value_dim) * pairs

    def backward_floor_flops(self, pairs: float) -> float:
        """The five products a backward cannot do without, three of them D wide, two DV wide."""
        return 2 * (3 * self.head_dim + 2 * self.value_dim) * pairs

    def forward_bytes(self) -> int:
        """q, k, v read and o written once, in 2-byte elements."""
        widths = self.head_dim + self.value_dim
        return 2 * self.batch * self.sequence * widths * (self.heads + self.groups)

    def backward_bytes(self) -> int:
        """q, o, do, k, v read and dq, dk, dv written once, in 2-byte elements."""
        return 2 * self.forward_bytes()


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """`64/4/192/128` -> HQ, HKV, D, DV; ValueError says what is wrong."""
    numbers = text.split("/")
    if len(numbers) != 4 or not all(number.isdigit() and int(number) for number in numbers):
        raise ValueError(f"{text!r}: expected heads/groups/head dim/value dim, like 64/4/128/128")
    heads, groups, head_dim, value_dim = map(int, numbers)
    if heads % groups:
        raise ValueError(f"{text!r}: {heads} heads are no multiple of {groups} groups")
    return heads, groups, head_dim, value_dim


@dataclass
class Inputs:
    """The tensors of one problem; what a peer needs in another form it makes itself, untimed."""

    problem: Problem
    query: Tensor
    """[B, S, HQ, D]"""
    key: Tensor
    """[B, S, HKV, D]"""
    value: Tensor
    """[B, S, HKV, DV]"""
    grad: Tensor
    """[B, S, HQ, DV], the gradient of the output."""
    sink: Tensor
    """[HQ] fp32"""
    backend: str
    """Backend of `hysparse_kernels`."""
    indices: Tensor | None = None
    """int32 [B, HKV, S, K] for the sparse table."""

    @classmethod
    def random(
        cls, problem: Problem, device: torch.device, backend: str, dtype: torch.dtype
    ) -> Inputs:
        """Normal tensors that want gradients."""

        def normal(count: int, width: int) -> Tensor:
            size = (problem.batch, problem.sequence, count, width)
            return torch.randn(*size, device=device, dtype=dtype)

        return cls(
            problem,
            normal(problem.heads, problem.head_dim).requires_grad_(),
            normal(problem.groups, problem.head_dim).requires_grad_(),
            normal(problem.groups, problem.value_dim).requires_grad_(),
            normal(problem.heads, problem.value_dim),
            torch.randn(problem.heads, device=device).requires_grad_(),
            backend,
        )

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What every peer differentiates by."""
        return self.query, self.key, self.value
