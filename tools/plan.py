"""What a run will cost, before any cluster is asked: `hysparse plan [options] [overrides]`.

    hysparse plan --gpus 256 experiment=paper_80b_a3b_32k cluster=h100 parallel.ep=8
    hysparse plan --gpus 64 --suggest 5 experiment=paper_7b_8k cluster=h100

Needs no GPU and allocates no weights. Takes the overrides of `hysparse train`. Ends
with 0, or with 2 for a plan that cannot run, after naming the nearest plans that can.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hysparse_megatron.command import command, positive
from hysparse_megatron.config.cli import arguments_of, load, settings_parser
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import require_writable, writing
from hysparse_megatron.plan.picture import draw
from hysparse_megatron.plan.ranks import num_ranks
from hysparse_megatron.plan.report import as_text, as_values
from hysparse_megatron.plan.suggest import check, overview_of, suggest


@command
def main(argv: Sequence[str]) -> int:
    """Print the plan of `argv`, the command line without the program's name."""
    parser = settings_parser("hysparse plan", __doc__)
    text = (
        "ranks (default: as hysparse submit would start, the fewest that the parallel sizes allow)"
    )
    parser.add_argument("--gpus", type=positive, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--suggest", type=positive, metavar="N", help="N plans, best first")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the plan")
    args = parser.parse_intermixed_args(list(argv))
    if args.suggest and args.plot:
        raise ConfigError("--plot draws one plan: give it with the settings of a suggested one")
    require_writable(args.plot, "--plot")
    return _print_plan(load(arguments_of(args)), args)


def _print_plan(config: Config, args: argparse.Namespace) -> int:
    gpus = args.gpus or num_ranks(config)
    if args.suggest:
        plans = suggest(config, gpus, args.suggest)
        if not plans:
            check(config, gpus)  # says so where no plan could help
            raise ConfigError(f"no plan of this model and batch works on {gpus} GPUs")
        if args.json:
            print(json.dumps([as_values(plan.overview) for plan in plans], default=str))
        else:
            print("\n".join(map(str, plans)))
        return 0
    check(config, gpus)
    overview = overview_of(config, gpus)
    print(json.dumps(as_values(overview)) if args.json else as_text(overview))
    if args.plot:
        with writing(args.plot, "--plot"):
            args.plot.write_text(draw(overview))
    return 0


if __name__ == "__main__":
    sys.exit(main())
