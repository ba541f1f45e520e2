"""Ratios of layouts measured in one run, with the goal beside each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from hysparse_kernels.benchmarking.targets import Target

from hysparse_megatron.architecture.model import ModelConfig

from .rows import Row
from .slices import FULL, HYSPARSE, MEGATRON, SWA
from .splits import LAYERWISE, ONE

_GEOMETRIES = {(2048, 64, 4): "80B-A3B", (4096, 32, 8): "7B"}
"""Hidden size, query heads and KV groups of the models that have goals."""

_GOALS = {
    ("80B-A3B", 32768): 2.5,
    ("80B-A3B", 131072): 4.5,
    ("7B", 32768): 1.35,
}
"""How many times faster than full attention a step of HySparse shall be."""


def geometry(model: ModelConfig) -> str | None:
    """The name of the paper's model with these dimensions."""
    dimensions = (model.hidden_size, model.num_attention_heads, model.num_query_groups)
    return _GEOMETRIES.get(dimensions)


def targets(rows: Sequence[Row]) -> list[Target]:
    """All that the rows allow, length by length."""
    lengths = dict.fromkeys(row.case.length for row in rows)
    return [found for length in lengths for found in _of_length(rows, length)]


def _of_length(rows: Sequence[Row], length: int) -> Iterator[Target]:
    measured = [row for row in rows if row.case.length == length and row.timing]
    for split in dict.fromkeys(row.case.split for row in measured):
        yield from _of_split([row for row in measured if row.case.split == split], length)
    alone = {row.case.name: row for row in measured if row.case.split == ONE}
    for row in measured:
        if row.case.again or row.case.split == ONE:
            continue
        if row.case.split.way is not None:
            plain = dataclasses.replace(row.case.split, way=None)
            for other in measured:
                if (other.case.name, other.case.split) == (row.case.name, plain):
                    ratio = _median_ms(row) / _median_ms(other)
                    yield Target(f"{row.case.label} / {other.case.label} [{length}]", ratio)
        # Plans know nothing of keys that are gathered in every layer.
        if row.case.name in alone and row.case.split.way != LAYERWISE:
            one = alone[row.case.name]
            ratio = row.tokens_per_second / one.tokens_per_second
            planned = row.case.planned_tokens_per_second / one.case.planned_tokens_per_second
            text = f"{row.case.label} / one device, tokens a second, planned {planned:.2f}"
            yield Target(f"{text} [{length}]", ratio)


def _of_split(rows: Sequence[Row], length: int) -> Iterator[Target]:
    found = {f"{row.case.name} again" if row.case.again else row.case.name: row for row in rows}
    name = geometry(next(iter(found.values())).case.config.model)
    split = rows[0].case.split
    parts = (str(length), name, None if split == ONE else str(split))
    where = f"[{', '.join(filter(None, parts))}]"
    # Our full layers shall be no slower than megatron-core's own.
    goals = {
        (FULL, HYSPARSE): _GOALS.get((name or "", length)),
        (MEGATRON, FULL): 1.0 if name else None,
    }
    for slow, fast in ((FULL, HYSPARSE), (SWA, HYSPARSE), (FULL, SWA), (MEGATRON, FULL)):
        if slow in found and fast in found:
            ratio = _median_ms(found[slow]) / _median_ms(found[fast])
            yield Target(f"{slow} / {fast} {where}", ratio, goals.get((slow, fast)), at_least=True)
    for row in found.values():
        if row.case.again and row.case.name in found:
            ratio = _median_ms(row) / _median_ms(found[row.case.name])
            yield Target(f"drift: {row.case.label} / {row.case.name} {where}", ratio)


def _median_ms(row: Row) -> float:
    assert row.timing is not None
    return row.timing.median_ms
