"""Options of the commands that use the model of a run, and what they all read of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hysparse_megatron.command import given

if TYPE_CHECKING:
    from hysparse_megatron.data.tokenizer import Encoder
    from hysparse_megatron.inference.load import LoadedModel


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The run, which of its checkpoints, and a tokenizer beside its own."""
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, metavar="RUN", help="the run directory")
    add(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest (the default), a step of the run, or the directory of a checkpoint",
    )
    add(
        "--tokenizer",
        type=given,
        metavar="PATH",
        help="its file or folder (default: found by its hash)",
    )


def tokenizer_of(args: argparse.Namespace, loaded: LoadedModel) -> Encoder:
    """The one that is asked for, or the run's. Raises DataError if it is not to be found."""
    from hysparse_megatron.data.run_tokenizer import load_run_tokenizer

    found = loaded.config.data, loaded.tokenizer_sha256, args.tokenizer
    return load_run_tokenizer(*found, loaded.data)
