"""What was measured: one row per implementation and pass, and where rows are looked up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hysparse_kernels.benchmarking.problem import Problem
from hysparse_kernels.benchmarking.timing import Timing

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
REPLAYED = "graph"
"""A forward recorded as a CUDA graph, without the time that its launches take."""


@dataclass(frozen=True)
class Row:
    """One implementation, one pass. Without a timing `note` says why there is none."""

    table: str
    problem: Problem
    selection: str | None
    """clustered, random, captured:layer; None where nothing is selected."""
    name: str
    label: str
    step: str
    timing: Timing | None = None
    tflops: float | None = None
    floor_ms: float | None = None
    extra_bytes: int | None = None
    """Peak memory beyond inputs and outputs."""
    tokens_per_second: float | None = None
    """Of a decode step or of prompts; attention alone."""
    bytes_per_token: int | None = None
    """That it must read."""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """All fields, the timing's among them."""
        fields = asdict(self)
        fields["shape"] = self.problem.shape
        fields |= fields.pop("timing") or {}
        return fields


class Rows:
    """All rows of a run."""

    def __init__(self) -> None:
        self.all: list[Row] = []

    def add(self, row: Row) -> Row:
        """Keep a row and give it back."""
        self.all.append(row)
        return row

    def median_ms(
        self, table: str, name: str, step: str, problem: Problem, selection: str | None = None
    ) -> float | None:
        """Median of a pass; None unless it was timed."""
        row = self.find(table, name, step, problem, selection)
        return None if row is None or row.timing is None else row.timing.median_ms

    def find(
        self, table: str, name: str, step: str, problem: Problem, selection: str | None = None
    ) -> Row | None:
        """The row with these keys."""
        wanted = (table, name, step, problem, selection)
        for row in self.all:
            if (row.table, row.name, row.step, row.problem, row.selection) == wanted:
                return row
        return None
