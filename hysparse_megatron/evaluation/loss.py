"""What held-out loss means: the one definition of training, summary, report and tools.

The cross-entropy of every token that counts, summed over all batches and ranks in fp64, by the
number of these tokens. Which samples they come from says `data/held_out.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HeldOutLoss:
    """A mean over tokens."""

    tokens: int
    """How many count."""
    loss: float
    """Mean cross-entropy in nats per token."""

    @property
    def perplexity(self) -> float:
        """Its exponential; infinite where that is more than a float holds."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf
