"""A measured number beside where it should be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A measured number and where it should be; `limit` None: no target, for information."""

    text: str
    value: float
    limit: float | None = None
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        """`oracle forward / cuDNN forward 1.07 (target 1.10) ok`."""
        number = f"{self.value:.2f}{self.unit}"
        if self.limit is None:
            return f"  {self.text} {number}"
        bound = "at least " if self.at_least else ""
        verdict = "ok" if self.met else "MISSED"
        return f"  {self.text} {number} (target {bound}{self.limit:.2f}{self.unit}) {verdict}"
