"""`python -m benchmarks`: time every operation beside its peers, in one run.

Run from the folder `kernels`; see `options` for what it takes and returns.
"""

from __future__ import annotations

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hysparse_kernels.benchmarking.problem import Problem
from hysparse_kernels.benchmarking.report import environment
from hysparse_kernels.benchmarking.selections import Captured, describe, statistics, synthetic
from hysparse_kernels.benchmarking.timer import Timer
from torch import Tensor

from benchmarks import preparation
from benchmarks.checks import Check
from benchmarks.measure import Bench
from benchmarks.options import parse
from benchmarks.peers import OTHERS
from benchmarks.rates import Rates
from benchmarks.report import TableReport, default_path
from benchmarks.rows import Row, Rows
from benchmarks.targets import targets


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and return the exit code."""
    options = parse(argv)
    if options is None:
        return 2
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device: nothing to measure (to try the command: --device cpu --backend"
            " reference --sequence 256 --shapes 4/1/16/16 --quick)",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(options.seed)
    command = "python -m benchmarks " + shlex.join(sys.argv[1:] if argv is None else argv)
    output = None if options.output == "none" else Path(options.output or default_path(device))
    report = TableReport(output, environment(device, command.strip()))
    report.heading()
    return _Run(options, report, device).all()


class _Run:
    """One run: rates, then the checks, then table after table."""

    def __init__(self, options: Namespace, report: TableReport, device: torch.device) -> None:
        self.options, self.report, self.device = options, report, device
        self.began = time.monotonic()
        self.rows, self.checks = Rows(), list[Check]()
        timer = Timer(device, 60.0 if options.quick else 300.0)
        report.log(f"times: {timer.describe()}")
        size = 8192 if device.type == "cuda" else 256
        self.rates = Rates.measure(timer, options.peak_tflops, size)
        report.log(str(self.rates))
        self.bench = Bench(
            timer, self.rates, options.backend, self._emit, {}, retune=not options.quick
        )
        self.captured = Captured.load(options.captured) if options.captured else None

    def all(self) -> int:
        """Everything asked for; returns the exit code."""
        problems = self.options.problems
        self._prepare(problems)
        own = {"decode": self.options.decode_problems, "prefill": self.options.prefill_problems}
        if not self.options.captured_only:
            for problem in problems:
                for table in self.options.only:
                    if table not in own:
                        self._table(table, problem)
            for table in own:
                for problem in own[table] if table in self.options.only else ():
                    self._table(table, problem)
        if self.captured is not None:
            self._captured(problems[0])
        self.report.log()
        self.report.log("goals, and ratios within this run:")
        for target in targets(self.rows):
            self.report.log(target.line())
        self.report.log(f"{time.monotonic() - self.began:.0f} seconds in all")
        self._write()
        ours = [c for c in self.checks if c.failure and not c.refused and c.name not in OTHERS]
        return 1 if ours else 0

    def _emit(self, row: Row) -> None:
        self.report.row(self.rows.add(row))

    def _write(self) -> None:
        self.report.write_all(self.rates, self.checks, self.rows.all, targets(self.rows))

    def _late(self) -> bool:
        return time.monotonic() - self.began > self.options.limit_seconds

    def _prepare(self, problems: list[Problem]) -> None:
        """Check and compile; peers whose results are wrong get a note instead of times."""
        options = self.options
        if options.no_checks:
            return
        self.report.log()
        self.report.log("relative errors against the fp64 reference, small problems, bf16:")
        work = preparation.jobs(problems, options.only, options.device, options.backend)
        for job, found in preparation.run_all(work, options.processes):
            if found is None:
                continue
            self.checks.append(found)
            self.report.log(found.line(f"{job.table} {job.peer_name} [{job.shape}]"))
            if found.aligned and (found.refused or found.failure):
                verb = "refused" if found.refused else "wrong, not timed"
                self.bench.notes[job.table, job.peer_name, job.shape] = f"{verb}: {found.failure}"
        self.report.log(f"checked and compiled after {time.monotonic() - self.began:.0f} seconds")

    def _table(self, table: str, problem: Problem) -> None:
        if self._late():
            self.report.log(f"left out after --limit-seconds: {table}, {problem}")
            return
        if table in ("oracle", "window"):
            self.bench.attention(table, problem)
        elif table == "topk":
            self.bench.topk(problem)
        elif table == "decode":
            self.bench.decode(problem)
        else:
            # Clustered last: longer sequences keep what a peer's autotuner chose for it.
            alone = table in ("block", "ranges", "prefill")
            for selection in ("clustered",) if alone else ("random", "clustered"):
                ids = synthetic(problem, self.device, clustered=selection == "clustered")
                self._with_selection(table, problem, selection, ids)
        self._write()

    def _with_selection(self, table: str, problem: Problem, selection: str, ids: Tensor) -> None:
        if table == "sparse":
            self.bench.attention("sparse", problem, selection, ids)
            self.report.log(f"  the selection: {describe(statistics(ids))}")
        elif table == "lists":
            self.bench.lists(problem, selection, ids)
        elif table == "ranges":
            self.bench.ranges(problem, selection, ids)
        elif table == "prefill":
            self.bench.prefill(problem, selection, ids, self.options.prefill_chunk)
        else:
            self.bench.block(problem, selection, ids)

    def _captured(self, problem: Problem) -> None:
        """The sparse tables on what a trained model selected, at that length and block size."""
        assert self.captured is not None
        facts = self.captured.facts
        told = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "statistics")
        self.report.log()
        self.report.log(f"captured selections: {told}")
        for layer in self.captured.layers:
            ids = self.captured.for_groups(layer, problem.groups, self.device)
            there = replace(
                problem,
                sequence=ids.shape[2],
                num_selected=ids.shape[3],
                block_size=int(facts["block_size"]),
            )
            for table in ("sparse", "lists", "block"):
                if table in self.options.only and not self._late():
                    self._with_selection(table, there, f"captured:{layer}", ids)
        self._write()


if __name__ == "__main__":
    sys.exit(main())
