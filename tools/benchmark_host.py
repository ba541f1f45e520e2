"""What the GPUs of one host do together: `hysparse benchmark host PART [options]`.

    hysparse benchmark host scaling --gpus 8 --output logs

Each part is one or a few commands of `hysparse benchmark step`, each within ten minutes on eight
H200, with a log of its own in the folder `--output`. `--dry-run` prints them.

    7b       the 7B model at 8,192 tokens: full, windows and HySparse, data parallel
    long     the same at 131,072 and 262,144 tokens, context parallel
    experts  a slice of 80B-A3B with its experts over all GPUs
    million  one hybrid block of 80B-A3B at 1,048,576 tokens, context parallel
    scaling  a slice of 7B over 1, 2, 4, .. GPUs in every way, beside what the planner expects
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hysparse_megatron.command import command, make_parser
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.files import writing

from . import benchmark_step
from .step_benchmark.cases import make_cases
from .step_benchmark.options import parse

_LONG = "--set train.recompute=full train.loss_chunk=4096 --warmup 1 --steps 2 --no-repeat"
_SHORT = "--warmup 2 --steps 5 --no-repeat --no-profile"


@dataclass(frozen=True)
class _Part:
    name: str
    commands: Callable[[int], list[str]]
    """Arguments of `benchmark step` by the number of GPUs."""


def _powers(gpus: int) -> list[int]:
    return [2**power for power in range(1, gpus.bit_length())]


def _scaling(gpus: int) -> list[str]:
    sizes = [f"{key}{size}" for size in _powers(gpus) for key in ("dp", "tp", "cp", "pp")]
    one = f"--model hysparse_7b --layers 8 --vocab 8192 --lengths 8192 --splits 1,{{}} {_SHORT}"
    one += " --layouts hysparse --set cluster=h200 train.recompute=full"
    # A pipeline needs micro-batches to fill it, as many beside one device.
    alone = [size for size in sizes if not size.startswith("pp")]
    deep = [size for size in sizes if size.startswith("pp")]
    experts = ",".join(f"dp{size}-ep{size}" for size in _powers(gpus))
    return [
        one.format(",".join(alone)),
        f"{one.format(','.join(deep))} --micro-batches {4 * gpus}",
        "--model hysparse_80b_a3b --layers 12 --experts 16 --vocab 8192 --lengths 8192"
        f" --layouts hysparse --splits 1,{experts} {_SHORT} --set cluster=h200",
    ]


_PARTS = (
    _Part("7b", lambda gpus: [
        f"--model hysparse_7b --layers 36 --lengths 8192 --splits dp{gpus} {_SHORT}"
        " --set cluster=h200 train.loss_chunk=2048 train.recompute=selective"
    ]),
    _Part("long", lambda gpus: [
        f"--model hysparse_7b --layers 36 --lengths {length} --layouts full,hysparse"
        f" --splits cp{gpus} --picks clustered {_LONG} --set cluster=h200"
        for length in (131072, 262144)
    ]),
    _Part("experts", lambda gpus: [
        "--model hysparse_80b_a3b --layers 12 --experts 64 --vocab 8192 --lengths 32768"
        f" --layouts full,hysparse --splits dp{gpus}-ep{gpus} --picks clustered {_SHORT}"
        " --set cluster=h200 train.recompute=full"
    ]),
    _Part("million", lambda gpus: [
        "--model hysparse_80b_a3b --layers 12 --experts 16 --vocab 8192 --lengths 1048576"
        f" --layouts hysparse --splits cp{gpus} --picks clustered {_LONG} --set cluster=h200"
    ]),
    _Part("scaling", _scaling),
)  # fmt: skip
PARTS = {part.name: part for part in _PARTS}


@command
def main(argv: Sequence[str]) -> int:
    """Run a part; `argv` is the command line without the program's name."""
    parser = make_parser("hysparse benchmark host", __doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--gpus", type=int, metavar="N", help="a power of two; default: all")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="of the logs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args(list(argv))
    there = _gpus()
    gpus = there if options.gpus is None else options.gpus
    if gpus < 2 or gpus & (gpus - 1):
        raise ConfigError(f"--gpus: got {gpus}; allowed 2, 4, 8, ..")
    if gpus > there and not options.dry_run:
        raise ConfigError(f"--gpus {gpus}: this host has {there}; --dry-run prints the commands")
    commands = [shlex.split(text) for text in PARTS[options.part].commands(gpus)]
    for number, arguments in enumerate(commands, start=1):
        log = options.output / f"{options.part}-{gpus}-{number}.txt"
        arguments += ["--output", str(log)]
        make_cases(parse(arguments))  # a mistake in the last must not cost the others
    if not options.dry_run:
        with writing(options.output, "--output"):
            options.output.mkdir(parents=True, exist_ok=True)
    codes = []
    for arguments in commands:
        print(f"hysparse benchmark step {shlex.join(arguments)}", flush=True)
        if not options.dry_run:
            codes.append(benchmark_step.main(arguments))
    return max(codes, default=0)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main())
