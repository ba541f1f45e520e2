"""What the attention layers do in one forward pass: how good selections are, and what gates open.

While a probe watches, the attention layers of a rank attend through it: it looks at their first
micro-batch, at a few dozen queries of it. It runs no layer and changes nothing. What the ranks
found is added up by two all-reduces, whatever each of them holds.

Shapes: S sequence, B batch, P queries of the sample, HQ query heads and HKV KV groups on this rank,
D head dim, K selected blocks, L layers of the model.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from hysparse_kernels import has_a_choice, selected_mass_of_sample, shared_blocks
from hysparse_kernels.documents import document_starts_in_rows
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hysparse_megatron.model.attend import Branches, Projected, TrainingAttend
from hysparse_megatron.model.context_parallel import Shard, rows_before
from hysparse_megatron.model.megatron_config import HySparseConfig
from hysparse_megatron.model.sharing import Shared, SharedAttention
from hysparse_megatron.model.stack import attending_with
from hysparse_megatron.runtime.clock import ForwardClock
from hysparse_megatron.runtime.random import derive_seed

NUM_QUERIES = 32
"""Queries looked at in every sequence, one in each 32nd of it."""

QUANTITIES = (
    "oracle_mass",
    "neighbour_agreement",
    "sparse_gate",
    "window_gate",
    "sparse_sink",
    "window_sink",
    "shared_sink",
)
"""What is measured, each a mean per layer:

