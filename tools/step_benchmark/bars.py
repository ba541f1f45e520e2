"""Ratios of layouts measured in one run, with the goal beside each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hysparse_megatron.architecture.model import ModelConfig

from .rows import Row
from .slices import FULL, HYSPARSE, MEGATRON, SWA

_GEOMETRIES = {(2048, 64, 4): "80B-A3B", (4096, 32, 8): "7B"}
"""Hidden size, query heads and KV groups of the models that have goals."""

_GOALS = {
    ("80B-A3B", 32768): 2.5,
    ("80B-A3B", 131072): 4.5,
    ("7B", 32768): 1.35,
}
"""How many times faster than full attention a step of HySparse shall be."""


@dataclass(frozen=True)
class Bar:
    """A ratio, and what it should reach at least; `goal` None: for information."""

    text: str
    value: float
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        return None if self.goal is None else self.value >= self.goal

    def line(self) -> str:
        """`full / hysparse [32768, 80B-A3B] 3.01 (bar at least 2.50) ok`."""
        if self.goal is None:
            return f"  {self.text} {self.value:.2f}"
        verdict = "ok" if self.met else "MISSED"
        return f"  {self.text} {self.value:.2f} (bar at least {self.goal:.2f}) {verdict}"


def geometry(model: ModelConfig) -> str | None:
    """The name of the paper's model with these dimensions."""
    dimensions = (model.hidden_size, model.num_attention_heads, model.num_query_groups)
    return _GEOMETRIES.get(dimensions)


def bars(rows: Sequence[Row]) -> list[Bar]:
    """All that the rows allow, length by length."""
    lengths = dict.fromkeys(row.case.length for row in rows)
    return [bar for length in lengths for bar in _of_length(rows, length)]


def _of_length(rows: Sequence[Row], length: int) -> Iterator[Bar]:
    found = {row.case.label: row for row in rows if row.case.length == length and row.timing}
    if not found:
        return
    name = geometry(next(iter(found.values())).case.config.model)
    where = f"[{', '.join(filter(None, (str(length), name)))}]"
    # Our full layers shall be no slower than megatron-core's own.
    goals = {
        (FULL, HYSPARSE): _GOALS.get((name or "", length)),
        (MEGATRON, FULL): 1.0 if name else None,
    }
    for slow, fast in ((FULL, HYSPARSE), (SWA, HYSPARSE), (FULL, SWA), (MEGATRON, FULL)):
        if slow in found and fast in found:
            ratio = _seconds(found[slow]) / _seconds(found[fast])
            yield Bar(f"{slow} / {fast} {where}", ratio, goals.get((slow, fast)))
    for row in found.values():
        if row.case.again and row.case.name in found:
            ratio = _seconds(row) / _seconds(found[row.case.name])
            yield Bar(f"drift: {row.case.label} / {row.case.name} {where}", ratio)


def _seconds(row: Row) -> float:
    assert row.timing is not None
    return row.timing.median
