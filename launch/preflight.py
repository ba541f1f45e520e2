"""Look before a run: `hysparse preflight [--config FILE] [overrides]`.

Alone it checks what one process can see. As one process per rank, under srun or torchrun, every
machine checks itself, all ranks compare what they run, and one all-reduce goes over all of them.
Changes nothing. Prints OK, WARN or FAIL for each check, with what to do.

Exit codes: 0 no failure; 2 a failure or a bad configuration; 75 the ranks did not meet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hysparse_megatron.command import command
from hysparse_megatron.config.cli import arguments_of, load, settings_parser
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import RankFailure
from hysparse_megatron.plan.ranks import num_ranks
from hysparse_megatron.plan.suggest import check, overview_of
from hysparse_megatron.runtime.launcher import Rank, rank_from_environment

from .checks import login_checks, node_checks
from .findings import as_text, has_failed
from .job import NO_RENDEZVOUS

JOIN_SECONDS = 30.0
"""How long ranks wait for each other here, in everything they do together."""


@command
def main(argv: Sequence[str]) -> int:
    """Check the run of `argv`, the command line without the program's name."""
    parser = settings_parser("hysparse preflight", __doc__)
    config = load(arguments_of(parser.parse_intermixed_args(list(argv))))
    rank = rank_from_environment()
    if rank.world_size > 1:
        check(config, rank.world_size)
        return _together(config, rank)
    check(config, num_ranks(config))
    findings = login_checks(config, overview_of(config, num_ranks(config)))
    print(as_text(findings))
    return 2 if has_failed(findings) else 0


def _together(config: Config, rank: Rank) -> int:
    from .rank_checks import rank_checks  # imports torch

    own = node_checks(config) if rank.local_rank == 0 else []
    try:
        findings = rank_checks(config, rank, own, JOIN_SECONDS)
    except RankFailure as error:
        print(f"rank {rank.rank}: {error}", file=sys.stderr, flush=True)
        return NO_RENDEZVOUS
    if rank.rank == 0:
        print(as_text(findings), flush=True)
    return 2 if has_failed(findings) else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a library's exit handler could wait for a peer that is gone.
    os._exit(code)
