"""Settings that look inside a run; all off in a normal one."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class ProfileTool(Enum):
    """What records the profiled steps."""

    torch = "torch"
    nsys = "nsys"


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Steps whose operations are recorded, each with its times."""

    step_range: list[int] | None = field(default=None, hash=False)
    """`[first,last]`, counted as in `metrics.jsonl`, with the evaluations and saves between them;
    null profiles nothing. A few are enough: each is megabytes."""
    ranks: list[int] = field(default_factory=lambda: [0], hash=False)
    """Ranks that record; the first of every pipeline stage are of interest."""
    tool: ProfileTool = ProfileTool.torch
    """torch: torch.profiler, a trace in `RUN_DIR/profile/` for Perfetto; nsys: NVTX ranges between
    cudaProfilerStart and cudaProfilerStop, for a run under Nsight Systems."""


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """What helps to find a fault and costs something; all off in a normal run."""

    detect_anomaly: bool = False
    """Let autograd name the forward operation behind a NaN gradient; several times slower."""
    log_sample_ids: bool = False
    """Write the ids of every step's samples into `metrics.jsonl`, not only of skipped steps."""
    deterministic: bool = False
    """Only algorithms that repeat a run bit for bit on the same GPUs: slower ones, and an error
    from PyTorch where an operation has none. Runs on CPUs repeat without it."""
    memory_snapshot: bool = False
    """Record the last 100,000 allocations of every GPU, and write them to `RUN_DIR/memory/` where
    one runs out of memory."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Steps that are profiled."""
