"""Which layers to keep full when a model is adopted: `hysparse choose-full-layers`.

    hysparse convert adopt models/llama starts/windows --layout "32*W" --window 128
    hysparse choose-full-layers --run-dir starts/windows --count 9 --data data/web
    torchrun --nproc-per-node 4 -m hysparse_megatron.main choose-full-layers ...

Starts from the model with windows alone and its first layer full, and makes one layer after the
other full again, each time the one that lowers the held-out loss most. Prints every choice, and the
layout for `hysparse convert adopt`. Runs the model once for every layer not chosen yet and choice.
Ends with 0, with 2 for settings that cannot be or do not fit into memory, with 5 if data are not
there, with 6 if there is no valid checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.command import command, given, make_parser, positive
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import require_writable, writing
from hysparse_megatron.runtime.launcher import rank_from_environment
from hysparse_megatron.runtime.quiet import quiet_libraries

if TYPE_CHECKING:
    from hysparse_megatron.config.schema import Config
    from hysparse_megatron.inference.load import LoadedModel

MOST_TOKENS = 4096
"""Of a sequence, unless asked for: logits of longer ones fill a card, and layers differ soon."""
BROKEN_NATS = 1.0
"""Windows that cost more than this leave a model whose layers say little about the whole one."""


@command
def main(argv: Sequence[str]) -> int:
    """Choose as `argv` says, the command line without the program's name."""
    args = _parser().parse_args(list(argv))
    rank = rank_from_environment()
    require_writable(args.json, "--json")
    # Imported late: a wrong command must fail before seconds of imports.
    quiet_libraries()
    import torch

    from hysparse_megatron.inference.load import inference_config, loaded_run

    config = inference_config(args.run_dir, rank.world_size)
    length = _length(args, config)
    try:
        with loaded_run(rank, config, args.run_dir) as loaded:
            results = _choose(args, loaded, length, is_first=rank.rank == 0)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{args.batch_size} sequences of {length:,} tokens do not fit into memory: lower "
            "--batch-size or --length, or split the model with torchrun"
        ) from error
    if rank.rank == 0 and args.json is not None:
        with writing(args.json, "--json"):
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse choose-full-layers", __doc__)
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, metavar="DIR", help="adopted with windows alone")
    add("--count", type=positive, required=True, metavar="N", help="full layers, the first too")
    add(
        "--data",
        type=given,
        metavar="PATH",
        help="text (many documents: a share is held out) or prepared dataset (default: the sample)",
    )
    add(
        "--length",
        type=positive,
        metavar="N",
        help=f"tokens of a sequence (default: the model's, at most {MOST_TOKENS})",
    )
    add("--sequences", type=positive, default=64, metavar="N", help="held-out ones (%(default)s)")
    add("--batch-size", type=positive, default=1, metavar="N", help="at a time (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write all losses there")
    return parser


def _length(args: argparse.Namespace, config: Config) -> int:
    """Tokens of a sequence. Raises ConfigError for a choice that the model does not have."""
    from hysparse_megatron.evaluation.placement import require_windows

    require_windows(config.model.layout)
    num_layers = parse_layout(config.model.layout).num_layers
    if args.count > num_layers:
        raise ConfigError(f"--count: got {args.count}; allowed at most the {num_layers} layers")
    return args.length or min(config.train.seq_length, MOST_TOKENS)


def _choose(
    args: argparse.Namespace, loaded: LoadedModel, length: int, is_first: bool
) -> dict[str, Any]:
    from hysparse_megatron.evaluation.held_out import held_out_batches
    from hysparse_megatron.evaluation.placement import Placement, layout_of

    def log(text: str) -> None:
        if is_first:
            print(text, flush=True)

    def note(text: str) -> None:
        if is_first and sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)

    num_layers, trained = len(loaded.kinds), loaded.config.train.seq_length
    if length > trained:
        log(f"note: {length:,} tokens, but the model was trained on {trained:,} at a time")
    batches = held_out_batches(loaded, length, args.sequences, args.batch_size, args.data)
    placement = Placement(loaded, batches, length, note)
    whole, first = placement.loss(range(num_layers)), placement.loss([0])
    log(f"held-out loss with full attention {whole:.4f}; with windows but for layer 0 {first:.4f}")
    if first - whole > BROKEN_NATS:
        log(
            f"WARNING: {first - whole:.1f} nats more: with such windows the model hardly works, "
            "and the first choices may say little. Compare with larger ones"
        )
    full, choices = [0], []
    for choice in placement.choose(args.count):
        full.append(choice.layer)
        choices.append(dataclasses.asdict(choice))
        best, *others = sorted(choice.losses.items(), key=lambda pair: pair[1])
        after = ", ".join(f"{layer}: {loss:.4f}" for layer, loss in others[:3])
        log(f"layer {best[0]:>3} full too: {best[1]:.4f}" + (f"  (next {after})" if after else ""))
    layout = layout_of(full, num_layers)
    log(f'--layout "{layout}"')
    return {"layout": layout, "full": whole, "first_alone": first, "choices": choices}


if __name__ == "__main__":
    sys.exit(main())
