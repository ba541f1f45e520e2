"""Train and compare what a study file lists: `hysparse study run|table|corpus ...`.

    hysparse study corpus --sources unpacked --output corpus
    hysparse study run tools/study/claims.yaml --data data --results results --work work \\
        --minutes 25
    hysparse study table tools/study/claims.yaml --results results

`--data` is a folder of datasets that hysparse prepare-data made: `train` and those that the study's
evaluations name. Runs go through the ordinary training command. What is finished stands in
`--results`, one small file a run, and is never run again; a run that diverged is finished, and the
table says so; its checkpoints stay in `--work` to be looked into, with `--set
checkpoint.interval=50` more of them. A run that the minutes did not suffice for goes on from
`--work`. Ends with 0 also if runs are still lacking, and says which; with 2 for a study that cannot
be, or else as the first command that failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hysparse_megatron.command import CommandParser, command, make_parser, positive
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import writing

FREE = ("checkpoint.", "tracking.")
"""Groups of settings that decide no result."""


@command
def main(argv: Sequence[str]) -> int:
    """Do as `argv` says, the command line without the program's name."""
    args = _parser().parse_args(list(argv))
    try:
        args.action(args)
    except subprocess.CalledProcessError as error:
        print(f"ended with exit code {error.returncode}: {error.cmd}", file=sys.stderr)
        return error.returncode
    return 0


def _parser() -> CommandParser:
    parser = make_parser("hysparse study", __doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    corpus = actions.add_parser("corpus", help="make the study's text from unpacked packages")
    corpus.add_argument("--sources", type=Path, required=True, metavar="DIR")
    corpus.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    recipe = Path(__file__).with_name("recipe.yaml")
    corpus.add_argument("--recipe", type=Path, default=recipe, metavar="FILE")
    corpus.add_argument(
        "--part-bytes", type=positive, default=50_000_000, metavar="N", help="compressed, at most"
    )
    corpus.set_defaults(action=_corpus)
    run = actions.add_parser("run", help="run what is lacking")
    run.add_argument("study", type=Path, metavar="STUDY")
    run.add_argument("--data", type=Path, required=True, metavar="DIR")
    run.add_argument("--results", type=Path, required=True, metavar="DIR")
    run.add_argument("--work", type=Path, required=True, metavar="DIR")
    run.add_argument("--only", metavar="VARIANT,..", help="of these variants; default: all")
    run.add_argument("--minutes", type=positive, default=600, metavar="N", help="then stop")
    run.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs side by side")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help=f"a setting that decides no result, of {' or '.join(FREE)}; may be repeated",
    )  # fmt: skip
    run.set_defaults(action=_run)
    table = actions.add_parser("table", help="what is known so far, as Markdown")
    table.add_argument("study", type=Path, metavar="STUDY")
    table.add_argument("--results", type=Path, required=True, metavar="DIR")
    table.set_defaults(action=_table)
    return parser


def _corpus(args: argparse.Namespace) -> None:
    from .corpus import Recipe, write_corpus

    write_corpus(Recipe.read(args.recipe), args.sources, args.output, args.part_bytes)


def _run(args: argparse.Namespace) -> None:
    from .plan import read_study
    from .running import Place, run_portion

    deadline = time.monotonic() + 60 * args.minutes
    study = read_study(args.study)
    wanted = study.variants if args.only is None else tuple(args.only.split(","))
    if unknown := set(wanted) - set(study.variants):
        names = ", ".join(study.variants)
        raise ConfigError(f"--only: got {', '.join(sorted(unknown))}; allowed {names}")
    for setting in args.set:
        if not setting.startswith(FREE):
            raise ConfigError(
                f"--set {setting}: it may decide what a run results in, so it belongs into "
                f"{args.study}; only {' and '.join(f'{group}*' for group in FREE)} may be set here"
            )
    place = Place(
        data=args.data.resolve(),
        results=args.results.resolve(),
        work=args.work.resolve(),
        jobs=args.jobs,
        deadline=deadline,
        settings=tuple(args.set),
    )
    for option, folder in (("--results", place.results), ("--work", place.work)):
        with writing(folder, option):  # found out before the training
            folder.mkdir(parents=True, exist_ok=True)
    for run in run_portion(study, place, wanted):
        print(f"not finished: {run.name}")
    _table(args)


def _table(args: argparse.Namespace) -> None:
    from .plan import read_study
    from .table import render

    print(render(read_study(args.study), args.results))


if __name__ == "__main__":
    sys.exit(main())
