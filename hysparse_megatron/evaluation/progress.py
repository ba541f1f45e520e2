"""How far a long evaluation is, on standard error, so that standard output holds results alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from hysparse_megatron.tracking.metrics import duration

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Tells what begins at once, and then every ten seconds how much is done and the time left.

    Args:
        label: what is done, in words.
        total: how much work it is, in any unit; 0 says nothing.
        is_quiet: as on all ranks but the first.
    """

    def __init__(
        self,
        label: str,
        total: int,
        is_quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total, self._is_quiet = label, total, is_quiet
        self._clock = clock
        self._done = 0
        self._started = self._told = clock()
        self._log(label)

    def advance(self, amount: int) -> None:
        """More of the work is done."""
        self._done += amount
        now = self._clock()
        if now - self._told < SECONDS_BETWEEN_LINES or self._done >= self._total:
            return
        self._told = now
        left = (now - self._started) / self._done * (self._total - self._done)
        self._log(f"{self._label}: {self._done / self._total:.0%} done, ETA {duration(left)}")

    def by(self, weight: int) -> Callable[[int], None]:
        """`advance` by so much for each of a number of pieces."""
        return lambda pieces: self.advance(weight * pieces)

    def counting[Item](self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each is one of the total when the next is asked for."""
        for item in items:
            yield item
            self.advance(1)

    def _log(self, text: str) -> None:
        if not self._is_quiet and self._total:
            print(text, file=sys.stderr, flush=True)
