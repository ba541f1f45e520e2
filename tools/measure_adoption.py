"""What training brings back after `hysparse convert adopt`: `hysparse measure-adoption`.

    hysparse measure-adoption --seeds 1 2 3 --output adoption.json
    hysparse measure-adoption --layout "F 3*S F 2*S F" --window 16 --steps 200

For each seed: trains a small Llama of transformers on the sample text, chooses the layers that stay
full with hysparse choose-full-layers (or takes --layout), adopts it twice, once with that layout
and once with full attention everywhere, trains both on with the same settings and batches, and a
model of that layout from random weights, and prints their held-out losses. The gap is what the
adopted model loses more than the original; how much of it is gone after the steps is said twice:

    of the gap to the original as it was when it was adopted (training helps, whatever the layout)
    of the gap to the original trained on for as long

Takes a GPU if there is one: the defaults are for a CPU, half an hour for a seed. Ends with 0,
whatever the numbers, or as the first command that failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hysparse_megatron.architecture.layers import LayerKind
from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.command import command, make_parser, positive
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.frozen import CONFIG_FILE, freeze, load_frozen
from hysparse_megatron.config.schema import Config, Schedule
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import require_writable, writing
from hysparse_megatron.packages import require_package
from hysparse_megatron.runtime.quiet import quiet_libraries
from hysparse_megatron.tracking.metrics import read_metrics

_ORIGINAL_PEAK_RATE = 1.5e-3
_ORIGINAL_WARMUP_STEPS = 20
_ORIGINAL_DECAY_SHARE = 0.3
# Another order than that of the runs that train on, which would repeat the first batches.
_ORIGINAL_ORDER = 1
_HELD_OUT_SHARE = 0.2


@command
def main(argv: Sequence[str]) -> int:
    """Measure as `argv` says, the command line without the program's name."""
    args = _parser().parse_args(list(argv))
    settings = {name: str(value) for name, value in vars(args).items()}
    rows: list[dict[str, Any]] = []
    quiet_libraries()
    try:
        _check(args)
        with tempfile.TemporaryDirectory(prefix="measure-adoption-") as name:
            folder = (args.folder or Path(name)).resolve()  # commands run elsewhere
            for seed in args.seeds:
                rows.append(_measure(args, seed, folder / f"seed-{seed}"))
                if args.output is not None:  # after each: the next one may fail
                    content = json.dumps({"settings": settings, "seeds": rows}, indent=1)
                    with writing(args.output, "--output"):
                        args.output.write_text(content + "\n", encoding="utf-8")
    except subprocess.CalledProcessError as error:
        print(f"ended with exit code {error.returncode}: {error.cmd}", file=sys.stderr)
        return error.returncode
    for text, name in (("as it was", "of_original"), ("trained on", "of_trained_on")):
        shares = [row[name] for row in rows if row[name] is not None]
        if shares:
            print(
                f"gap to the original {text}: {statistics.mean(shares):.1%} gone (mean of "
                f"{len(shares)}, {min(shares):.1%} to {max(shares):.1%})"
            )
    return 0


def _check(args: argparse.Namespace) -> None:
    """Find out before minutes of work. Raises ConfigError."""
    if args.layout is not None:
        args.layers = parse_layout(args.layout).num_layers
        if set(parse_layout(args.layout).kinds) == {LayerKind.FULL}:
            raise ConfigError(f"--layout: {args.layout} has full layers alone: there is no gap")
    elif args.full_layers >= args.layers:
        raise ConfigError(
            f"--full-layers: got {args.full_layers}; allowed fewer than {args.layers}"
        )
    if args.decay >= args.steps:
        raise ConfigError(f"--decay: got {args.decay}; allowed less than --steps={args.steps}")
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError("--seeds: one comes twice; allowed each once")
    for seed in args.seeds if args.folder is not None else ():
        if (args.folder / f"seed-{seed}").exists():
            raise ConfigError(f"--folder: {args.folder} has seed-{seed} already; name another")
    require_writable(args.output, "--output")
    require_package("transformers", "training the original")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse measure-adoption", __doc__)

    def add(option: str, default: Any, text: str, kind: Any = positive) -> None:
        text += "" if default is None else " (%(default)s)"
        metavar = option.removeprefix("--").replace("-", "_").upper()
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=text)

    add("--layout", None, "of the adopted model; chosen if left out", str)
    add("--layers", 8, "of the models, if no layout is given")
    add("--full-layers", 3, "that stay full, if no layout is given")
    add("--window", 4, "tokens a query sees of its own layer")
    add("--block-size", 8, "tokens in a block")
    add("--num-selected", 4, "blocks a query reads of its oracle")
    add("--sparse-sink", 4.0, "logit that closes the sparse branch at the start", float)
    add("--length", 256, "tokens of a sequence")
    add("--original-steps", 600, "of the original's training, 8 sequences each")
    add("--steps", 100, "of training on")
    add("--sequences", 16, "of a step of training on")
    add("--rate", 2e-3, "peak learning rate of training on", float)
    add("--decay", 40, "last steps of training on, in which the rate falls to 0")
    add("--held-out", 256, "sequences of an evaluation, at least")
    add("--folder", None, "keep models and runs there; it must not have them", Path)
    add("--output", None, "JSON file for all numbers", Path)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], metavar="N", help="of weights, data and split"
    )
    return parser


