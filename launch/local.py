"""Start all ranks of a run on this machine: `python -m launch.local --nproc 4 [overrides]`.

Checks the configuration once, before any rank starts, so that mistakes cost seconds and exit with
code 2. Then torchrun starts the ranks. torchrun itself ends with 1 whatever its ranks ended with;
the exit code given here is the run's own, from `status.json`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hysparse_megatron.config.cli import load, parse_arguments
from hysparse_megatron.errors import ConfigError, HySparseError
from hysparse_megatron.plan.suggest import check

_USAGE = "usage: python -m launch.local [--nproc RANKS] [--config FILE] [overrides]"


def main(argv: Sequence[str]) -> int:
    """Run with `argv`, the command line without the program's name; returns the exit code."""
    try:
        num_ranks, arguments = _take_nproc(list(argv))
        parsed = parse_arguments(arguments)
        config = load(parsed)
        if not parsed.show:
            check(config, num_ranks)
    except HySparseError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    module = ["-m", "hysparse_megatron", *arguments]
    if parsed.show:
        return subprocess.run([sys.executable, *module], check=False).returncode

    started = time.time()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    process = subprocess.Popen(
        [sys.executable, *torchrun, *module],
        env={"OMP_NUM_THREADS": threads, **os.environ},
    )
    for number in (signal.SIGTERM, signal.SIGUSR1):
        # torchrun understands SIGTERM only; it passes that on and waits for the ranks to save.
        signal.signal(number, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches torchrun by itself
    code = process.wait()
    return 0 if code == 0 else _exit_code_of(config.run_path, started) or 1


def _take_nproc(arguments: list[str]) -> tuple[int, list[str]]:
    """Split off `--nproc N`, which is ours; everything else belongs to the ranks."""
    if "--nproc" not in arguments:
        return 1, arguments
    index = arguments.index("--nproc")
    value = arguments[index + 1] if index + 1 < len(arguments) else ""
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"--nproc: got {value or 'nothing'}; allowed a number of ranks\n{_USAGE}")
    return int(value), arguments[:index] + arguments[index + 2 :]


def _exit_code_of(run_path: Path, started: float) -> int | None:
    """The exit code that the run wrote into `status.json` since `started`, if it did."""
    path = run_path / "status.json"
    try:
        if path.stat().st_mtime < started:
            return None
        return json.loads(path.read_text()).get("exit_code")
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
