"""Several datasets in one stream of samples, by weights, as a pure function of the position.

Weights are fractions with a common denominator P, so that the stream repeats a pattern of P places.
The pattern is made once: of the datasets that are behind their share the one whose next sample is
due first gets the place (Tijdeman, "The chairman assignment problem", 1980), which keeps every
dataset within one sample of its share at every place. No table grows with the number of samples.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

MOST_PLACES = 100_000
"""Places of the longest pattern: weights are kept to five digits."""


class Blend:
    """Which dataset each position of the stream belongs to.

    Args:
        weights: of each dataset, positive, any scale: shares of samples, which are all as long.

    Raises:
        ValueError: a weight that is not positive and finite, or none.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"weights must be positive numbers, got {list(weights)}")
        self.shares = _shares(weights)
        """Of each dataset; they add up to 1."""
        self._pattern = _pattern(self.shares)
        of_dataset = self._pattern == np.arange(len(weights))[:, None]
        self._counts = of_dataset.sum(1)
        # How many places of the same dataset come before each place of the pattern.
        self._earlier = (np.cumsum(of_dataset, axis=1) - 1)[
            self._pattern, np.arange(len(self._pattern))
        ]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset, and position in its own stream, of positions int64 [n] of the blended stream."""
        turns, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self._pattern))
        which = self._pattern[places]
        return which, turns * self._counts[which] + self._earlier[places]


def _shares(weights: Sequence[float | Fraction]) -> list[Fraction]:
    """Shares with a common denominator of about MOST_PLACES, exactly those given if it can be."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) <= MOST_PLACES:
        return shares
    counts = [max(1, round(share * MOST_PLACES)) for share in shares]
    return [Fraction(count, sum(counts)) for count in counts]


def _pattern(shares: Sequence[Fraction]) -> np.ndarray:
    """int64 [P]: the dataset of each place."""
    places = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * places) for share in shares]
    # Sample m of a dataset may come from place floor(m P / count) on and is due at
    # ceil((m + 1) P / count) - 1.
    coming = [(0, dataset, 0) for dataset in range(len(shares))]
    heapq.heapify(coming)
    waiting: list[tuple[int, int, int]] = []
    pattern = np.empty(places, dtype=np.int64)
    for place in range(places):
        while coming and coming[0][0] <= place:
            _, dataset, number = heapq.heappop(coming)
            due = -(-(number + 1) * places // counts[dataset]) - 1
            heapq.heappush(waiting, (due, dataset, number))
        _, dataset, number = heapq.heappop(waiting)
        pattern[place] = dataset
        if number + 1 < counts[dataset]:
            heapq.heappush(coming, ((number + 1) * places // counts[dataset], dataset, number + 1))
    return pattern
