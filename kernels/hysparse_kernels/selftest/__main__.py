"""`python -m hysparse_kernels.selftest`: do the kernels compute what they should on this machine?

Compares every operation, forward and all gradients, with the fp64 reference, checks that selections
and results repeat bit by bit, and prints a few speeds. Takes under two minutes, most of it
compilation. Exit codes: 0 all is well, 1 a check failed, 2 no GPU (without --cpu).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch

from hysparse_kernels.backends import resolve_backend
from hysparse_kernels.selftest import speed as speeds
from hysparse_kernels.selftest.checks import CPU_CASES, GPU_CASES, Case, Check, run_case

Log = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-test and return the exit code."""
    options = _parse(argv)
    log: Log = _log_nothing if options.json else partial(print, flush=True)
    report: dict[str, Any] = {"environment": _environment(), "checks": [], "speeds": []}
    log("  ".join(f"{name} {value}" for name, value in report["environment"].items()))
    on_gpu = torch.cuda.is_available() and not options.cpu
    if not on_gpu:
        choice = resolve_backend("auto", "cpu")
        report["environment"]["backend_auto"] = f"{choice.name}: {choice.reason}"
        found = "left alone (--cpu)" if torch.cuda.is_available() else "not found"
        log(f"GPU {found}; backend=auto means {choice.name} here ({choice.reason})")
        if not options.cpu:
            log("nothing was checked; --cpu checks the reference on this CPU")
            return _finish(report, 2, options.json)
    checks = _checks(on_gpu, options.seed, options.processes, log)
    report["checks"] = [dataclasses.asdict(check) for check in checks]
    failed = sum(bool(check.failures) for check in checks)
    if on_gpu and not options.no_speed:
        log(f"\nspeeds: {speeds.describe()}")
        for speed in speeds.measure():
            report["speeds"].append(dataclasses.asdict(speed))
            log(speed.line())
    log(f"\n{len(checks) - failed} checks passed, {failed} failed")
    return _finish(report, 1 if failed else 0, options.json)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hysparse_kernels.selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cpu", action="store_true", help="check the reference on the CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--no-speed", action="store_true", help="only check")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(len(GPU_CASES), os.cpu_count() or 1),
        help="cases compiled at a time on a GPU, default %(default)s",
    )
    return parser.parse_args(argv)


def _checks(on_gpu: bool, seed: int, processes: int, log: Log) -> list[Check]:
    if on_gpu:
        log("\nrelative errors of the Triton kernels against the fp64 reference:")
        results = _in_processes(GPU_CASES, seed, processes)
    else:
        log("\nrelative errors of the reference against attention with a dense mask in fp64:")
        results = (run_case(case, "cpu", seed) for case in CPU_CASES)
    checks = []
    for result in results:
        for check in result:
            log(check.line())
            checks.append(check)
    return checks


def _in_processes(cases: Sequence[Case], seed: int, processes: int) -> Iterator[list[Check]]:
    """The cases in a few processes, because what takes time is compiling kernels."""
    work = partial(run_case, device="cuda", seed=seed)
    if processes < 2:
        yield from map(work, cases)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        futures = [pool.submit(work, case) for case in cases]
        for case, future in zip(cases, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield [Check(str(case), "all", {}, ("a process died; try --processes 1",))]


def _environment() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = f"missing ({error})"
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found


def _finish(report: dict[str, Any], code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({**report, "exit_code": code}, indent=1))
    return code


def _log_nothing(text: str) -> None:
    """With --json nothing but the object is printed."""


if __name__ == "__main__":
    sys.exit(main())
