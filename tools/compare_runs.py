"""Are these runs the same, and where do they part? `hysparse compare RUN RUN ...`

    hysparse compare runs/straight runs/resumed
    hysparse compare runs/hysparse runs/full runs/windows --output comparison.html
    hysparse compare tools/recipe_results/2026-12-01-h200-recipe_160m runs/mine --within 0.01

Compares every run with the first: settings, data, and bit for bit what each step and evaluation
computed, in the fields that both have, but not how fast it was. Prints a table and, with --output,
draws loss and gradient norm with their differences on one self-contained HTML page, which needs the
extra `report`.

Ends with 0 if all rows of all runs are equal, with 1 if not, with 2 if a path is no run. With
--within SHARE it ends with 0 if no loss that both have is further than that from the first run's:
other GPUs and versions round otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hysparse_megatron.command import command, make_parser
from hysparse_megatron.config.schema import VALIDATION
from hysparse_megatron.files import require_writable, writing
from hysparse_megatron.tracking.metrics import evaluation_of, results

from .charts import Line, line_chart
from .page import Page
from .run_data import Row, RunData, flat, load_run, points

NOT_COMPARED = ("name", "run_dir")
"""Settings in which even equal runs differ."""
_TINY = 1e-12


@dataclass(frozen=True)
class Difference:
    """Where two runs part, or how far apart they get."""

    first: str | None
    """The first row that is not equal, in words; None if all are."""
    largest: dict[str, tuple[float, int]]
    """The largest absolute difference of a field, and the step where it is."""
    shares: dict[str, float]
    """The relative difference of every loss that both have, by where it is, in words; infinite
    where one is not finite."""

    def is_within(self, share: float) -> bool:
        """Whether there are such losses, and all differ by at most `share`."""
        return bool(self.shares) and all(found <= share for found in self.shares.values())


@command
def main(argv: Sequence[str]) -> int:
    """Do what `argv` says, the command line without the program's name."""
    given = _parse(argv)
    require_writable(given.output, "--output")
    runs = [load_run(path) for path in given.runs]
    differences = [compare(runs[0], other) for other in runs[1:]]
    print("\n".join(_table(runs, differences)))
    for other, difference in zip(runs[1:], differences, strict=True):
        print(f"\n{label(runs, runs[0])} and {label(runs, other)}:")
        print("\n".join(f"  {line}" for line in verdict(runs[0], other, difference)))
        if given.within is not None:
            print(f"  {_nearness(difference, given.within)}")
    if given.output is not None:
        with writing(given.output, "--output"):
            _draw(runs, differences, given.output)
        print(f"\ndrawn: {given.output}")
    if given.within is not None:
        return 0 if all(found.is_within(given.within) for found in differences) else 1
    return 1 if any(difference.first for difference in differences) else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("hysparse compare", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML page to draw")
    parser.add_argument(
        "--within", type=_share, metavar="SHARE", help="losses may differ by it: 0.01 is 1 percent"
    )
    args = parser.parse_args(list(argv))
    if len(args.runs) < 2:
        parser.error("got one run; allowed two or more")
    return args


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"got {text}; allowed 0 to below 1")
    return share


def label(runs: Sequence[RunData], run: RunData) -> str:
    """The run's name, or its path where names are not enough."""
    alike = [other for other in runs if other.name == run.name]
    return run.name if len(alike) == 1 else str(run.path)


def compare(one: RunData, other: RunData) -> Difference:
    """Step by step, training before evaluation."""
    ours, theirs = _by_place(one), _by_place(other)
    first = None
    for place in sorted(ours.keys() | theirs.keys()):
        first = _row_difference(place, ours.get(place), theirs.get(place))
        if first is not None:
            break
    largest: dict[str, tuple[float, int]] = {}
    shares: dict[str, float] = {}
    for (step, name), row in sorted(ours.items()):
        for key, value in row.items():
            found = theirs.get((step, name), {}).get(key)
            if key in ("loss", "grad_norm", "eval_loss") and isinstance(found, float):
                told = key if name in ("", VALIDATION) else f"{key} of {name}"
                distance = abs(value - found)
                if distance > largest.get(told, (-1.0, 0))[0]:
                    largest[told] = (distance, step)
                # Both are NaN at a step that both left out.
                if key != "grad_norm" and not (math.isnan(value) and math.isnan(found)):
                    share = distance / max(abs(value), _TINY)
                    shares[_where(step, name)] = share if math.isfinite(share) else math.inf
    return Difference(first, largest, shares)


