"""Which layers stand on which pipeline stage, and what each cut sends.

The same plan is made on every rank from the configuration alone, so no rank ever has to be told
the shape of what it receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf

from hysparse_megatron.architecture.layout import Layout, LayoutError, parse_layout

MAX_PAYLOAD_BLOCKS = {2: 0x7F7F, 4: 0x7F7FFFFF}
"""Largest block count that can cross a cut, per payload element size (bytes).

Indices travel as the bits of index + 1. Below these limits no such pattern is an Inf or NaN in
bf16 (or fp32), so a scan of the payload for bad numbers stays meaningful."""


@dataclass(frozen=True)
class PipelinePlan:
    """The layers of every pipeline stage, in model order.

    Stage `chunk * pp + rank` runs on pipeline rank `rank` as its model chunk `chunk`.
    """

    layout: Layout
    stages: tuple[range, ...]
    pp: int

    @property
    def num_chunks(self) -> int:
        """Model chunks per pipeline rank (1 without interleaving)."""
        return len(self.stages) // self.pp

    def stage_index(self, pp_rank: int, chunk: int) -> int:
        """Model-order index of the stage that is chunk `chunk` of pipeline rank `pp_rank`."""
        return chunk * self.pp + pp_rank

    def oracle_into(self, stage: int) -> int | None:
        """The oracle whose key, value and indices enter `stage` from the stage before it."""
        if stage == 0:
            return None
        return live_oracle(self.layout, self.stages[stage].start)

    def oracle_out_of(self, stage: int) -> int | None:
        """The oracle whose key, value and indices leave `stage` for the next one."""
        return None if stage + 1 == len(self.stages) else self.oracle_into(stage + 1)

    def is_read(self, layer: int) -> bool:
        """Whether any sparse layer reads the oracle at `layer`."""
        return layer in self._oracles_read

    @cached_property
    def _oracles_read(self) -> frozenset[int | None]:
        return frozenset(plan.oracle for plan in self.layout.layers)

    @property
    def megatron_pattern(self) -> str:
        """The stages in megatron-core's hybrid pattern: `*` for each layer, `|` for each cut."""
        return "|".join("*" * len(stage) for stage in self.stages)

    def place_of(self, layer: int) -> int:
        """The place of a layer in its stage, both from 0."""
        return layer - max(stage.start for stage in self.stages if stage.start <= layer)

    def describe(self) -> str:
        """One line per stage: where it runs, its layers, what enters it."""
        lines = []
        for index, stage in enumerate(self.stages):
            kinds = self.layout.letters[stage.start : stage.stop]
            oracle = self.oracle_into(index)
            enters = "" if oracle is None else f", reads on from oracle {oracle} across the cut"
            lines.append(
                f"stage {index} (pp rank {index % self.pp}, chunk {index // self.pp}): "
                f"layers {stage.start}-{stage.stop - 1} {kinds}{enters}"
            )
        return "\n".join(lines)


@lru_cache(maxsize=256)  # a search over plans asks for the same cuts again and again
def plan_pipeline(layout_text: str, pp: int, vpp: int | None = None) -> PipelinePlan:
    """Cut the layers of a layout into pp * vpp stages. Raises `LayoutError`."""
    layout = parse_layout(layout_text)
    return PipelinePlan(layout, stage_layers(layout, pp * (vpp or 1)), pp)


def live_oracle(layout: Layout, layer_index: int) -> int | None:
    """The oracle whose key, value and indices must cross a cut before `layer_index`, if any."""
    for plan in layout.layers[layer_index:]:
        if plan.kind.is_oracle:
            return None
        if plan.oracle is not None:
            return plan.oracle if plan.oracle < layer_index else None
    return None


def check_stages(layout: Layout, num_stages: int) -> None:
    """Raise `LayoutError` unless the layout, with its forced cuts, can fill `num_stages`."""
    if num_stages > layout.num_layers:
        message = f"{layout.num_layers} layers cannot fill {num_stages} pipeline stages"
        raise LayoutError.at(layout.text, max(len(layout.text.rstrip()) - 1, 0), message)
    if len(layout.cuts) > num_stages - 1:
        position = layout.cut_positions[num_stages - 1] if layout.cut_positions else 0
        message = f"{len(layout.cuts)} cuts, but {num_stages} pipeline stages take at most "
        raise LayoutError.at(layout.text, position, f"{message}{num_stages - 1}")


def stage_layers(layout: Layout, num_stages: int) -> tuple[range, ...]:
    """Split the layers into `num_stages` contiguous stages (pp * vpp of them, in model order).

    Forced cuts are kept; the others are chosen so that the most expensive stage costs as little
    as possible, then so that the fewest cuts fall inside a hybrid block (those must send key,
    value and indices), then so that the stages are as even as possible.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1, got {num_stages}")
    check_stages(layout, num_stages)
    return _balance(layout, num_stages, [kind.relative_time for kind in layout.kinds])


def _balance(layout: Layout, num_stages: int, costs: Sequence[float]) -> tuple[range, ...]:
    """Exact dynamic programme over (stages used, layers used), in two passes."""
    num_layers = layout.num_layers
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # A stage that ends before layer `end` starts at or after the last forced cut before it.
    earliest = [
        max((cut for cut in layout.cuts if cut < end), default=0)
        for end in range(1, 1 + num_layers)
    ]
    limit = _smallest_maximum(num_stages, prefix, earliest) * (1 + 1e-9)
    inside = [live_oracle(layout, index) is not None for index in range(num_layers)]

    # best[end]: (cuts inside a block, sum of squared stage costs) of the cheapest split.
    nothing = (num_layers + 1, inf)
    best: list[tuple[int, float]] = [(0, 0.0)] + [nothing] * num_layers
    starts: list[list[int]] = []
    for _ in range(num_stages):
        following = [nothing] * (num_layers + 1)
        chosen = [-1] * (num_layers + 1)
        for end in range(1, num_layers + 1):
            for start in range(end - 1, earliest[end - 1] - 1, -1):
                cost = prefix[end] - prefix[start]
                if cost > limit:
                    break
                crossings = best[start][0] + (inside[start] if start else 0)
                candidate = (crossings, best[start][1] + cost * cost)
                if candidate < following[end]:
                    following[end], chosen[end] = candidate, start
        best = following
        starts.append(chosen)

    stages: list[range] = []
    end = num_layers
    for chosen in reversed(starts):
        stages.append(range(chosen[end], end))
        end = chosen[end]
    return tuple(reversed(stages))


def _smallest_maximum(num_stages: int, prefix: list[float], earliest: list[int]) -> float:
    """The cost of the most expensive stage in the split that makes it as small as possible."""
    num_layers = len(prefix) - 1
    best = [0.0] + [inf] * num_layers
    for _ in range(num_stages):
        following = [inf] * (num_layers + 1)
        for end in range(1, num_layers + 1):
            for start in range(end - 1, earliest[end - 1] - 1, -1):
                cost = prefix[end] - prefix[start]
                if cost >= following[end]:
                    break
                following[end] = min(following[end], max(cost, best[start]))
        best = following
    return best[num_layers]
