"""What preflight found, one line a check: OK, WARN or FAIL, and for the last two what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad it is. A run may start with warnings, and not with a failure."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"\n      {self.what:<14}{self.fix}" if self.fix else ""
        return f"{self.level.value:<6}{self.what:<14}{self.found}{fix}"


def ok(what: str, found: str) -> Finding:
    """A check that passed."""
    return Finding(Level.OK, what, found)


def warn(what: str, found: str, fix: str) -> Finding:
    """Something that will surprise."""
    return Finding(Level.WARN, what, found, fix)


def fail(what: str, found: str, fix: str) -> Finding:
    """Something that the run would fail on."""
    return Finding(Level.FAIL, what, found, fix)


def has_failed(findings: Sequence[Finding]) -> bool:
    """Whether the run must not start."""
    return any(finding.level is Level.FAIL for finding in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """All of them, for a terminal."""
    return "\n".join(map(str, findings))
