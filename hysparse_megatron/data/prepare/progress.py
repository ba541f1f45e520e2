"""How a preparation tells what it does: a bar with rate and time left, and lines above it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hysparse_megatron.packages import require_package

_TOLD_EVERY = 100_000_000


class Progress:
    """One bar at a time on standard error, without a terminal a line every 30 seconds.

    Args:
        is_quiet: show no bar, and no lines but warnings.
    """

    def __init__(self, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._bar: Any = None
        self._tqdm = None if is_quiet else require_package("tqdm", "the progress bar").tqdm

    def start(self, label: str, unit: str, total: int, done: int = 0) -> None:
        """Begin a bar of `total` units (B or tokens) of which `done` were done before."""
        self.close()
        if self._tqdm is not None:
            self._bar = self._tqdm(
                desc=label, total=total, initial=done, unit=unit, unit_scale=True,
                dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30.0,
            )  # fmt: skip

    def advance(self, amount: int) -> None:
        """More units are done."""
        if self._bar is not None:
            self._bar.update(amount)

    def note(self, line: str) -> None:
        """Print a line, unless quiet."""
        if not self._is_quiet:
            self.warn(line)

    def warn(self, line: str) -> None:
        """Print a line."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Lines(Progress):
    """Tells everything to `log`, one line at a time: for what is logged."""

    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__(is_quiet=True)
        self._log = log
        self._done = self._told = 0

    def start(self, label: str, unit: str, total: int, done: int = 0) -> None:
        """Tell what begins."""
        self._done = self._told = done
        self.note(f"{label} {total / 1e6:,.1f} M{unit}")

    def advance(self, amount: int) -> None:
        """Tell from time to time how far it is."""
        self._done += amount
        if self._done - self._told >= _TOLD_EVERY:
            self._told = self._done
            self.note(f"{self._done / 1e6:,.0f} M done")

    def note(self, line: str) -> None:
        """Tell a line."""
        self._log(line)

    warn = note
