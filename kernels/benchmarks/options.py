"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hysparse_kernels as hk
from hysparse_kernels.benchmarking.problem import Problem, parse_shape

from benchmarks.decode import BATCHES
from benchmarks.measure import TABLES
from benchmarks.preparation import default_processes
from benchmarks.targets import LONG, MAIN, MANY_GROUPS, SHORT, WIDE

_DESCRIPTION = """\
Time every operation beside its peers, in one run, and write what is printed, and every number as
JSON beside it, to benchmarks/results/. Run from the folder `kernels`. Needs a CUDA device:
`--device cpu --backend reference` only shows that the command works.

exit codes: 0 measured, whatever the numbers; 1 a result of ours is wrong; 2 no GPU or bad options
"""

DEFAULT_PROBLEMS = ((SHORT, MAIN), (LONG, MAIN), (SHORT, WIDE), (SHORT, MANY_GROUPS))
"""Lengths in tokens and shapes, the most telling first: see `--limit-seconds`."""


DECODE_PROBLEMS = tuple((s, shape) for shape in (MAIN, WIDE) for s in (8192, SHORT, LONG))
"""Those of the decode table, which has batches of its own."""
PREFILL_PROBLEMS = ((SHORT, WIDE),)
"""Those of the prefill table: the paper's 80B model."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace | None:
    """The options with `problems` and `only` resolved, or None after saying what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sequence", type=int, nargs="+", metavar="TOKENS", help="default: 32768 and 131072"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="HQ/HKV/D/DV",
        help=f"default: {MAIN}, {WIDE} and {MANY_GROUPS}, the first alone at 131072 tokens",
    )
    parser.add_argument("--only", default=",".join(TABLES), help="tables, default: %(default)s")
    parser.add_argument("--captured", type=Path, help="saved by hysparse capture-selections")
    parser.add_argument("--captured-only", action="store_true", help="no synthetic selections")
    parser.add_argument("--quick", action="store_true", help="few repetitions, no second tuning")
    parser.add_argument("--no-checks", action="store_true", help="time without checking first")
    parser.add_argument("--output", metavar="FILE", help="text file; none writes nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton", choices=hk.BACKENDS)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--num-selected", type=int, default=16)
    parser.add_argument(
        "--decode-batch", type=int, nargs="+", default=BATCHES, help="sequences of a decode step"
    )
    parser.add_argument(
        "--prefill-chunk", type=int, default=4096, help="tokens of a prompt taken in at a time"
    )
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="bf16, for the floors")
    parser.add_argument(
        "--processes",
        type=int,
        help="for checks and compilation; default: half of the cores, at most 8",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit-seconds", type=float, default=480.0, help="start no table after so many seconds"
    )
    options = parser.parse_args(argv)
    if options.processes is None:
        options.processes = default_processes(options.device)
    options.only = options.only.split(",")
    if options.captured_only and not options.captured:
        print("--captured-only: needs --captured FILE", file=sys.stderr)
        return None
    if unknown := sorted(set(options.only) - set(TABLES)):
        print(f"--only: {', '.join(unknown)}: expected some of {','.join(TABLES)}", file=sys.stderr)
        return None
    if options.prefill_chunk < 1:
        print(f"--prefill-chunk: got {options.prefill_chunk}, expected at least 1", file=sys.stderr)
        return None
    wanted, decode, prefill = map(list, (DEFAULT_PROBLEMS, DECODE_PROBLEMS, PREFILL_PROBLEMS))
    if options.sequence or options.shapes:
        sequences = options.sequence or [SHORT, LONG]
        wanted = [(s, shape) for s in sequences for shape in options.shapes or [MAIN]]
        decode = prefill = wanted
    try:
        options.problems = [_problem(options, *sizes) for sizes in wanted]
        options.prefill_problems = [_problem(options, *sizes) for sizes in prefill]
        options.decode_problems = [
            replace(_problem(options, *sizes), batch=batch)
            for sizes in decode
            for batch in options.decode_batch
        ]
    except ValueError as error:
        print(f"--shapes: {error}", file=sys.stderr)
        return None
    return options


def _problem(options: argparse.Namespace, sequence: int, shape: str) -> Problem:
    return Problem(
        sequence,
        *parse_shape(shape),
        block_size=options.block_size,
        num_selected=options.num_selected,
    )