def _by_place(run: RunData) -> dict[tuple[int, str], Row]:
    """Results by step and by the set that they are an evaluation on; see `evaluation_of`."""
    rows = [*run.steps, *run.evaluations, *itertools.chain(*run.named_evaluations.values())]
    return {(row["step"], evaluation_of(row)): results(row) for row in rows}


def _row_difference(place: tuple[int, str], ours: Row | None, theirs: Row | None) -> str | None:
    where = _where(*place)
    if ours is None or theirs is None:
        return f"{where} is only in the {'second' if ours is None else 'first'}"
    for key in (key for key in ours if key in theirs):
        one, other = ours[key], theirs[key]
        if json.dumps(one) != json.dumps(other):  # so that NaN equals NaN and 0.0 is not -0.0
            return (
                f"{where}: {key} {json.dumps(one)} and {json.dumps(other)}{_distance(one, other)}"
            )
    return None


def _where(step: int, name: str) -> str:
    told = "the evaluation " if name == VALIDATION else f"the evaluation on {name} "
    return f"{told}after step {step}" if name else f"step {step}"


def _nearness(difference: Difference, share: float) -> str:
    if not difference.shares:
        return f"NOT within {share:.2%}: no step is in both"
    where = max(difference.shares, key=difference.shares.__getitem__)
    found = "within" if difference.is_within(share) else "NOT within"
    return (
        f"{found} {share:.2%}: losses of {len(difference.shares)} steps and evaluations differ by"
        f" at most {difference.shares[where]:.2%}, at {where}"
    )


def _distance(one: Any, other: Any) -> str:
    both = isinstance(one, float) and isinstance(other, float)
    return f" (difference {other - one:+.3e})" if both and math.isfinite(other - one) else ""


def verdict(one: RunData, other: RunData, difference: Difference) -> list[str]:
    """What two runs have in common, in words."""
    same_id = one.record.get("id") is not None and one.record["id"] == other.record.get("id")
    lines = []
    if difference.first is None:
        kind = "the same run" if same_id else "two runs with equal results"
        lines.append(f"{kind}: all {len(one.steps)} steps and all evaluations are bit-equal")
    else:
        lines.append(f"first difference: {difference.first}")
        if same_id:
            lines.append(f"although both have the id {one.record.get('id')}")
    settings = setting_differences(one, other)
    lines += [f"{key}: {old} and {new}" for key, (old, new) in settings.items()]
    if not settings:
        lines.append("equal settings" + _hashes(one, other))
    known = one.data is not None and other.data is not None
    if known and one.data != other.data:
        lines.append(f"data: {json.dumps(one.data)} and {json.dumps(other.data)}")
    else:
        lines.append("equal data" if known else "data not known: one has no checkpoint")
    for key, (distance, step) in difference.largest.items():
        if distance > 0:
            lines.append(f"{key}: largest difference {distance:.3e}, at step {step}")
    return lines


def _hashes(one: RunData, other: RunData) -> str:
    """The configuration's hash, where it is the same; names and folders are in it."""
    same = one.config_hash is not None and one.config_hash == other.config_hash
    return f", configuration {one.config_hash}" if same else ""


def setting_differences(one: RunData, other: RunData) -> dict[str, tuple[Any, Any]]:
    """Keys that differ, with both values."""
    ours, theirs = dict(flat(one.config)), dict(flat(other.config))
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return {
        key: (ours.get(key, "unset"), theirs.get(key, "unset"))
        for key in keys
        if key not in NOT_COMPARED and ours.get(key, "unset") != theirs.get(key, "unset")
    }


