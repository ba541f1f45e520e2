"""How long a step takes and how much of it ranks wait, from FLOPs and bytes alone.

An estimate to compare plans with, not a promise: matrix products run at `EFFICIENCY` of the peak,
collectives at the bandwidth of the slowest link they cross, and only the traffic of pipelines and
of data parallelism overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EFFICIENCY = 0.4
"""Share of the peak that training reaches while it computes; measured runs lie around it."""

NOMINAL_TFLOPS = 989.0
"""Where the machine's peak is not known: of an H100, to compare plans with, never to quote."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    pipeline_seconds: float
    """All micro-batches through all stages, waiting included."""
    data_seconds: float
    """Gradient reduction and weight gathering that no computing hides."""
    bubble_share: float
    """Share of the pipeline's time in which an average rank waits: fill, drain and imbalance."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.pipeline_seconds + self.data_seconds


def exposed_seconds(
    reducing: float, gathering: float, microbatch_seconds: float, passes: float, hidden: bool
) -> float:
    """What a step is longer by for gradients to be reduced and weights to be gathered.

    Where `hidden`, gradients go beside the backward pass of the last micro-batch and weights beside
    the forward pass of the first, each of which is its part of `passes` forward passes.
    """
    if not hidden:
        return reducing + gathering
    forward = microbatch_seconds / passes
    return max(0.0, reducing - (passes - 1) * forward) + max(0.0, gathering - forward)


def pipeline_time(
    stage_seconds: Sequence[float], pp: int, num_microbatches: int
) -> tuple[float, float]:
    """(seconds, share waited) of `num_microbatches` through stages in model order.

    The slowest rank works without a pause; before and after it the pipeline fills and drains, one
    chunk at a time: (pp - 1) / (m v + pp - 1) of the time if all stages are alike.
    """
    ranks = [sum(stage_seconds[rank::pp]) for rank in range(pp)]
    seconds = num_microbatches * max(ranks) + (pp - 1) * max(stage_seconds)
    if seconds == 0:
        return 0.0, 0.0
    return seconds, 1 - num_microbatches * (sum(ranks) / pp) / seconds
