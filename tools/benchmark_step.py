"""Time whole training steps of a slice of a model: `hysparse benchmark step [options]`.

    hysparse benchmark step --layers 12 --experts 64 --vocab 8192 --lengths 32768

See `step_benchmark.options` for what it takes and returns.
"""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence

from hysparse_kernels.benchmarking.report import environment

from hysparse_megatron.command import command
from hysparse_megatron.config.frozen import to_yaml

from .step_benchmark import curve, request
from .step_benchmark.cases import Case, make_cases
from .step_benchmark.options import parse
from .step_benchmark.report import StepReport, family_lines, memory_lines, time_line
from .step_benchmark.request import Request
from .step_benchmark.rows import Row
from .step_benchmark.slices import MEGATRON
from .step_benchmark.splits import LAYERWISE
from .step_benchmark.targets import targets


@command
def main(argv: Sequence[str]) -> int:
    """Measure what `argv` asks for, the command line without the program's name."""
    options = parse(argv)
    # All configurations before anything runs: a mistake in the last must not cost the others.
    if options.compare_cpu is not None:
        for one in curve.curve_runs(options.device):
            curve.curve_config(options, one)
        return curve.compare(options, _report(options, argv), request.run)
    return _measure(options, make_cases(options), _report(options, argv))


def _report(options: Namespace, argv: Sequence[str]) -> StepReport:
    command = f"hysparse benchmark step {shlex.join(argv)}".strip()
    report = StepReport(options.output, environment(options.device, command))
    report.begin()
    return report


def _measure(options: Namespace, cases: Sequence[Case], report: StepReport) -> int:
    """Case after case, a table for every length, the ratios at the end."""
    began = time.monotonic()
    rows: list[Row] = []
    for _, of_length in itertools.groupby(cases, key=lambda case: case.length):
        table: list[Row] = []
        for case in of_length:
            late = time.monotonic() - began > options.limit_seconds
            answer = {"note": "left out after --limit-seconds"} if late else _run(options, case)
            row = Row(case, answer, options.peak_tflops)
            if not table:
                report.start(row)
            report.log(time_line(row))
            table.append(row)
            rows.append(row)
            report.write_rows(rows, targets(rows))
        for line in (*memory_lines(table), *family_lines(table)):
            report.log(line)
    report.log()
    report.log("how many times faster, and goals:")
    for target in targets(rows):
        report.log(target.line())
    report.log(f"{time.monotonic() - began:.0f} seconds in all")
    report.write_rows(rows, targets(rows))
    return 0 if any(row.timing for row in rows) else 1


def _run(options: Namespace, case: Case) -> dict:
    return request.run(
        Request(
            config=to_yaml(case.config),
            device=options.device,
            reference=case.name == MEGATRON,
            warmup=options.warmup,
            steps=options.steps,
            budget_seconds=options.case_seconds,
            picks=options.picks,
            layerwise=case.split.way == LAYERWISE,
            profile=options.profile and not case.again,
            ranks=case.split.ranks,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
