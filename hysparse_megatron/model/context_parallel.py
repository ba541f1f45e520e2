"""Context parallelism: which tokens of a sequence a rank holds, and what of the others it is sent.

Of 2 P chunks of a sequence, rank r of P holds r and 2 P - 1 - r, as megatron-core's ranks do: what
causal attention has to do is the same on all of them. Keys and values of a hybrid block are
gathered once, for the oracle and all that read it; a window needs the end of the chunk before.

Shapes: S sequence, P context-parallel ranks, R = S / P rows of this rank, B batch, HKV KV groups
on this rank, D key head dim, DV value head dim, N places of a tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from hysparse_kernels import KeyValueGradients
from torch import Tensor

from hysparse_megatron.architecture.layers import Branch
from hysparse_megatron.model.megatron_config import HySparseConfig


class Chunk(NamedTuple):
    """Neighbouring tokens that a rank holds."""

    rows: slice
    """Where they are among the rank's own."""
    start: int
    """Position of the first one in the sequence."""


@dataclass(frozen=True)
class Shard:
    """What rank `rank` of `ranks` holds of a sequence of `sequence` tokens."""

    rank: int
    ranks: int
    sequence: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, sequence: int) -> Shard:
        """That of this process in a context-parallel group."""
        return cls(group.rank(), group.size(), sequence)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """In the order of the rank's rows, which is that of the sequence."""
        if self.ranks == 1:
            return (Chunk(slice(0, self.sequence), 0),)
        size = self.sequence // (2 * self.ranks)
        first, last = self.rank * size, (2 * self.ranks - 1 - self.rank) * size
        return Chunk(slice(0, size), first), Chunk(slice(size, 2 * size), last)

    def take(self, whole: Tensor, dim: int = 0) -> Tensor:
        """The rank's rows of a tensor with S of them along `dim`; no copy where it holds all."""
        if self.ranks == 1:
            return whole
        parts = [whole.narrow(dim, start, rows.stop - rows.start) for rows, start in self.chunks]
        return torch.cat(parts, dim)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [R]: the position of every row in the sequence."""
        return self.take(torch.arange(self.sequence, device=device))

    def in_order(self, by_rank: Tensor) -> Tensor:
        """[P, R, ...] of all ranks as the [S, ...] of the sequence, contiguous."""
        low, high = by_rank.unflatten(1, (2, -1)).unbind(1)
        return torch.cat((low, high.flip(0))).flatten(0, 1)

    def by_rank(self, whole: Tensor) -> Tensor:
        """The inverse: [S, ...] as [P, R, ...], contiguous."""
        low, high = whole.unflatten(0, (2, self.ranks, -1)).unbind(0)
        return torch.stack((low, high.flip(0)), dim=1).flatten(1, 2)


def gather_key_value(
    key: Tensor,
    value: Tensor,
    shard: Shard,
    group: dist.ProcessGroup,
    gradients: KeyValueGradients | None,
) -> tuple[Tensor, Tensor]:
    """[R, B, HKV, D] and [R, B, HKV, DV] of every rank -> [S, B, HKV, D] and [S, B, HKV, DV].

    One all-gather, and in the backward pass one reduce-scatter in fp32 (fp64 for fp64). With
    `gradients` those who read the result add theirs to it and it is what the backward pass sends;
    autograd runs that after all of them.
    """
    if gradients is not None:
        gradients.claim()
    return _GatherKeyValue.apply(key, value, shard, group, gradients)


def gathered(
    key: Tensor, value: Tensor, shard: Shard, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """As `gather_key_value`, contiguous, without gradients."""
    by_rank = start_all_gather(torch.cat((key, value), dim=-1), group).done()
    whole_key, whole_value = by_rank.split((key.shape[-1], value.shape[-1]), dim=-1)
    return shard.in_order(whole_key), shard.in_order(whole_value)


class _GatherKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        value: Tensor,
        shard: Shard,
        group: dist.ProcessGroup,
        gradients: KeyValueGradients | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.shard, ctx.group, ctx.gradients, ctx.batch = shard, group, gradients, key.shape[1]
        ctx.dtype, ctx.widths = key.dtype, (key.shape[-1], value.shape[-1])
        # Otherwise what readers do not send would arrive as tensors of zeros.
        ctx.set_materialize_grads(False)
        return gathered(key, value, shard, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *sent: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = sent
        if ctx.gradients is not None:
            others = [None if part is None else part.transpose(0, 1) for part in sent]
            sums = ctx.gradients.collect(*others)
            # In the kernels' layout, whatever they took for rows.
            parts = tuple(
                part.reshape(ctx.batch, -1, *part.shape[2:]).transpose(0, 1)
                for part in sums
                if part is not None
            )
        given = [part.to(_sum_dtype(ctx.dtype)) for part in parts if part is not None]
        assert len(given) == 2, "attention always reads both key and value"
        wide = torch.cat(given, dim=-1)
        own = start_reduce_scatter(ctx.shard.by_rank(wide), ctx.group).done().to(ctx.dtype)
        return *own.split(ctx.widths, dim=-1), None, None, None


class Windows:
    """Key and value of the rank's chunks, each with the `tail` tokens before it, on their way.

    From [R, B, HKV, D] and [R, B, HKV, DV]. The tails of all ranks travel in one all-gather, their
    gradients in one reduce-scatter; none for a `tail` of 0. The all-gather begins with the object
    and ends with `received`; the reduce-scatter begins with the backward pass of what `received`
    returned and ends behind that of all that was computed between the two: autograd takes first
    what was made last.
    """

    def __init__(
        self, key: Tensor, value: Tensor, tail: int, shard: Shard, group: dist.ProcessGroup
    ) -> None:
        self.tail, self.shard, self.group = tail, shard, group
        self.dtype, self.widths = key.dtype, (key.shape[-1], value.shape[-1])
        self.tails: Pending | None = None
        self.own_gradients: list[Tensor] = []
        self._own = (key, value) if tail == 0 else _SendTails.apply(key, value, self)

    def received(self) -> tuple[Tensor, ...]:
        """Key and value of the first chunk, then of the second: [N + R / 2, B, HKV, D or DV].

        N is the tail, and 0 for the sequence's first chunk. To be called once.
        """
        if self.tail == 0:
            return tuple(part[rows] for rows, _ in self.shard.chunks for part in self._own)
        return _ReceiveTails.apply(*self._own, self)


class _SendTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        ctx.windows = windows
        ctx.set_materialize_grads(False)
        chunks = torch.cat((key, value), dim=-1).unflatten(0, (2, -1))
        own = chunks[:, chunks.shape[1] - windows.tail :].flatten(0, 1)
        windows.tails = start_all_gather(own, windows.group)
        return key.view_as(key), value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *_none: None) -> tuple[Tensor | None, ...]:
        windows = ctx.windows
        own, windows.own_gradients = windows.own_gradients, []
        returned = windows.tails.done().unflatten(0, (2, -1))
        windows.tails = None
        for chunk, gradient in zip(own, returned, strict=True):
            chunk[chunk.shape[0] - windows.tail :] += gradient
        key, value = torch.cat(own).to(windows.dtype).split(windows.widths, dim=-1)
        return key, value, None


class _ReceiveTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, windows: Windows) -> tuple[Tensor, ...]:
        ctx.windows = windows
        tail, shard = windows.tail, windows.shard
        assert windows.tails is not None
        tails, windows.tails = shard.in_order(windows.tails.done()), None
        chunks = torch.cat((key, value), dim=-1).unflatten(0, (2, -1))
        found = []
        for chunk, number in zip(chunks, _numbers(shard), strict=True):
            before = tails[max(number - 1, 0) * tail : number * tail]
            found += torch.cat((before, chunk)).split(windows.widths, dim=-1)
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor | None, ...]:
        windows = ctx.windows
        tail, shard = windows.tail, windows.shard
        dtype = _sum_dtype(windows.dtype)
        tails = None
        for index, number in enumerate(_numbers(shard)):
            wide = torch.cat([part.to(dtype) for part in sent[2 * index : 2 * index + 2]], dim=-1)
            if tails is None:
                tails = wide.new_zeros(2 * shard.ranks * tail, *wide.shape[1:])
            if number:
                tails[(number - 1) * tail : number * tail] = wide[:tail]
            # Kept in full precision for the other node, which adds what the other ranks send.
            windows.own_gradients.append(wide[tail if number else 0 :])
        assert tails is not None
        windows.tails = start_reduce_scatter(shard.by_rank(tails), windows.group)
        return None, None, None


def rows_before(own: Tensor, dim: int, shard: Shard, group: dist.ProcessGroup) -> Tensor:
    """Of every row of `own` along `dim` the row of the token before it in the sequence.

    The first token of all has none; it gets its own. No gradient.
    """
    rows = own.transpose(0, dim)
    if shard.ranks == 1:
        return torch.cat((rows[:1], rows[:-1])).transpose(0, dim)
    chunks = rows.unflatten(0, (2, -1))
    last = shard.in_order(start_all_gather(chunks[:, -1], group).done())
    parts = []
    for chunk, number in zip(chunks, _numbers(shard), strict=True):
        parts += [last[number - 1 : number] if number else chunk[:1], chunk[:-1]]
    return torch.cat(parts).transpose(0, dim)


def _numbers(shard: Shard) -> tuple[int, int]:
    """Which of the sequence's 2 P chunks the rank holds."""
    return shard.rank, 2 * shard.ranks - 1 - shard.rank


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class Pending:
    """A collective under way."""

    result: Tensor
    sent: Tensor
    """Must stay until the end."""
    work: dist.Work

    def done(self) -> Tensor:
        """The result, once it is there: on a GPU for what is launched from now on."""
        self.work.wait()
        return self.result


