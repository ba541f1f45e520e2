"""`hysparse train [overrides]`: one rank. Exit codes: see `errors`."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Sequence

from hysparse_megatron.command import command
from hysparse_megatron.errors import HySparseError


@functools.partial(command, is_run=True)
def main(argv: Sequence[str]) -> int:
    """Run one rank of a training run and return its exit code."""
    try:
        return _run(argv)
    except HySparseError:
        raise
    except Exception:
        rank_number = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        with contextlib.suppress(MemoryError):
            print(f"rank {rank_number} failed:", file=sys.stderr)
            traceback.print_exc()
        return 1


def _run(argv: Sequence[str]) -> int:
    # Imported late: Ctrl-C must find us ready for it, and a bad configuration must fail before
    # seconds of imports.
    from hysparse_megatron.config.blend import num_datasets
    from hysparse_megatron.config.cli import load, parse_arguments
    from hysparse_megatron.config.frozen import to_yaml
    from hysparse_megatron.config.validate import warnings as config_warnings
    from hysparse_megatron.plan.suggest import check
    from hysparse_megatron.run_record import other_run_warnings
    from hysparse_megatron.runtime.launcher import rank_from_environment, require_descriptors
    from hysparse_megatron.runtime.quiet import quiet_libraries

    arguments = parse_arguments(argv)
    config = load(arguments)
    if arguments.show:
        print(to_yaml(config), end="")
        return 0
    rank = rank_from_environment()
    check(config, rank.world_size)
    require_descriptors(rank.local_world_size, num_datasets(config.data.blend))
    if rank.rank == 0:
        elsewhere = other_run_warnings(arguments.config_file, config.run_path)
        for warning in [*config_warnings(config), *elsewhere]:
            print(f"warning: {warning}", flush=True)
    quiet_libraries()
    from hysparse_megatron.training.run import run

    run(config, rank, arguments.overrides)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure a library's exit handler could wait for a peer that is gone.
    os._exit(code)
