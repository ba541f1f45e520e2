"""Prints rows of steps as tables while they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hysparse_kernels.benchmarking.report import Report
from hysparse_kernels.benchmarking.targets import Target

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import writing
from hysparse_megatron.plan.memory import GIB

from .rows import Row
from .trace import FAMILIES

_TIMES = (
    f"  {'layout':20s}{'layers':14s}{'step':>11s}  {'quartiles':>19s}{'tokens/s':>11s}{'TF/s':>7s}"
    f"{'of peak':>9s}{'peak GiB':>10s}{'planned':>9s}{'ratio':>7s}"
)
_MEMORY = (
    f"  {'memory, GiB':20s}{'weights':>9s}{'gradients':>11s}{'optimizer':>11s}{'= state':>9s}"
    f"{'measured':>10s}{'activations':>13s}{'working set':>13s}{'= rest':>8s}{'measured':>10s}"
    f"{'reserved':>10s}{'on device':>11s}"
)


class StepReport(Report):
    """Rows of steps, in a table for every length."""

    def start(self, row: Row) -> None:
        """The heading of a length's table."""
        config = row.case.config
        model, train = config.model, config.train
        experts = f", {model.moe.num_experts} experts" if model.moe.num_experts else ""
        number = train.global_batch_size // train.micro_batch_size
        self.log()
        self.log(
            f"{row.case.length} tokens: hidden {model.hidden_size}{experts}, vocabulary "
            f"{model.vocab_size}, {train.precision.value}, recompute {train.recompute_text}, "
            f"{number} micro-batches of {train.micro_batch_size} a step"
        )
        self.log(_TIMES)

    def begin(self) -> None:
        """What runs where. Raises ConfigError before the measuring where nothing can be written."""
        try:
            super().write({})
        except OSError as error:
            raise ConfigError(f"--output: cannot write {self.path} ({error.strerror})") from error
        self.heading()

    def write(self, content: dict[str, Any], targets: Sequence[Target] = ()) -> None:
        """Both files. Raises OutputError where they cannot be written any more."""
        with writing(self.path, "--output"):
            super().write(content, targets)

    def write_rows(self, rows: Sequence[Row], targets: Sequence[Target]) -> None:
        """Both files of a comparison."""
        values = {"peak_tflops": rows[0].peak_tflops, "rows": [row.as_json() for row in rows]}
        self.write(values, targets)


def time_line(row: Row) -> str:
    """One line of the first table."""
    start = f"  {row.case.label:20s}{row.case.config.model.layout:14s}"
    if row.timing is None:
        return f"{start}  {row.note}"
    timing = row.timing
    quartiles = f"{timing.low_ms:.1f} .. {timing.high_ms:.1f}"
    line = (
        f"{start}{timing.median_ms:8.1f} ms  {quartiles:>19s}{row.tokens_per_second:11.0f}"
        f"{row.tflops:7.1f}{row.share_of_peak:9.1%}"
    )
    if row.memory is None or row.memory_ratio is None:
        return f"{line}{'-':>10s}{row.planned_tensor_bytes / GIB:9.1f}"
    peak = row.memory["peak_allocated"] / GIB
    return f"{line}{peak:10.1f}{row.planned_tensor_bytes / GIB:9.1f}{row.memory_ratio:7.2f}"


def memory_lines(rows: Sequence[Row]) -> list[str]:
    """Planned by part, measured as far as parts can be told apart."""
    lines = [_MEMORY]
    for row in rows:
        plan, found = row.case.memory, row.memory
        if found is None:
            continue
        state = plan.weights + plan.gradients + plan.optimizer
        rest = plan.activation_bytes + plan.working_set
        beyond = found["peak_allocated"] - found["state"]
        wanted = (found["state"], beyond, found["peak_reserved"], found["device_used"])
        measured = [f"{size / GIB:.1f}" for size in wanted]
        parts = [f"{size / GIB:.1f}" for size in (plan.weights, plan.gradients, plan.optimizer)]
        later = [f"{size / GIB:.1f}" for size in (plan.activation_bytes, plan.working_set, rest)]
        lines.append(
            f"  {row.case.label:20s}{parts[0]:>9s}{parts[1]:>11s}{parts[2]:>11s}"
            f"{state / GIB:9.1f}{measured[0]:>10s}{later[0]:>13s}{later[1]:>13s}{later[2]:>8s}"
            f"{measured[1]:>10s}{measured[2]:>10s}{measured[3]:>11s}"
        )
    return lines if len(lines) > 1 else []


def family_lines(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of one step by kernel family, and how long the device waits."""
    profiled = [row for row in rows if row.families is not None]
    lost = [row for row in rows if "profile_note" in row.answer]
    lines = [
        f"  {row.case.label}: no kernel families: {row.answer['profile_note']}" for row in lost
    ]
    if not profiled:
        return lines
    lines += [f"  {'ms of one step':30s}" + "".join(f"{row.case.label:>21s}" for row in profiled)]
    for family in FAMILIES:
        seconds = [(row.families or {}).get(family, 0.0) for row in profiled]
        if any(seconds):
            cells = [
                f"{second * 1e3:.1f} ({_share(second, row)})"
                for second, row in zip(seconds, profiled, strict=True)
            ]
            lines.append(f"  {family:30s}" + "".join(f"{cell:>21s}" for cell in cells))
    idle = [f"{row.idle_share:.0%}" for row in profiled]
    lines.append(f"  {'idle share of a step':30s}" + "".join(f"{cell:>21s}" for cell in idle))
    return lines


def _share(seconds: float, row: Row) -> str:
    return f"{seconds / max(sum((row.families or {}).values()), 1e-12):.0%}"
