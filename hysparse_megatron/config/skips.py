"""What `data.skip_steps` says: steps whose samples are left out."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_STEP = 10**9
"""So that places in the order of the samples are numbers of 64 bits with any batch size."""


@dataclass(frozen=True)
class Skips:
    """Ranges of steps whose samples are left out, as after a rewind from a spike.

    A run that leaves out steps trains on the samples of later ones: its step numbers go on without
    a gap, and every other batch, its size included, is that of a run that leaves out nothing. What
    is named before the position from which a run goes on is past and changes nothing there.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    """(first, last) steps, both included, ascending and apart; they count from 0, and those that
    were left out count too."""

    @classmethod
    def parse(cls, text: str) -> Skips:
        """`"100-110, 205"` -> its ranges. Raises ValueError that says what is wrong."""
        ranges: list[tuple[int, int]] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            ends = [end.strip() for end in part.split("-")]
            if len(ends) > 2 or not all(end.isdecimal() for end in ends):
                raise ValueError(f"{part!r}: expected a step, or two like 100-110")
            found = (int(ends[0]), int(ends[-1]))
            if found[1] > LARGEST_STEP:
                raise ValueError(f"{part!r}: no run has more than {LARGEST_STEP:,} steps")
            if found[0] > found[1]:
                raise ValueError(f"{part!r}: the first step comes after the last")
            if ranges and found[0] <= ranges[-1][1]:
                raise ValueError(f"{part!r}: steps must ascend, and {ranges[-1][1]} came before")
            ranges.append(found)
        return cls(tuple(ranges))

    def data_step(self, step: int) -> int:
        """The step of a run that leaves out nothing whose samples the run's step `step` has."""
        for first, last in self.ranges:
            if step < first:
                break
            step += last - first + 1
        return step

    def end(self, step: int) -> int:
        """The first step from `step` on whose samples are not left out."""
        for first, last in self.ranges:
            if first <= step <= last:
                step = last + 1
        return step

    def num_before(self, step: int) -> int:
        """How many of the steps before `step` they name."""
        return sum(max(0, min(last + 1, step) - first) for first, last in self.ranges)
