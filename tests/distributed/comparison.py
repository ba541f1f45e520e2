"""What "trains like one process" means, as numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hysparse_megatron.config.schema import Config
from tests.distributed.ranks import RankRun
from tests.distributed.reassemble import relative_difference, whole, whole_routing, whole_selection
from tests.distributed.table import ParityRow

LOSS_TOLERANCE = 1e-5
"""In nats."""
GRAD_NORM_TOLERANCE = 1e-5
"""Of the median step, relative to the norm where that is above 1."""
GRADIENT_TOLERANCE = 1e-4
"""Of every parameter, relative to its largest entry; of the norm in every step. One token whose
backward pass is badly conditioned moves all gradients below it, now and then, in one step."""


def gradient_steps(steps: int) -> tuple[int, int]:
    """Those of `steps` whose gradients are compared, parameter by parameter."""
    return 0, steps - 1


ReferenceFor = Callable[[Config], RankRun]
"""The one-process run that a configuration is compared with."""


@dataclass
class Differences:
    """How far a run is from the reference, at its worst."""

    loss: float = 0.0
    grad_norm: float = 0.0
    median_grad_norm: float = 0.0
    gradients: dict[tuple[int, str], float] = field(default_factory=dict)
    """By step and parameter."""
    other_selection: str | None = None
    """The first step and oracle whose block indices are not the reference's."""
    other_routing: str | None = None
    """The first step and layer where a token went to other experts than in the reference."""

    def too_large(self) -> list[str]:
        """What is beyond its tolerance, in words."""
        found = [] if self.other_selection is None else [f"selection: {self.other_selection}"]
        found += [] if self.other_routing is None else [f"routing: {self.other_routing}"]
        if not self.loss <= LOSS_TOLERANCE:
            found.append(f"loss: {self.loss:.1e}")
        if not self.median_grad_norm <= GRAD_NORM_TOLERANCE:
            found.append(f"median grad norm: {self.median_grad_norm:.1e}")
        if not self.grad_norm <= GRADIENT_TOLERANCE:
            found.append(f"grad norm: {self.grad_norm:.1e}")
        found += [
            f"gradient of {name} in step {step}: {value:.1e}"
            for (step, name), value in self.gradients.items()
            if not value <= GRADIENT_TOLERANCE
        ]
        return found

    def row(self, name: str, ranks: int, reference: RankRun) -> ParityRow:
        """The line of the table."""
        return ParityRow(
            name,
            ranks,
            self.loss,
            self.grad_norm,
            max(self.gradients.values()),
            "equal" if self.other_selection is self.other_routing is None else "DIFFER",
            reference.redrawn,
            reference.smallest_gap,
            "FAILED" if self.too_large() else "ok",
        )


def compare(
    reference: RankRun, runs: Sequence[RankRun], num_groups: int, sequence_parallel: bool = False
) -> Differences:
    """Everything that a layout of `num_groups` KV groups must share with the reference."""
    steps = len(reference.losses)
    for run in runs:
        assert len(run.losses) == len(run.grad_norms) == steps
        # No question of rounding: every rank is told the same number.
        assert run.losses == runs[0].losses
        assert run.grad_norms == runs[0].grad_norms
    losses, norms = np.array(runs[0].losses), np.array(runs[0].grad_norms)
    expected_norms = np.array(reference.grad_norms)
    relative_norms = np.abs(norms - expected_norms) / np.maximum(1.0, expected_norms)
    found = Differences(
        loss=float(np.abs(losses - reference.losses).max()),
        grad_norm=float(relative_norms.max()),
        median_grad_norm=float(np.median(relative_norms)),
    )
    for step in gradient_steps(steps):
        expected = whole([(reference.place, reference.gradients[step])])
        actual = whole([(run.place, run.gradients[step]) for run in runs])
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            found.gradients[step, name] = relative_difference(gradient, actual[name])
    found.other_routing = other_routing(reference, runs, sequence_parallel)
    for step, expected_selection in enumerate(reference.selections):
        actual_selection = whole_selection(runs, step, num_groups)
        assert actual_selection.keys() == expected_selection.keys()
        for layer, indices in expected_selection.items():
            # The shapes hold the number of selections: recompute must not make one twice.
            if not np.array_equal(indices, actual_selection[layer]):
                found.other_selection = f"step {step}, oracle {layer}"
                return found
    return found


def other_routing(
    reference: RankRun, runs: Sequence[RankRun], sequence_parallel: bool
) -> str | None:
    """The first step and layer where tokens went elsewhere than in the reference."""
    for step, expected in enumerate(reference.routings):
        actual = whole_routing(runs, step, sequence_parallel)
        assert actual.keys() == expected.keys()
        for layer, chosen in expected.items():
            if not np.array_equal(chosen, actual[layer]):
                return f"step {step}, layer {layer}"
    return None
