"""Which steps are bad: not finite, or a spike over the recent past.

The past is part of the checkpoint's facts and not read back from `metrics.jsonl`: so it is the one
that belongs to the weights, also after falling back to an older checkpoint or in a copied one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from hysparse_megatron.config.schema import GuardConfig
from hysparse_megatron.training.control import Flag

_REASONS = {
    Flag.LOSS_NOT_FINITE: "loss not finite",
    Flag.GRADIENT_NOT_FINITE: "gradient not finite",
    Flag.LOSS_SPIKE: "loss spike",
    Flag.GRADIENT_SPIKE: "gradient spike",
}
"""Worst first; what several ranks see alike is not any rank's."""


class Guard:
    """Judges steps by their loss (nats per token) and gradient norm, and counts the bad ones."""

    def __init__(self, config: GuardConfig, facts: dict[str, Any] | None = None) -> None:
        """`facts` are those of the checkpoint a run goes on from."""
        facts = facts or {}
        window = max(config.spike_window, 1)
        self._config = config
        self._losses: deque[float] = deque(facts.get("losses", ()), maxlen=window)
        self._grad_norms: deque[float] = deque(facts.get("grad_norms", ()), maxlen=window)
        self.skipped: int = facts.get("skipped", 0)
        """Steps left out since the run began."""
        self.in_a_row = 0

    def facts(self) -> dict[str, Any]:
        """What a checkpoint has to keep, as plain JSON."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "skipped": self.skipped,
        }

    def judge(self, finite_here: bool, loss: float, grad_norm: float) -> list[Flag]:
        """What this rank finds wrong; `finite_here` is about its own part of the loss."""
        flags = []
        if not finite_here:
            flags.append(Flag.LOSS_NOT_FINITE)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            flags.append(Flag.GRADIENT_NOT_FINITE)
        if self._is_spike(loss, self._losses, self._config.loss_spike):
            flags.append(Flag.LOSS_SPIKE)
        if self._is_spike(grad_norm, self._grad_norms, self._config.grad_norm_spike):
            flags.append(Flag.GRADIENT_SPIKE)
        return flags

    def _is_spike(self, value: float, past: deque[float], factor: float) -> bool:
        if self._config.spike_window == 0 or len(past) < self._config.spike_window:
            return False
        return value > factor * statistics.median(past)

    def record(self, loss: float, grad_norm: float, bad: bool) -> None:
        """Take a step into account: good ones as the past, bad ones as a number."""
        if bad:
            self.skipped += 1
            self.in_a_row += 1
            return
        self.in_a_row = 0
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)

    @property
    def is_lost(self) -> bool:
        """Whether so many steps in a row were bad that the run has to stop."""
        return self.in_a_row >= self._config.max_bad_steps


def reason(found: dict[Flag, int]) -> str | None:
    """Why a step is bad, by what all ranks found; None for a good one."""
    for flag, text in _REASONS.items():
        if flag in found:
            return f"{text} on rank {found[flag]}" if flag is Flag.LOSS_NOT_FINITE else text
    return None
