"""How the global batch grows at the start of a run: Megatron's --rampup-batch-size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRamp:
    """From `start` sequences up to the global batch size, by `increment`, in `samples` samples.

    Every size on the way lasts for an equal part of `samples`. A step's size follows from the place
    in the order of the samples at which it begins, and from nothing else: stops, ranks and the
    length of the run change none.
    """

    start: int
    increment: int
    samples: int

    def size_at(self, place: int, global_batch_size: int) -> int:
        """Sequences of the step that begins after `place` samples of the order."""
        if place >= self.samples:
            return global_batch_size
        rises = (global_batch_size - self.start) // self.increment
        return self.start + place * rises // self.samples * self.increment

    def sizes(self, global_batch_size: int) -> list[int]:
        """All sizes, ascending, the last one `global_batch_size`."""
        return [*range(self.start, global_batch_size, self.increment), global_batch_size]

    def samples_of(self, steps: int, place: int, global_batch_size: int) -> int:
        """How many samples `steps` steps take that begin after `place` samples of the order."""
        first = place
        rises = (global_batch_size - self.start) // self.increment
        while steps > 0 and place < self.samples:
            size = self.size_at(place, global_batch_size)
            # All steps of this size at once: a rise comes at the first place of its part or later.
            part = place * rises // self.samples
            end = -(-(part + 1) * self.samples // rises)
            taken = min(steps, -(-(end - place) // size))
            place += taken * size
            steps -= taken
        return place - first + steps * global_batch_size