_HEADER = ("run", "id", "steps", "tokens", "loss", "eval loss", "tokens/s", "max |d loss|", "equal")


def _table(runs: Sequence[RunData], differences: Sequence[Difference]) -> list[str]:
    rows = [_HEADER, *table_rows(runs, differences)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return lines


def table_rows(runs: Sequence[RunData], differences: Sequence[Difference]) -> list[tuple[str, ...]]:
    """One row of text for each run, the first of which the others are compared with."""
    found: list[tuple[str, ...]] = []
    for run, difference in zip(runs, [None, *differences], strict=True):
        last = run.steps[-1] if run.steps else {}
        speeds = points(run.steps, "tokens_per_second")[1]
        largest = "" if difference is None else f"{difference.largest.get('loss', (0.0, 0))[0]:.1e}"
        equal = "" if difference is None else ("yes" if difference.first is None else "no")
        losses = points(run.evaluations, "eval_loss")[1]
        found.append(
            (
                label(runs, run),
                str(run.record.get("id", "")),
                str(last.get("step", 0)),
                f"{last.get('tokens', 0):,}",
                f"{last['loss']:.4f}" if last else "",
                f"{losses[-1]:.4f}" if losses else "",
                f"{statistics.median(speeds):,.0f}" if speeds else "",
                largest,
                equal,
            )
        )
    return found


def _draw(runs: Sequence[RunData], differences: Sequence[Difference], path: Path) -> None:
    page = Page("Runs compared")
    page.table(_HEADER, table_rows(runs, differences))
    for other, difference in zip(runs[1:], differences, strict=True):
        page.heading(f"{label(runs, runs[0])} and {label(runs, other)}")
        settings = setting_differences(runs[0], other)
        for line in verdict(runs[0], other, difference):
            if line.partition(":")[0] not in settings:
                page.note(line)
        if settings:
            header = ("setting", label(runs, runs[0]), label(runs, other))
            page.table(header, [(key, *values) for key, values in settings.items()])
    page.heading("Curves")
    images = []
    sets = dict.fromkeys(name for run in runs for name in run.named_evaluations)
    for key, name, evaluation in (
        ("loss", "loss", ""),
        ("grad_norm", "gradient norm", ""),
        ("eval_loss", "evaluation loss", VALIDATION),
        *(("eval_loss", f"evaluation loss on {name}", name) for name in sets),
    ):
        lines = [
            Line(
                label(runs, run),
                *points(_rows(run, evaluation), key),
                colour=number,
                markers=bool(evaluation),
            )
            for number, run in enumerate(runs)
        ]
        apart = [_apart(runs, number, key, evaluation) for number in range(1, len(runs))]
        scale = key == "grad_norm"
        images.append(line_chart(name.capitalize(), lines, y_label=name, logarithmic=scale))
        title = f"Difference of {name} from {label(runs, runs[0])}"
        images.append(line_chart(title, apart, y_label="difference"))
    page.charts(images)
    page.write(path)


def _rows(run: RunData, evaluation: str) -> list[Row]:
    """Of the evaluations on this set; of the steps without a name."""
    by_name = {"": run.steps, VALIDATION: run.evaluations, **run.named_evaluations}
    return by_name.get(evaluation, [])


def _apart(runs: Sequence[RunData], number: int, key: str, evaluation: str) -> Line:
    """That run minus the first, at the steps that both have."""
    other = runs[number]
    ours = dict(zip(*points(_rows(runs[0], evaluation), key), strict=True))
    theirs = dict(zip(*points(_rows(other, evaluation), key), strict=True))
    steps = sorted(ours.keys() & theirs.keys())
    values = [theirs[step] - ours[step] for step in steps]
    return Line(label(runs, other), steps, values, colour=number, markers=bool(evaluation))


if __name__ == "__main__":
    sys.exit(main())
