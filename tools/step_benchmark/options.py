"""The command line of the step benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hysparse_megatron.command import make_parser
from hysparse_megatron.config.compose import group_options
from hysparse_megatron.errors import ConfigError

from .attending import CLUSTERED, MODEL
from .slices import LAYOUTS
from .splits import ONE, read_split

_DESCRIPTION = """\
Time whole training steps of a slice of a model: all dimensions true, fewer layers or experts, a
smaller vocabulary, random tokens, one device or, with --splits, several of one machine. All
layouts, lengths and splits of one command are measured in one run, each in processes of its own,
and compared at the end. The layouts differ in nothing but `model.layout`.

  hysparse benchmark step --model hysparse_80b_a3b --layers 12 --experts 64 --vocab 8192 \\
      --lengths 32768 --set train.recompute=full
  hysparse benchmark step --compare-cpu --output curve.txt

Random weights select at random, the worst case of a sparse layer; with --picks clustered the sparse
layers read selections in which neighbouring tokens agree as the kernels' benchmark has them, with
--picks FILE.npz those that hysparse capture-selections saved of a trained model.

With --compare-cpu the loss of a small model (tiny_hysparse, or the one given) is followed on the
device and on the CPU instead, from equal weights and tokens.

exit codes: 0 measured, whatever the numbers; 1 nothing could be measured; 2 bad options
"""


_SPLITS = (
    "over how many devices: 1, dp2, tp2-cp4, cp2-layerwise, ..; each beside the others; default: 1"
)
_SLICE: dict[str, Any] = {"model": "hysparse_80b_a3b", "lengths": [32768]}
_CURVE: dict[str, Any] = {"model": "tiny_hysparse", "lengths": [512], "vocab": 4096}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options. Raises ConfigError; `--help` prints and leaves with 0."""
    parser = make_parser("hysparse benchmark step", _DESCRIPTION)
    count = _number(int, 1)
    seconds = _number(float, 0)
    add = parser.add_argument
    add("--model", metavar="PRESET", help=f"of conf/model, default: {_SLICE['model']}")
    add("--layers", type=count, metavar="N", help="default: whole hybrid blocks, 12 layers or more")
    add("--experts", type=count, metavar="N", help="experts of a layer; the active ones stay")
    add("--vocab", type=count, metavar="N", help="token ids; default: the preset's")
    add("--lengths", type=_list_of(_number(int, 2)), metavar="N,N", help="default: 32768")
    add("--layouts", type=_list_of(_layout), default=list(LAYOUTS), help="of full,swa,hysparse")
    add("--splits", type=_list_of(read_split), default=[ONE], metavar="SPLIT,..", help=_SPLITS)
    add("--reference", choices=["megatron"], help="also the full layout in megatron-core's layers")
    add("--steps", type=count, default=10, help="timed steps at most, default: %(default)s")
    add("--warmup", type=count, default=2, help="steps before, default: %(default)s")
    add("--case-seconds", type=seconds, default=60.0, help="one device: no third step after it")
    add("--micro-batches", type=count, default=1, metavar="N", help="per step")
    add("--set", action="append", default=[], nargs="+", metavar="KEY=VALUE", help="overrides")
    add("--picks", type=_picks, default=MODEL, help="model, clustered or FILE.npz; see above")
    add("--profile", action=argparse.BooleanOptionalAction, default=True, help="kernel families")
    add("--repeat", action=argparse.BooleanOptionalAction, default=True, help="measure the drift")
    add("--peak-tflops", type=_number(float, 1e-9), default=989.0, help="default: H100, H200 bf16")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--output", type=Path, metavar="FILE.txt", help="text file; the JSON lies beside it")
    add("--limit-seconds", type=seconds, default=540.0, help="start no case after so long")
    add("--compare-cpu", type=count, nargs="?", const=20, metavar="STEPS", help="default: 20")
    options = parser.parse_args(list(argv))
    _fill_in(options)
    if options.reference and options.splits != [ONE]:
        raise ConfigError(
            "--reference: megatron-core's layers run on one device; leave out --splits"
        )
    options.set = [override for group in options.set for override in group]
    for override in options.set:
        if "=" not in override or override.startswith("~"):
            raise ConfigError(f"--set {override}: not a setting; write key=value")
    if options.model not in group_options("model"):
        raise ConfigError(
            f"--model: got {options.model}; allowed one of {', '.join(group_options('model'))}"
        )
    if options.output is not None and options.output.suffix != ".txt":
        raise ConfigError(f"--output: got {options.output}; allowed a file that ends in .txt")
    options.device = _device(options.device)
    return options


def _fill_in(options: argparse.Namespace) -> None:
    """Defaults that depend on what is asked for: a CPU must be able to follow a curve."""
    defaults = _SLICE if options.compare_cpu is None else _CURVE
    if options.model is not None:
        defaults = {**defaults, "vocab": None}  # the preset's own
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _device(name: str) -> str:
    # Imported late: a bad option must fail before seconds of imports.
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device cuda: there is no CUDA device")
    return ("cuda" if available else "cpu") if name == "auto" else name


def _number(kind: Callable[[str], float], least: float) -> Callable[[str], Any]:
    """Reads an int or a float, whatever `kind` makes."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"got {text}; allowed numbers from {least:g}")
        return value

    return read


def _list_of[T](read: Callable[[str], T]) -> Callable[[str], list[T]]:
    def read_all(text: str) -> list[T]:
        # A repeated entry would be measured twice and compared with itself.
        return list(dict.fromkeys(read(part.strip()) for part in text.split(",")))

    return read_all


def _picks(text: str) -> str:
    if text not in (MODEL, CLUSTERED) and not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"got {text}; allowed model, clustered or a file")
    return text if text in (MODEL, CLUSTERED) else str(Path(text).resolve())


def _layout(text: str) -> str:
    if text not in LAYOUTS:
        raise argparse.ArgumentTypeError(f"got {text}; allowed some of {','.join(LAYOUTS)}")
    return text
