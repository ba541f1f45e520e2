"""Over how many devices a case is spread, and how: `1`, `dp2`, `cp2`, `tp2-cp4`, ..."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass

_KEYS = ("dp", "tp", "pp", "cp", "ep")


@dataclass(frozen=True)
class Split:
    """Sizes of parallelism; of what is not named there is no splitting."""

    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return "-".join(f"{key}{size}" for key, size in self.sizes) or "1"

    @property
    def ranks(self) -> int:
        """Processes, each with a device of its own; experts lie on those of the others."""
        return math.prod(size for key, size in self.sizes if key != "ep")

    @property
    def dp(self) -> int:
        """Model replicas, each of which takes micro-batches of its own."""
        return dict(self.sizes).get("dp", 1)

    @property
    def overrides(self) -> list[str]:
        """Settings; tensor parallelism as it is used, with sequence parallelism."""
        found = [f"parallel.{key}={size}" for key, size in self.sizes if key != "dp"]
        return [*found, *(["parallel.sequence_parallel=true"] if "tp" in dict(self.sizes) else [])]


ONE = Split()


def read_split(text: str) -> Split:
    """What an option says. Raises ArgumentTypeError."""
    if text == "1":
        return ONE
    parts = [re.fullmatch(r"([a-z]+)([0-9]+)", part) for part in text.split("-")]
    sizes = tuple((part[1], int(part[2])) for part in parts if part)
    names = [key for key, _ in sizes]
    if len(sizes) < len(parts) or set(names) - set(_KEYS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"got {text}; allowed 1, or {', '.join(_KEYS)} with a number, joined by -: tp2-cp4"
        )
    if min(size for _, size in sizes) < 2:
        raise argparse.ArgumentTypeError(f"got {text}; allowed sizes from 2, or 1 for no splitting")
    return Split(sizes)
