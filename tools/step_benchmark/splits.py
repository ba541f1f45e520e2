"""Over how many devices a case is spread, and how: `1`, `dp2`, `tp2-cp4`, `cp2-layerwise`, ..."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass

_KEYS = ("dp", "tp", "pp", "cp", "ep")
APART = "apart"
"""Data-parallel ranks send between steps what they send beside computing otherwise."""
LAYERWISE = "layerwise"
"""Context-parallel ranks gather keys and values for every layer that reads them, not once."""


@dataclass(frozen=True)
class Split:
    """Sizes of parallelism; of what is not named there is no splitting."""

    sizes: tuple[tuple[str, int], ...] = ()
    way: str | None = None
    """`APART`, `LAYERWISE` or as training does."""

    def __str__(self) -> str:
        parts = [f"{key}{size}" for key, size in self.sizes]
        return "-".join(parts + ([self.way] if self.way else [])) or "1"

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
        if "tp" in dict(self.sizes):
            found.append("parallel.sequence_parallel=true")
        if self.way == APART:
            overlap = "parallel.overlap"
            found += [f"{overlap}.grad_reduce=false", f"{overlap}.param_gather=false"]
        return found


ONE = Split()


def read_split(text: str) -> Split:
    """What an option says. Raises ArgumentTypeError."""
    if text == "1":
        return ONE
    way = next((way for way in (APART, LAYERWISE) if text.endswith(f"-{way}")), None)
    names = text.removesuffix(f"-{way}")
    parts = [re.fullmatch(r"([a-z]+)([0-9]+)", part) for part in names.split("-")]
    sizes = tuple((part[1], int(part[2])) for part in parts if part)
    keys = [key for key, _ in sizes]
    if len(sizes) < len(parts) or set(keys) - set(_KEYS) or len(set(keys)) < len(keys):
        raise argparse.ArgumentTypeError(
            f"got {text}; allowed 1, or {', '.join(_KEYS)} with a number, joined by -: tp2-cp4, "
            f"and at the end -{APART} for nothing sent beside computing, or -{LAYERWISE} for keys "
            "and values gathered in every layer"
        )
    if min(size for _, size in sizes) < 2:
        raise argparse.ArgumentTypeError(f"got {text}; allowed sizes from 2, or 1 for no splitting")
    if way == LAYERWISE and ("cp" not in keys or "pp" in keys):
        raise argparse.ArgumentTypeError(f"got {text}; allowed cp, and no pp, with -{LAYERWISE}")
    return Split(sizes, way)
