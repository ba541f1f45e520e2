"""What the attention of each kind of layer is: what it projects, sees, reads, shares, keeps, costs.

Model, planner, key-value cache, exporter and importer all read it here. A new layer letter, gate or
sink is a member of its enumeration and a case in this file; what a new layer computes stands in
`model.attention`. mypy and the first use report a case that is missing.

Shapes: S sequence, HQ query heads, HKV KV groups, D query/key head dim, DV value head dim, of all
tensor-parallel ranks together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import assert_never


class Branch(Enum):
    """One softmax of a layer, by the keys it goes over; its value is the name in reports."""

    FULL = "full"
    """All keys up to the query, of which it also selects blocks."""
    SELECTED = "sparse"
    """The blocks that the oracle selected, with the oracle's keys and values."""
    WINDOW = "window"
    """The last `window` keys of the layer's own."""


class LayerKind(Enum):
    """What a layer's attention is; the value is its letter in a layout."""

    FULL = "F", "full", (Branch.FULL,), 2.0
    SPARSE = "S", "sparse", (Branch.SELECTED, Branch.WINDOW), 1.5
    WINDOW = "W", "window", (Branch.WINDOW,), 1.0

    _value_: str
    label: str
    """Its name in messages and tables."""
    branches: tuple[Branch, ...]
    relative_time: float
    """Rough time of one layer beside others, used to balance pipeline stages."""

    def __new__(
        cls, letter: str, label: str, branches: tuple[Branch, ...], relative_time: float
    ) -> LayerKind:
        """A kind of this letter, which alone is its value."""
        kind = object.__new__(cls)
        kind._value_, kind.label = letter, label
        kind.branches, kind.relative_time = branches, relative_time
        return kind

    @property
    def is_oracle(self) -> bool:
        """Whether sparse layers after it read its key, value and selection."""
        return Branch.FULL in self.branches

    @property
    def reads_oracle(self) -> bool:
        """Whether it reads key, value and selection of the nearest oracle before it."""
        return Branch.SELECTED in self.branches

    @property
    def caches_all(self) -> bool:
        """Whether its cache holds all tokens of a sequence, instead of a window."""
        return Branch.FULL in self.branches


KINDS = {kind.value: kind for kind in LayerKind}
"""By letter."""


class GateKind(Enum):
    """Granularity of the two sigmoid gates of a sparse layer."""

    head = "head"
    channel = "channel"


class FullGate(Enum):
    """Sigmoid gate on the output of a full-attention layer (gated attention)."""

    none = "none"
    head = "head"
    channel = "channel"


class SinkKind(Enum):
    """The learnable extra logit in the softmax of a sparse layer's two branches."""

    branch = "branch"
    shared = "shared"
    none = "none"


@dataclass(frozen=True)
class Part:
    """One output of the fused projection: `width` channels per query head, or per KV group."""

    name: str
    width: int
    per_head: bool


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """The settings of a model that its attention layers are made of."""

    hidden_size: int
    num_heads: int
    """Query heads."""
    num_groups: int
    """KV groups."""
    head_dim: int
    value_dim: int
    window: int
    """Tokens."""
    selected_tokens: int
    """Tokens of all blocks that a query selects."""
    qkv_bias: bool
    qk_norm: bool
    gate: GateKind
    full_gate: FullGate
    sink: SinkKind


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer."""

    kind: LayerKind
    sizes: AttentionSizes

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the fused projection computes, in the order of its rows in one KV group."""
        return (
            Part("query", self.sizes.head_dim, per_head=True),
            Part("key", self.sizes.head_dim, per_head=False),
            Part("value", self.sizes.value_dim, per_head=False),
            *self.gates,
        )

    @property
    def gates(self) -> tuple[Part, ...]:
        """Those of `parts` that are logits of gates."""
        match self.kind:
            case LayerKind.FULL:
                return self._gates(self.sizes.full_gate, "gate")
            case LayerKind.SPARSE:
                return self._gates(self.sizes.gate, "sparse_gate", "window_gate")
            case LayerKind.WINDOW:
                return ()
            case _:
                assert_never(self.kind)

    def _gates(self, gate: GateKind | FullGate, *names: str) -> tuple[Part, ...]:
        match gate:
            case FullGate.none:
                return ()
            case GateKind.head | FullGate.head:
                width = 1
            case GateKind.channel | FullGate.channel:
                width = self.sizes.value_dim
            case _:
                assert_never(gate)
        return tuple(Part(name, width, per_head=True) for name in names)

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names of its learnable sinks, one logit per head each, in the order of `branches`.

        A single one serves all branches.
        """
        if self.kind.is_oracle:
            return ()
        match self.sizes.sink:
            case SinkKind.none:
                return ()
            case SinkKind.branch:
                return tuple(f"{branch.value}_sink" for branch in self.kind.branches)
            case SinkKind.shared:
                return ("shared_sink",) if len(self.kind.branches) > 1 else ("window_sink",)
            case _:
                assert_never(self.sizes.sink)

    @property
    def head_rows(self) -> int:
        """Rows of the fused projection that one query head owns."""
        return sum(part.width for part in self.parts if part.per_head)

    @property
    def group_rows(self) -> int:
        """Rows of the fused projection that one KV group owns besides those of its heads."""
        return sum(part.width for part in self.parts if not part.per_head)

    @property
    def projection_rows(self) -> int:
        """Rows of the fused projection."""
        return self.sizes.num_heads * self.head_rows + self.sizes.num_groups * self.group_rows

    @property
    def output_width(self) -> int:
        """Channels of all heads' outputs, which the output projection reads."""
        return self.sizes.num_heads * self.sizes.value_dim

    @property
    def num_matrix_parameters(self) -> int:
        """Weights of the fused projection and the output projection."""
        return self.sizes.hidden_size * (self.projection_rows + self.output_width)

    @property
    def num_vector_parameters(self) -> int:
        """Biases of the fused projection, and sinks."""
        biases = self.projection_rows if self.sizes.qkv_bias else 0
        return biases + len(self.sinks) * self.sizes.num_heads

    @property
    def num_norm_parameters(self) -> int:
        """Those of the norms of query and key."""
        return 2 * self.sizes.head_dim if self.sizes.qk_norm else 0

    def flops(self, sequence: int) -> dict[Branch, float]:
        """Forward FLOPs per token of each branch, besides those of the projections.

        Scores and weighted values of all heads, averaged over the queries of `sequence` tokens.
        """
        per_key = 2 * self.sizes.num_heads * (self.sizes.head_dim + self.sizes.value_dim)
        return {
            branch: per_key * mean_keys_seen(sequence, self._most_keys(branch))
            for branch in self.kind.branches
        }

    def _most_keys(self, branch: Branch) -> int | None:
        match branch:
            case Branch.FULL:
                return None
            case Branch.SELECTED:
                return self.sizes.selected_tokens
            case Branch.WINDOW:
                return self.sizes.window
            case _:
                assert_never(branch)

    def cached_numbers(self, tokens: int) -> int:
        """Keys and values that its cache holds after `tokens` tokens of a sequence."""
        kept = tokens if self.kind.caches_all else min(tokens, self.sizes.window)
        return kept * self.sizes.num_groups * (self.sizes.head_dim + self.sizes.value_dim)


def mean_keys_seen(sequence: int, limit: int | None = None) -> float:
    """Keys a causal query sees, averaged over a sequence, if it may see `limit` at most."""
    if limit is None or limit >= sequence:
        return (sequence + 1) / 2
    return limit - limit * (limit - 1) / (2 * sequence)