oracle_mass: share of an oracle's softmax that falls on the blocks it selects, over heads and those
queries that see more blocks than they may select;
neighbour_agreement: share of these queries' blocks that the query before selects too, over groups;
the gates of a sparse layer, over heads (and channels) and queries; the sinks, over heads."""

_NOT_HERE = -2
"""Below every block id, -1 included."""


@dataclass(frozen=True)
class Findings:
    """What the ranks found; the same on all of them."""

    values: dict[str, float]
    """`quantity/layer_007` to its mean."""
    positions: list[int]
    """The P queries, ascending."""
    document_starts: list[int]
    """Of each query: where its document starts, from which its blocks count."""
    selections: dict[int, list[list[int]]]
    """By oracle layer, for its first KV group and the first sequence of the first data-parallel
    rank: the blocks of each query, ascending, without padding."""
    seconds: float
    """What looking took, on the rank where it took longest, and adding up on this one."""


class Probe:
    """What one rank looks at, and what it found."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        config: HySparseConfig,
        groups: ProcessGroupCollection,
        sequence: int,
        device: torch.device,
    ) -> None:
        """`chunks` are the rank's model chunks, `sequence` the length of every sequence."""
        self._chunks = chunks
        self._config = config
        self._device = device
        self._speaks = groups.dp.rank() == groups.tp.rank() == 0
        self._sequence = sequence
        self.positions = sample_positions(config.init_seed, sequence)
        self._shard, self._context_group = Shard.of(groups.cp, sequence), groups.cp
        held = self._shard.positions(device)
        sampled = torch.tensor(self.positions, device=device)
        # With context parallelism a rank looks at those of the sample that it holds.
        self._rows = torch.isin(held, sampled).nonzero().squeeze(1)
        self._positions = held[self._rows]
        self._places = torch.searchsorted(sampled, self._positions)
        layers = config.plan.layout.num_layers
        self._oracles = [layer for layer in range(layers) if config.plan.is_read(layer)]
        self._clock = ForwardClock(device)
        self._clear()

    def _clear(self) -> None:
        self._seen: set[int] = set()
        layers = self._config.plan.layout.num_layers
        # Of every layer and quantity the sum and the number of what was summed.
        self._sums = torch.zeros(
            layers, len(QUANTITIES), 2, dtype=torch.float64, device=self._device
        )
        count, kept = len(self.positions), self._config.architecture.num_selected_blocks
        self._starts = torch.full((count,), _NOT_HERE, dtype=torch.int32, device=self._device)
        self._blocks = torch.full(
            (len(self._oracles), count, kept), _NOT_HERE, dtype=torch.int32, device=self._device
        )

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the next micro-batch that each layer computes within this context."""
        self._clear()
        with attending_with(self._chunks, functools.partial(_ProbedAttend, probe=self)):
            yield

    def look(self, layer: int, at: Callable[..., None], *what: Any) -> None:
        """`at(layer, *what)`, timed, for the first micro-batch of the layer alone."""
        if layer not in self._seen:
            self._seen.add(layer)
            with torch.no_grad(), self._clock.running():
                at(layer, *what)

    def look_at_branches(
        self, layer: int, gates: Sequence[Tensor], sinks: Sequence[Tensor | None]
    ) -> None:
        """At logits of gates [S, B, HQ, 1 or DV] and sinks [HQ], as the layer is described."""
        model = self._config.architecture
        described = model.attention(self._config.plan.layout.kinds[layer])
        for part, logits in zip(described.gates, gates, strict=True):
            self._add(layer, part.name, torch.sigmoid(logits[self._rows].float()))
        # A sink that branches share is given for each of them; a branch may have none.
        given = [sink for sink in sinks if sink is not None]
        for name, sink in zip(described.sinks, given, strict=False):
            self._add(layer, name, sink)

    def look_at_oracle(
        self, layer: int, query: Tensor, shared: SharedAttention, documents: Tensor | None
    ) -> None:
        """At the rotated query [S, B, HQ, D] of an oracle, and what it shares."""
        rows, block_size = self._rows, self._config.architecture.block_size
        indices = cast(Tensor, shared.block_indices)
        batch = indices.shape[0]
        chosen = has_a_choice(
            self._positions,
            self._config.architecture.num_selected_blocks,
            block_size=block_size,
            batch=batch,
            sequence=self._sequence,
            cu_seqlens=documents,
        ).unsqueeze(1)
        mass = selected_mass_of_sample(
            query[rows].transpose(0, 1),
            shared.key.transpose(0, 1),
            indices[:, :, rows],
            self._positions,
            block_size=block_size,
            cu_seqlens=documents,
        )
        self._add(layer, "oracle_mass", mass, chosen)
        # Whoever has a choice is not the first of its document.
        before = rows_before(indices, 2, self._shard, self._context_group)
        agreement = shared_blocks(before[:, :, rows], indices[:, :, rows])
        self._add(layer, "neighbour_agreement", agreement, chosen)
        if self._speaks:
            self._blocks[self._oracles.index(layer), self._places] = indices[0, 0, rows]
            self._starts[self._places] = 0
            if documents is not None:
                starts = document_starts_in_rows(documents, batch, self._sequence)
                self._starts[self._places] = starts[0, self._positions].int()

    def _add(
        self, layer: int, quantity: str, values: Tensor, counted: Tensor | None = None
    ) -> None:
        """Add the values to the sum, of [B, heads, P] those where `counted` [B, 1, P] is true."""
        values = values.double()
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
        total = torch.where(counted, values, 0.0).sum()
        summed = torch.stack([total, counted.expand_as(values).sum().double()])
        self._sums[layer, QUANTITIES.index(quantity)] += summed

    def gather(self) -> Findings:
        """What all ranks saw since `watching`. Collective over the default group."""
        started = time.monotonic()
        looked = self._starts.new_tensor([round(1e6 * self._clock.take())])
        seen = torch.cat([looked, self._starts, self._blocks.flatten()])
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        dist.all_reduce(self._sums)
        sums, (microseconds, *numbers) = self._sums.tolist(), seen.tolist()
        values = {
            f"{quantity}/layer_{layer:03}": total / count
            for layer, row in enumerate(sums)
            for quantity, (total, count) in zip(QUANTITIES, row, strict=True)
            if count > 0
        }
        count, kept = self._blocks.shape[1:]
        starts, blocks = numbers[:count], iter(numbers[count:])
        selections = {
            layer: [
                [block for block in itertools.islice(blocks, kept) if block >= 0]
                for _ in range(count)
            ]
            for layer in self._oracles
        }
        seconds = microseconds / 1e6 + time.monotonic() - started
        return Findings(values, self.positions, starts, selections, seconds)


@dataclass(frozen=True, kw_only=True)
class _ProbedAttend(TrainingAttend):
    """Shows a probe what layers attend with."""

    probe: Probe

    def full(self, layer: int, own: Projected) -> tuple[Tensor, SharedAttention | None]:
        output, shared = super().full(layer, own)
        if shared is not None:
            self.probe.look(layer, self.probe.look_at_oracle, own.query, shared, self.documents)
        return output, shared

    def sparse(self, layer: int, own: Projected, branches: Branches, shared: Shared) -> Tensor:
        self.probe.look(layer, self.probe.look_at_branches, *branches)
        return super().sparse(layer, own, branches, shared)

    def window(self, layer: int, own: Projected, sink: Tensor | None) -> Tensor:
        self.probe.look(layer, self.probe.look_at_branches, (), (sink,))
        return super().window(layer, own, sink)


def sample_positions(seed: int, sequence: int) -> list[int]:
    """One position in each of `NUM_QUERIES` equal parts of a sequence; all of a short one.

    Drawn, because equal steps would always meet the same place inside a block.
    """
    count = min(NUM_QUERIES, sequence)
    edges = [sequence * part // count for part in range(count + 1)]
    return [
        start + derive_seed(seed, "probe", part) % (stop - start)
        for part, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
