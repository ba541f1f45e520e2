"""From text to token files, for corpora of any size: `hysparse prepare-data`.

    hysparse prepare-data --tokenizer tokenizer.json --output data/web web/*.jsonl.zst
    hysparse prepare-data --output data/web --verify

Inputs are files and folders of text (one document a file), JSON lines, both also as .gz and .zst,
Parquet, and datasets saved by `datasets.save_to_disk`, here or where fsspec finds them, as in
s3://bucket/folder. The output folder is what `data.path` of training takes. A killed preparation
goes on with the same command, and gives the same bytes, whoever does the work.
Ends with 0, 2 for a wrong command, 3 when told to stop, 5 for bad input or a full disk, 1 where
worker processes or a cluster's tasks were lost: after 1 and 3 the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from types import FrameType

from hysparse_megatron.command import command, given, make_parser
from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.data.places import is_local
from hysparse_megatron.data.prepare.executors import Executor, LocalProcesses, RayTasks, SlurmJobs
from hysparse_megatron.data.prepare.progress import Progress
from hysparse_megatron.data.prepare.request import (
    MAX_DOCUMENT_BYTES,
    SPLIT_SEED,
    VALIDATION_FRACTION,
    PrepareRequest,
    sources_of,
)
from hysparse_megatron.data.prepare.run import prepare
from hysparse_megatron.data.prepare.sources import KINDS
from hysparse_megatron.data.prepare.verify import verify_prepared
from hysparse_megatron.data.tokenizer_choice import choose_tokenizer
from hysparse_megatron.errors import ConfigError, Preempted

_AROUND = ("begin_of_document", "end_of_document")


@command
def main(argv: Sequence[str]) -> int:
    """Prepare or verify as `argv` says, the command line without the program's name."""
    args = _parser().parse_args(list(argv))
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with closing(Progress(is_quiet=args.quiet)) as progress:
            _run(args, progress)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse prepare-data", __doc__)
    add = parser.add_argument
    add(
        "inputs", nargs="*", type=given, metavar="INPUT", help="files, folders, URLs, in this order"
    )
    add("--output", required=True, type=given, metavar="DIR", help="the folder to make")
    add(
        "--tokenizer",
        type=given,
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model, a folder with either, or `bytes`",
    )
    add("--vocab-size", type=int, metavar="N", help="train a tokenizer of N ids on the inputs")
    add(
        "--end-of-document",
        type=given,
        metavar="TOKEN",
        help="token that closes a document (default: found)",
    )
    add(
        "--begin-of-document",
        type=given,
        metavar="TOKEN",
        help="token that a document begins with, or none (default: as the tokenizer does)",
    )
    add("--format", choices=KINDS, help="of all files (default: by their names)")
    add("--text-key", default="text", metavar="KEY", help="JSON field or column (default text)")
    add(
        "--max-bad",
        type=int,
        default=0,
        metavar="N",
        help="bad documents to leave out before giving up (default 0; -1: any number)",
    )
    add(
        "--max-document-mb",
        type=int,
        default=MAX_DOCUMENT_BYTES >> 20,
        metavar="N",
        help="longer JSON lines and rows are bad (default %(default)s MiB)",
    )
    add("--deduplicate", action="store_true", help="keep the first of documents with equal text")
    add(
        "--validation-fraction",
        type=float,
        default=VALIDATION_FRACTION,
        metavar="F",
        help="chance of a document to be held out, 0 for none, 1 for all (default %(default)s)",
    )
    add("--seed", type=int, default=SPLIT_SEED, metavar="N", help="of the split (%(default)s)")
    add("--verify", action="store_true", help="read the result again and check all of it")
    add("--overwrite", action="store_true", help="prepare again, and replace what is there")
    add("--quiet", action="store_true", help="print warnings and errors alone")
    _add_executor_options(parser)
    return parser


def _add_executor_options(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("who does the work; the result does not depend on it")
    add = work.add_argument
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="(default local)")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes, or tasks of the cluster (default: one a core; cluster: 64)",
    )
    add("--cpus-per-task", type=int, metavar="N", help="cores of a task of the cluster (default 1)")
    add("--slurm-partition", metavar="NAME", help="needed with --executor slurm")
    add("--slurm-time", default="24:00:00", metavar="T", help="limit of a task (%(default)s)")
    add(
        "--slurm-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="more for sbatch, as account=lab; may be given several times",
    )


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise Preempted(f"stopped by {signal.Signals(number).name}; the same command goes on")


def _run(args: argparse.Namespace, progress: Progress) -> None:
    if args.inputs:
        if _prepare(args, progress) is None:
            progress.note(f"{args.output}: is whole; copy it to where training can read it")
    elif not args.verify:
        raise ConfigError("no INPUT; name files or folders to prepare, or add --verify")
    if args.verify:
        if not is_local(args.output):
            raise ConfigError("--verify reads local folders; copy the output, and verify that")
        prepared = verify_prepared(args.output, progress.note)
        progress.note(f"{prepared.directory}: all as its card says")


def _prepare(args: argparse.Namespace, progress: Progress) -> PreparedCorpus | None:
    if (args.tokenizer is None) == (args.vocab_size is None):
        raise ConfigError(
            "--tokenizer: missing; give a tokenizer's path or `bytes`, or --vocab-size to train one"
            if args.tokenizer is None
            else "--vocab-size: is for training one; a given --tokenizer has its own"
        )
    for option in ("workers", "cpus_per_task", "max_document_mb"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')}: got {value}; allowed at least 1")
    executor = _executor(args)
    tokenizer = None
    if args.tokenizer is not None:
        tokenizer = choose_tokenizer(args.tokenizer, args.end_of_document, args.begin_of_document)
    for name in _AROUND:
        if getattr(args, name) and (tokenizer is None or tokenizer.path is None):
            raise ConfigError(
                f"--{name.replace('_', '-')}: is for a tokenizer with a file; for bytes and one "
                "that is trained here it is fixed"
            )
    sources, description = sources_of(args.inputs, args.output, args.format)
    request = PrepareRequest(
        sources=sources,
        output=args.output,
        tokenizer=tokenizer,
        vocab_size=args.vocab_size or 0,
        text_key=args.text_key,
        validation_fraction=args.validation_fraction,
        seed=args.seed,
        deduplicate=args.deduplicate,
        max_document_bytes=args.max_document_mb << 20,
        description=description,
    )
    return prepare(
        request,
        executor=executor,
        max_bad=None if args.max_bad < 0 else args.max_bad,
        overwrite=args.overwrite,
        compare_inputs=args.verify,
        progress=progress,
    )


def _executor(args: argparse.Namespace) -> Executor:
    if args.executor != "slurm" and (args.slurm_partition or args.slurm_option):
        raise ConfigError("--slurm-partition, --slurm-option: are for --executor slurm")
    if args.executor == "local" and args.cpus_per_task:
        raise ConfigError("--cpus-per-task: is for a cluster's tasks; --workers are processes here")
    if args.executor == "local":
        return LocalProcesses(args.workers or len(os.sched_getaffinity(0)))
    tasks, cpus = args.workers or 64, args.cpus_per_task or 1
    if args.executor == "ray":
        return RayTasks(tasks, cpus)
    if args.slurm_partition is None:
        raise ConfigError("--slurm-partition: missing; name a partition (sinfo lists them)")
    pairs = [option.partition("=") for option in args.slurm_option]
    options = {name.lstrip("-"): value for name, _, value in pairs}
    return SlurmJobs(tasks, args.slurm_partition, args.slurm_time, cpus, options)


if __name__ == "__main__":
    sys.exit(main())