def start_all_gather(own: Tensor, group: dist.ProcessGroup) -> Pending:
    """[R, ...] of every rank as [P, R, ...]."""
    own = own.contiguous()
    gathered = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
    work = dist.all_gather_into_tensor(gathered, own, group=group, async_op=True)
    return Pending(gathered.unflatten(0, (group.size(), -1)), own, work)


def start_reduce_scatter(by_rank: Tensor, group: dist.ProcessGroup) -> Pending:
    """Sum over the ranks of [P, R, ...], of which each gets its own [R, ...]."""
    own, parts = torch.empty_like(by_rank[0]), by_rank.flatten(0, 1).contiguous()
    work = dist.reduce_scatter_tensor(own, parts, group=group, async_op=True)
    return Pending(own, parts, work)


def documents_between(offsets: Tensor, batch: int, sequence: int, first: int, stop: int) -> Tensor:
    """Documents of the tokens `first` .. `stop` of every sequence, packed as rows of their own.

    `offsets` int32 [documents + 1] count in all B * S tokens, the result, int32
    [B * (documents + 1)], in B * (stop - first); most of its documents are empty.
    """
    row = torch.arange(batch, dtype=offsets.dtype, device=offsets.device).unsqueeze(1)
    inside = (offsets - row * sequence).clamp(first, stop) - first
    return (inside + row * (stop - first)).flatten()


def describe_context(config: HySparseConfig, sequence: int, batch: int) -> str:
    """One line: what a rank holds of `batch` sequences, and what it is sent in a forward pass."""
    ranks, model = config.context_parallel_size, config.architecture
    elements = config.groups_per_rank() * (model.head_dim + model.value_dim) * batch
    element_bytes = elements * config.params_dtype.itemsize
    others = sequence - sequence // ranks
    kinds = config.plan.layout.kinds
    tails = 2 * (ranks - 1) * (model.window - 1)
    return (
        f"context parallel {ranks}: two chunks of {sequence // (2 * ranks):,} tokens on a rank; of "
        f"others it is sent {others * element_bytes:,} bytes of keys and values by each of "
        f"{sum(kind.is_oracle for kind in kinds)} full layers, for all its readers, and "
        f"{tails * element_bytes:,} bytes before each of "
        f"{sum(Branch.WINDOW in kind.branches for kind in kinds)} windows, per micro-batch"
        + ("" if config.cp_keep_kv else "; keys and values come once more in the backward pass")
    )
