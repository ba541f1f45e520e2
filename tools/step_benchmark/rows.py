"""One measured case beside what the planner says of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hysparse_kernels.benchmarking.timing import Timing

from .cases import Case


@dataclass(frozen=True)
class Row:
    """A case and what its process answered: numbers, or a note that says why there are none."""

    case: Case
    answer: dict[str, Any]
    peak_tflops: float

    @property
    def note(self) -> str:
        """Why there are no numbers; empty if there are."""
        return self.answer.get("note", "")

    @cached_property
    def timing(self) -> Timing | None:
        """Of whole steps."""
        if self.note:
            return None
        return Timing.of([1e3 * seconds for seconds in self.answer["step_seconds"]])

    @property
    def tokens_per_second(self) -> float:
        """Of a measured case."""
        assert self.timing is not None
        return 1e3 * self.case.tokens / self.timing.median_ms

    @property
    def tflops(self) -> float:
        """Of one device in a measured case, recompute included, in 1e12 FLOPs a second."""
        return self.case.flops_per_token * self.tokens_per_second * 1e-12 / self.case.split.ranks

    @property
    def share_of_peak(self) -> float:
        """Of a measured case."""
        return self.tflops / self.peak_tflops

    @property
    def memory(self) -> dict[str, int] | None:
        """Measured bytes; None where the device does not tell."""
        return self.answer.get("memory")

    @property
    def planned_tensor_bytes(self) -> int:
        """What the planner expects PyTorch to allocate: all but context and libraries."""
        return self.case.memory.total - self.case.memory.runtime

    @property
    def memory_ratio(self) -> float | None:
        """Measured peak of allocated memory over the planned one."""
        if self.memory is None:
            return None
        return self.memory["peak_allocated"] / self.planned_tensor_bytes

    @property
    def families(self) -> dict[str, float] | None:
        """Seconds of one step by kernel family."""
        return (self.answer.get("profile") or {}).get("families")

    @property
    def idle_share(self) -> float | None:
        """Share of an unprofiled step in which the device did nothing."""
        found = self.answer.get("profile")
        if found is None or self.timing is None:
            return None
        return max(0.0, 1 - 1e3 * found["busy_seconds"] / self.timing.median_ms)

    def as_json(self) -> dict[str, Any]:
        """Everything measured, planned and derived. Units in the names."""
        case, planned = self.case, self.case.memory
        values: dict[str, Any] = {
            "layout": case.label,
            "layers": case.config.model.layout,
            "length": case.length,
            "tokens_per_step": case.tokens,
            "split": str(case.split),
            "parameters": case.overview.parameters.total,
            "training_flops_per_token": case.flops_per_token,
            "forward_flops_per_token": case.overview.flops.total,
            "planned_bytes": {
                "weights": planned.weights,
                "gradients": planned.gradients,
                "optimizer": planned.optimizer,
                "activations": planned.activations,
                "working_set": planned.working_set,
                "runtime": planned.runtime,
                "total": planned.total,
            },
            "note": self.note,
        }
        if self.timing is not None:
            values |= {
                "median_seconds": self.timing.median_ms / 1e3,
                "low_seconds": self.timing.low_ms / 1e3,
                "high_seconds": self.timing.high_ms / 1e3,
                "tokens_per_second": self.tokens_per_second,
                "tflops": self.tflops,
                "share_of_peak": self.share_of_peak,
                "memory_ratio": self.memory_ratio,
                "idle_share": self.idle_share,
                "measured": self.answer,
            }
        return values