def _measure(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    with writing(folder, "--folder"):
        folder.mkdir(parents=True)
    original = _train_original(args, seed, folder / "original")
    chosen = args.layout or _choose(args, original, folder)
    full = _adopt(args, original, folder / "full-start", f"{args.layers}*F")
    adopted = _adopt(args, original, folder / "adopted-start", chosen)
    was, became = _train_on(args, seed, full, folder / "full-run")
    start_loss, end_loss = _train_on(args, seed, adopted, folder / "adopted-run")
    _, from_random = _train_on(args, seed, adopted, folder / "random-run", random=True)
    gap = start_loss - was
    row = {
        "seed": seed,
        "layout": chosen,
        "original": was,
        "original_trained_on": became,
        "adopted": start_loss,
        "adopted_trained_on": end_loss,
        "random_trained": from_random,
        "of_original": (start_loss - end_loss) / gap if gap > 0 else None,
        "of_trained_on": 1 - (end_loss - became) / gap if gap > 0 else None,
    }
    told = (
        f"seed {seed}, {chosen}: original {was:.4f}, after {args.steps} steps {became:.4f}; "
        f"adopted {start_loss:.4f}, after {args.steps} steps {end_loss:.4f} (from random weights "
        f"{from_random:.4f}); "
    )
    if gap > 0:
        told += (
            f"of the gap of {gap:.4f} {row['of_original']:.1%} gone, {row['of_trained_on']:.1%} "
            "beside the original trained on"
        )
    print(told if gap > 0 else f"{told}no gap", flush=True)
    return row


def _train_on(
    args: argparse.Namespace, seed: int, start: Path, run_dir: Path, random: bool = False
) -> tuple[float, float]:
    """Held-out losses before and after training the model of `start`, or one of random weights."""
    config = _run_config(args, seed, start, run_dir)
    if random:
        checkpoint = dataclasses.replace(config.checkpoint, load=None)
        config = dataclasses.replace(config, checkpoint=checkpoint)
    settings = run_dir.with_name(f"{run_dir.name}-settings")
    freeze(config, settings)
    _command("train", "--config", str(settings / CONFIG_FILE))
    found = read_metrics(run_dir / "metrics.jsonl")
    evaluations = [row["eval_loss"] for row in found if "eval_loss" in row]
    return evaluations[0], evaluations[-1]


def _adopt(args: argparse.Namespace, original: Path, start: Path, layout: str) -> Path:
    options = ("window", "block_size", "num_selected", "sparse_sink")
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(args, name))) for name in options]
    arguments = [text for pair in pairs for text in pair]
    _command("convert", "adopt", str(original), str(start), "--layout", layout, *arguments)
    return start


def _choose(args: argparse.Namespace, original: Path, folder: Path) -> str:
    """By another split than those of the runs, mostly of text that they train on."""
    start = _adopt(args, original, folder / "windows-start", f"{args.layers}*W")
    found = folder / "layers.json"
    _command(
        "choose-full-layers", "--run-dir", str(start), "--count", str(args.full_layers),
        "--json", str(found),
    )  # fmt: skip
    return json.loads(found.read_text())["layout"]


def _command(*words: str) -> None:
    """Run a command of `hysparse`; its output is shown only if it fails."""
    command = [sys.executable, "-m", "hysparse_megatron.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, f"hysparse {' '.join(words)}")


def _run_config(args: argparse.Namespace, seed: int, start: Path, run_dir: Path) -> Config:
    """Of training on from the adopted model in `start`."""
    import torch

    config = load_frozen(start / CONFIG_FILE)
    train = dataclasses.replace(
        config.train,
        steps=args.steps,
        seq_length=args.length,
        global_batch_size=args.sequences,
        micro_batch_size=math.gcd(args.sequences, 128 if torch.cuda.is_available() else 8),
        seed=seed,
        eval_interval=0,
        eval_batches=-(-args.held_out // args.sequences),
    )
    optim = dataclasses.replace(
        config.optim,
        learning_rate=args.rate,
        min_learning_rate=0.0,
        schedule=Schedule.wsd,
        warmup_steps=min(5, args.steps - args.decay),
        decay_steps=args.decay,
    )
    return dataclasses.replace(
        config,
        name=run_dir.name,
        run_dir=str(run_dir),
        train=train,
        optim=optim,
        data=dataclasses.replace(config.data, validation_fraction=_HELD_OUT_SHARE),
    )


def _new_llama(args: argparse.Namespace, vocab_size: int) -> Any:
    """Random weights, two million with 8 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=args.length,
            tie_word_embeddings=True,
        )
    )


def _train_original(args: argparse.Namespace, seed: int, folder: Path) -> Path:
    """A small Llama, trained on the training split of the sample text."""
    # Imported late: mistakes must not wait for it.
    import shutil

    import torch

    from hysparse_megatron.data.prepare.cached import prepare_corpus
    from hysparse_megatron.data.read.batches import BatchSource
    from hysparse_megatron.data.read.order import Position
    from hysparse_megatron.data.sources import open_samples

    settings = dataclasses.replace(compose([]).data, validation_fraction=_HELD_OUT_SHARE)
    data = prepare_corpus(settings, seed)
    batches = BatchSource(
        open_samples(data, "train", args.length),
        seed=seed + _ORIGINAL_ORDER,
        fingerprint=data.fingerprint,
        global_batch_size=8,
        micro_batch_size=8,
    )
    torch.manual_seed(seed)
    model = _new_llama(args, data.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_ORIGINAL_PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    steps = args.original_steps
    decay = max(1, round(_ORIGINAL_DECAY_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / _ORIGINAL_WARMUP_STEPS, (steps - step) / decay),
    )
    position = Position()
    for _ in range(steps):
        [batch] = batches.microbatches(position)
        position = batches.after(position)
        logits = model(input_ids=batch["tokens"].to(device)).logits
        labels = batch["labels"].to(device)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.cpu().save_pretrained(folder)
    shutil.copy(data.tokenizer_path, folder / "tokenizer.json")
    return folder


if __name__ == "__main__":
    sys.exit(main())
