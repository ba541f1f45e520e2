"""To and from Hugging Face: `hysparse convert COMMAND ...`.

    hysparse convert export --run-dir runs/quickstart exported/quickstart
    hysparse convert import exported/quickstart starts/quickstart
    hysparse convert adopt models/llama starts/llama --layout "7*(F 3*S) F 2*S F"

export makes a folder of a run's checkpoint, saved on any number of ranks, that transformers loads
without any code of this project: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=
True). import makes of such a folder, trained further or not, one that a run starts from with
checkpoint.load; adopt does so of a Llama, Mistral, Qwen2 or Qwen3 model. Ends with 0, with 2 if
something asked for cannot be, or with 6 if a checkpoint is missing or damaged.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hysparse_megatron.checkpoint import store
from hysparse_megatron.command import command, make_parser, number, positive
from hysparse_megatron.config.frozen import CONFIG_FILE, load_frozen
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.packages import require_package
from hysparse_megatron.tracking.metrics import by_evaluation, read_metrics

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@command
def main(argv: Sequence[str]) -> int:
    """Do what `argv` says, the command line without the program's name."""
    args = _parser().parse_args(list(argv))
    return args.action(args)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse convert", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "a checkpoint as a Hugging Face folder"
    exporting = commands.add_parser("export", help=text, description=text, allow_abbrev=False)
    exporting.set_defaults(action=_export)
    exporting.add_argument("--run-dir", type=Path, required=True, help="the run")
    exporting.add_argument(
        "--checkpoint", default="newest", metavar="STEP", help="its step; newest takes the newest"
    )
    exporting.add_argument("--dtype", choices=DTYPES, help="of the weights; the checkpoint's")
    exporting.add_argument(
        "--shard-size", type=_size, default="5GB", help="largest file (%(default)s)"
    )
    exporting.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json or its folder; the run's if left out"
    )
    exporting.add_argument(
        "--no-verify", action="store_true", help="leave out comparing files with their hashes"
    )
    exporting.add_argument(
        "--license", metavar="ID", help="of the weights, for the model card, such as apache-2.0"
    )
    exporting.add_argument("folder", type=Path, help="to write; must not exist")
    text = "a Hugging Face folder of this model as a checkpoint to start from"
    importing = commands.add_parser("import", help=text, description=text, allow_abbrev=False)
    importing.set_defaults(action=_import)
    importing.add_argument("source", type=Path, help="the Hugging Face folder")
    importing.add_argument("folder", type=Path, help="to write; must not exist")
    text = "a model with full attention as a HySparse checkpoint to start from"
    adopting = commands.add_parser("adopt", help=text, description=text, allow_abbrev=False)
    adopting.set_defaults(action=_adopt)
    adopting.add_argument(
        "source", type=Path, help="its Hugging Face folder: llama, mistral, qwen2, qwen3"
    )
    adopting.add_argument("folder", type=Path, help="to write; must not exist")
    adopting.add_argument("--layout", required=True, help='one letter per layer: "7*(F 3*S) F"')
    for option, default, text in (
        ("--window", 128, "tokens a query sees of its own layer"),
        ("--block-size", 64, "tokens in a block"),
        ("--num-selected", 16, "blocks a query reads of its oracle"),
    ):
        text += " (%(default)s)"
        adopting.add_argument(option, type=positive, default=default, metavar="N", help=text)
    adopting.add_argument(
        "--sparse-sink",
        type=_sink,
        default=4.0,
        metavar="LOGIT",
        help="leaves the sparse branch a small share at the start (%(default)s)",
    )
    return parser


def _size(text: str) -> int:
    digits, unit = text[:-2], text[-2:].upper()
    if not digits.isdecimal() or unit not in UNITS or not int(digits):
        raise argparse.ArgumentTypeError(f"got {text}; allowed a whole number and KB, MB or GB")
    return int(digits) * UNITS[unit]


def _sink(text: str) -> float:
    # Beyond these a softmax in fp32 is all sink or none of it, and learns nothing of it.
    return number(text, lambda found: -100 <= found <= 100, "a number from -100 to 100")


def _export(args: argparse.Namespace) -> int:
    config_file = args.run_dir / CONFIG_FILE
    if not config_file.is_file():
        raise ConfigError(f"--run-dir: {args.run_dir} is no run directory: no {CONFIG_FILE}")
    config = load_frozen(config_file)
    checkpoint = _checkpoint(args.run_dir, args.checkpoint, content=not args.no_verify)
    # Imported late: what is wrong with the command is said without waiting for torch.
    import torch

    require_package("safetensors", "export")
    from hysparse_megatron.data.run_tokenizer import with_own_tokenizer
    from hysparse_megatron.data.tokenizer import tokenizer_file
    from hysparse_megatron.huggingface.export import Request, export

    request = Request(
        checkpoint,
        dataclasses.replace(config, data=with_own_tokenizer(config.data, args.run_dir)),
        Path(tokenizer_file(str(args.tokenizer))) if args.tokenizer else None,
        getattr(torch, DTYPES[args.dtype]) if args.dtype else None,
        args.shard_size,
        _evaluations(args.run_dir),
        args.license,
    )
    export(request, args.folder, print)
    print(f"{checkpoint} -> {args.folder}")
    return 0


def _evaluations(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Of the run, by the set that they are on; weights that came from elsewhere have none."""
    metrics = run_dir / "metrics.jsonl"
    return by_evaluation(read_metrics(metrics)) if metrics.is_file() else {}


def _import(args: argparse.Namespace) -> int:
    require_package("safetensors", "import")
    from hysparse_megatron.huggingface.importing import import_folder

    import_folder(args.source, args.folder, print)
    _tell_next(args.folder)
    return 0


def _adopt(args: argparse.Namespace) -> int:
    require_package("transformers", "adopt")
    from hysparse_megatron.huggingface.adopt import Choices, adopt

    choices = Choices(
        args.layout, args.window, args.block_size, args.num_selected, args.sparse_sink
    )
    adopt(args.source, args.folder, choices, print)
    _tell_next(args.folder)
    return 0


def _tell_next(folder: Path) -> None:
    print(f"start a run with checkpoint.load={folder} and the model of {folder}/experiment.yaml")


def _checkpoint(run_dir: Path, chosen: str, content: bool) -> Path:
    path, step = store.meant(run_dir, chosen)
    if not path.is_dir():
        raise ConfigError(f"--checkpoint: got {chosen}; allowed newest, a step, or its directory")
    judge = functools.partial(store.problems_of, content=content)
    return store.resolve(path, step, judge, log=functools.partial(print, file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
