"""From text to token files, for corpora of any size: `hysparse prepare-data`.

    hysparse prepare-data --tokenizer tokenizer.json --output data/web web/*.jsonl.zst
    hysparse prepare-data --output data/web --verify

Inputs are files and folders of text (one document a file), JSON lines, both also as .gz and .zst,
Parquet, and datasets saved by `datasets.save_to_disk`. The output folder is what `data.path` of
training takes. A killed preparation goes on with the same command, and gives the same bytes.
Ends with 0, 2 for a wrong command, 3 when told to stop, 5 for bad input or a full disk.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from hysparse_megatron.command import command, make_parser
from hysparse_megatron.data.bulk import BulkRequest, prepare_bulk, verify_prepared
from hysparse_megatron.data.bulk.progress import Progress
from hysparse_megatron.data.bulk.run import MAX_DOCUMENT_BYTES
from hysparse_megatron.data.bulk.sources import KINDS
from hysparse_megatron.data.bulk.tokenizers import choose_tokenizer
from hysparse_megatron.data.card import PreparedCorpus
from hysparse_megatron.errors import ConfigError, Preempted


@command
def main(argv: Sequence[str]) -> int:
    """Prepare or verify as `argv` says, the command line without the program's name."""
    given = _parser().parse_args(list(argv))
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with Progress(is_quiet=given.quiet) as progress:
            _run(given, progress)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse prepare-data", __doc__)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files and folders, read in this order")
    add("--output", required=True, metavar="DIR", help="the folder to make")
    add(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model, a folder with either, or `bytes`",
    )
    add("--end-of-document", metavar="TOKEN", help="token that closes a document (default: found)")
    add(
        "--workers", type=int, default=_cores(), metavar="N", help="processes (default: one a core)"
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
        default=0.01,
        metavar="F",
        help="chance of a document to be held out, 0 for none (default %(default)s)",
    )
    add("--seed", type=int, default=1234, metavar="N", help="of the split (default %(default)s)")
    add("--verify", action="store_true", help="read the result again and check all of it")
    add("--overwrite", action="store_true", help="prepare again, and replace what is there")
    add("--quiet", action="store_true", help="print warnings and errors alone")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise Preempted(f"stopped by {signal.Signals(number).name}; the same command goes on")


def _run(given: argparse.Namespace, progress: Progress) -> None:
    if given.inputs:
        _summary(_prepare(given, progress), progress)
    elif not given.verify:
        raise ConfigError("no INPUT; name files or folders to prepare, or add --verify")
    if given.verify:
        prepared = verify_prepared(given.output, progress.note)
        progress.note(f"{prepared.directory}: all as its card says")


def _prepare(given: argparse.Namespace, progress: Progress) -> PreparedCorpus:
    if given.tokenizer is None:
        raise ConfigError("--tokenizer: missing; give a tokenizer's path, or `bytes`")
    for option in ("workers", "max_document_mb"):
        if getattr(given, option) < 1:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name}: got {getattr(given, option)}; allowed at least 1")
    request = BulkRequest(
        inputs=tuple(given.inputs),
        output=given.output,
        tokenizer=choose_tokenizer(given.tokenizer, given.end_of_document),
        kind=given.format,
        text_key=given.text_key,
        validation_fraction=given.validation_fraction,
        seed=given.seed,
        deduplicate=given.deduplicate,
        max_document_bytes=given.max_document_mb << 20,
    )
    return prepare_bulk(
        request,
        workers=given.workers,
        max_bad=None if given.max_bad < 0 else given.max_bad,
        overwrite=given.overwrite,
        progress=progress,
    )


def _summary(prepared: PreparedCorpus, progress: Progress) -> None:
    progress.note(
        f"{prepared.directory}: {prepared.train_tokens:,} training and "
        f"{prepared.validation_tokens:,} validation tokens in "
        f"{prepared.train_documents + prepared.validation_documents:,} documents "
        f"({prepared.empty_documents:,} empty and {prepared.bad_documents:,} bad left out), "
        f"vocabulary {prepared.vocab_size:,}, fingerprint {prepared.fingerprint[:12]}"
    )


if __name__ == "__main__":
    sys.exit(main())
