"""Median and quartiles of repeated calls. Imports no torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of one call, in milliseconds."""

    median_ms: float
    low_ms: float
    high_ms: float
    repetitions: int

    @classmethod
    def of(cls, times_ms: list[float]) -> Timing:
        """The numbers of single repetitions."""
        if len(times_ms) < 2:
            return cls(times_ms[0], times_ms[0], times_ms[0], 1)
        low, median, high = statistics.quantiles(times_ms, n=4, method="inclusive")
        return cls(median, low, high, len(times_ms))
