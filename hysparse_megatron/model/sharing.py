"""What an oracle layer shares with the sparse layers after it, and how it crosses a pipeline cut.

In training that is key, value and indices; in generation the oracle's cache takes the place of the
first two.

Shapes: S sequence, B batch, HKV KV groups on this rank, D query/key head dim, DV value head dim,
K selected blocks, C channels of the residual stream, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hysparse_kernels import BlockLists, CachedRow, KeyValueGradients, TokenCache
from torch import Tensor


class SharedAttention(NamedTuple):
    """Made by an oracle, read by the sparse layers of its block; never kept on a module.

    key: [S, B, HKV, D], already rotated. value: [S, B, HKV, DV].
    block_indices: [B, HKV, S, K] int32, -1 = no block; carries no gradient. None only inside the
    second pass of activation recompute, which nobody reads.
    With context parallelism key and value are of all tokens, the indices of this rank's; across a
    cut key and value are of this rank's too.
    """

    key: Tensor
    value: Tensor
    block_indices: Tensor | None
    lists: Sequence[BlockLists | None] = (None,)
    """The same selection in the form that kernels walk, built once per stage, of every chunk of
    this rank's tokens; None: not needed."""
    gradients: KeyValueGradients | None = None
    """Where the sparse layers of this stage add up the gradients of key and value, in fp32. None
    with recompute, which detaches both from their producer: autograd has to add them up."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What may go through autograd functions and across pipeline cuts."""
        return self.key, self.value, self.block_indices


class CachedSelection(NamedTuple):
    """What an oracle shares in a step of generation.

    block_indices: [A, HKV, C, K] int32 of the step's tokens, -1 = no block.
    """

    cache: TokenCache
    """The oracle's own, with the step's tokens in it."""
    block_indices: Tensor
    rows: Sequence[CachedRow] | None = None
    """What readers have in common, of every row; None in a step of one token a row, which shares
    nothing."""


Shared = SharedAttention | CachedSelection
"""What passes from layer to layer."""


@dataclass(frozen=True)
class SharedWidths:
    """Sizes of the shared tensors on one rank.

    With sequence parallelism the residual stream holds S / T tokens and the shared tensors all S,
    so each token row of the payload carries T rows of them.
    """

    num_query_groups: int
    """KV groups on this rank."""
    key_dim: int
    value_dim: int
    num_selected_blocks: int
    tokens_per_row: int
    """T with sequence parallelism, else 1."""

    def columns(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """Payload columns of key, value and indices, in elements of `dtype`."""
        per_row = self.num_query_groups * self.tokens_per_row
        index_elements = self.num_selected_blocks * (index_bits(dtype).itemsize // dtype.itemsize)
        return per_row * self.key_dim, per_row * self.value_dim, per_row * index_elements


def index_bits(dtype: torch.dtype) -> torch.dtype:
    """The integer type whose bits carry a block index inside a payload of `dtype`."""
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def pack(hidden_states: Tensor, shared: SharedAttention) -> Tensor:
    """One new tensor [S / T, B, C + key + value + index columns] that can cross a cut.

    The gradient of the packed tensor splits into those of `hidden_states`, key and value.
    """
    rows, batch, _ = hidden_states.shape
    assert shared.block_indices is not None
    bits = (shared.block_indices + 1).to(index_bits(hidden_states.dtype))
    return torch.cat(
        [
            hidden_states,
            shared.key.reshape(rows, batch, -1),
            shared.value.reshape(rows, batch, -1),
            bits.view(hidden_states.dtype).reshape(rows, batch, -1),
        ],
        dim=-1,
    )


def unpack(payload: Tensor, widths: SharedWidths) -> tuple[Tensor, SharedAttention]:
    """The inverse of `pack`: hidden states [S / T, B, C] and the shared tensors."""
    rows, batch, total = payload.shape
    columns = widths.columns(payload.dtype)
    hidden, key, value, bits = payload.split((total - sum(columns), *columns), dim=-1)
    sequence, groups = rows * widths.tokens_per_row, widths.num_query_groups
    indices = bits.detach().contiguous().view(index_bits(payload.dtype)).to(torch.int32) - 1
    return hidden.contiguous(), SharedAttention(
        key=key.reshape(sequence, batch, groups, widths.key_dim),
        value=value.reshape(sequence, batch, groups, widths.value_dim),
        block_indices=indices.reshape(batch, groups, sequence, widths.num_selected_blocks),
    )
