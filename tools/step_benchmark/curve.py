"""Loss curves of one small model on a device and on the CPU, from equal weights and tokens.

The weights depend on the seed alone, not on the device. bf16 rounds them and everything after them:
how far that alone moves the losses, the reference backend tells, and the kernels may not move them
much further.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hysparse_megatron.config.frozen import to_yaml
from hysparse_megatron.config.schema import Config

from .cases import slice_config
from .report import StepReport
from .request import Request
from .slices import HYSPARSE


@dataclass(frozen=True)
class CurveRun:
    """One way to train the same model."""

    device: str
    backend: str
    precision: str

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"{self.device} {self.backend} {self.precision}"


EXACT = CurveRun("cpu", "reference", "fp32")
"""What the others are compared with."""


def curve_runs(device: str) -> list[CurveRun]:
    """What is compared; without a GPU what bf16 alone does, to show that the command works."""
    if device == "cpu":
        return [EXACT, CurveRun("cpu", "reference", "bf16")]
    on_device = [("triton", "bf16"), ("reference", "bf16"), ("reference", "fp32")]
    return [*(CurveRun(device, *way) for way in on_device), EXACT]


def curve_config(options: Namespace, one: CurveRun) -> Config:
    """The configuration of one way; backend and precision win over what the user set."""
    more = (f"model.backend={one.backend}", f"train.precision={one.precision}")
    return slice_config(options, HYSPARSE, options.lengths[0], more)


def compare(
    options: Namespace, report: StepReport, run: Callable[[Request], dict[str, Any]]
) -> int:
    """Train all ways, print and save the curves. Returns the exit code."""
    ways = curve_runs(options.device)
    configs = [curve_config(options, one) for one in ways]
    curves: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    for one, config in zip(ways, configs, strict=True):
        request = Request(
            config=to_yaml(config), device=one.device, steps=options.compare_cpu, same_batch=True
        )
        answer = run(request)
        if "note" in answer:
            notes[one.label] = answer["note"]
        else:
            curves[one.label] = answer["losses"]
    differences = _differences(curves)
    _print(report, configs[0], curves, notes, differences)
    report.write({"curve": curves, "notes": notes, "differences": differences})
    return 0 if EXACT.label in curves and len(curves) > 1 else 1


def _differences(curves: dict[str, list[float]]) -> dict[str, float]:
    """Largest distance of every curve to the exact one, in nats."""
    exact = curves.get(EXACT.label)
    if exact is None:
        return {}
    return {
        label: max(abs(a - b) for a, b in zip(losses, exact, strict=True))
        for label, losses in curves.items()
        if label != EXACT.label
    }


def _print(
    report: StepReport,
    config: Config,
    curves: dict[str, list[float]],
    notes: dict[str, str],
    differences: dict[str, float],
) -> None:
    report.log()
    report.log(
        f"losses of {config.model.layout}, hidden {config.model.hidden_size}, on "
        f"{config.train.seq_length} random tokens, the same ones at every step, in nats"
    )
    report.log("  step" + "".join(f"{label:>24s}" for label in curves))
    for step, losses in enumerate(zip(*curves.values(), strict=True)):
        report.log(f"  {step + 1:4d}" + "".join(f"{loss:24.5f}" for loss in losses))
    for label, note in notes.items():
        report.log(f"  {label}: {note}")
    for label, difference in differences.items():
        report.log(f"  largest difference of {label} from {EXACT.label}: {difference:.2e}")
    kernels = [value for label, value in differences.items() if " triton " in label]
    rounding = [value for label, value in differences.items() if label.endswith("reference bf16")]
    if kernels and rounding:
        ratio = kernels[0] / max(rounding[0], 1e-12)
        report.log(f"  that is {ratio:.2f} times what bf16 alone does to the reference")
