"""How long a save keeps training waiting: `hysparse benchmark checkpoint [options]`.

    hysparse benchmark checkpoint --directory /scratch train.precision=bf16 model=hysparse_7b

Trains on random tokens and saves again and again, synchronously and asynchronously in turn, in one
process or under torchrun. Takes the overrides of `hysparse train` and writes
checkpoints, removed at the end, into `--directory`. Two costs of a save are shown: how long
training stood still in it, and by how much the whole took longer than its steps do without a save,
which counts the cores that writing takes from training too. The best of the repeats stands first.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.saver import Saver
from hysparse_megatron.command import command, make_parser, positive
from hysparse_megatron.config.cli import load, parse_arguments
from hysparse_megatron.errors import CheckpointError
from hysparse_megatron.files import writing
from hysparse_megatron.plan.suggest import check
from hysparse_megatron.runtime import device as runtime_device
from hysparse_megatron.runtime.agreement import on_rank_zero
from hysparse_megatron.runtime.launcher import rank_from_environment
from hysparse_megatron.training.state import TrainingState, build_state
from hysparse_megatron.training.step import train_step

from .step_benchmark.child import random_batch

SMALL = (
    "model.layout=F 3*S",
    "model.hidden_size=1024",
    "model.ffn_hidden_size=4096",
    "model.vocab_size=8192",
    "train.seq_length=64",
    "train.global_batch_size=1",
    "train.micro_batch_size=1",
    "checkpoint.keep=1",
)
"""80 million parameters: a checkpoint of 1.2 GB, which a common disk takes in a second or two."""


@command
def main(argv: Sequence[str]) -> int:
    """Measure; `argv` is the command line without the program's name."""
    parser = make_parser("hysparse benchmark checkpoint", __doc__)
    parser.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="saves of each kind"
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="where to write (default /tmp)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("overrides", nargs="*", help="group=option, key=value")
    args = parser.parse_intermixed_args(list(argv))
    config = load(parse_arguments([*SMALL, *args.overrides]))
    rank = rank_from_environment()
    check(config, rank.world_size)
    device = runtime_device.start(rank, config.parallel)
    state = build_state(config, config.model.vocab_size or 0, device)
    with (
        writing(args.directory, "--directory"),
        tempfile.TemporaryDirectory(dir=args.directory) as made,
    ):
        place = on_rank_zero(lambda: Path(made), CheckpointError)
        values = measure(state, place, args.repeats)
    if rank.rank == 0:
        print(json.dumps(values) if args.json else as_text(values))
    runtime_device.stop()
    return 0


def measure(state: TrainingState, directory: Path, repeats: int) -> dict[str, Any]:
    """Seconds by kind of save, one number a repeat, beside what was saved."""
    config = state.config
    batch = random_batch(config, seed=0)

    def step() -> float:
        started = time.perf_counter()
        train_step(state, 0, batch)
        return time.perf_counter() - started

    step()
    step_seconds = statistics.median(step() for _ in range(8))
    savers = {}
    for kind in ("synchronous", "asynchronous"):
        how = dataclasses.replace(config.checkpoint, asynchronous=kind == "asynchronous")
        of_kind = dataclasses.replace(state, config=dataclasses.replace(config, checkpoint=how))
        savers[kind] = Saver(of_kind, directory, lambda step, progress: {}, lambda text: None)
    found: dict[str, Any] = {kind: {"waited": [], "extra": []} for kind in savers}
    number = 0
    for repeat in range(repeats + 1):
        for kind, saver in savers.items():
            number += 1
            waited, extra = _one_save(saver, number, step, step_seconds)
            if repeat:  # the first save of all takes the memory that later ones reuse
                found[kind]["waited"].append(waited)
                found[kind]["extra"].append(extra)
    for saver in savers.values():
        saver.finish()  # older checkpoints are deleted beside training

    def size() -> int:
        files = store.read_manifest(store.step_directory(directory, number))["files"]
        return sum(entry["bytes"] for entry in files.values())

    return {
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else "cpu",
        "bytes": on_rank_zero(size, CheckpointError),
        "step_seconds": step_seconds,
        **found,
    }


def _one_save(
    saver: Saver, number: int, step: Callable[[], float], step_seconds: float
) -> tuple[float, float]:
    """Save once and train until it is done: seconds waited, and seconds more than without it."""
    began = time.perf_counter()
    saver.save(number, {})
    waited = time.perf_counter() - began
    steps = 0
    while saver.is_busy or not steps:
        step()
        steps += 1
        started = time.perf_counter()
        saver.poll()
        waited += time.perf_counter() - started
    return waited, time.perf_counter() - began - steps * step_seconds


def as_text(values: dict[str, Any]) -> str:
    """The table."""
    size, step_seconds = values["bytes"], values["step_seconds"]
    lines = [
        f"{values['device']}: checkpoints of {size / 1e9:.2f} GB, steps of {step_seconds:.3f} s",
        f"{'':14}{'training waited':>40}{'took longer in all':>40}",
    ]
    for kind in ("synchronous", "asynchronous"):
        cells = [
            f"{min(values[kind][cost]):.3f} s ({' '.join(f'{x:.2f}' for x in values[kind][cost])})"
            for cost in ("waited", "extra")
        ]
        lines.append(f"{kind:14}{cells[0]:>40}{cells[1]:>40}")
    share = min(values["asynchronous"]["waited"]) / min(values["synchronous"]["waited"])
    return "\n".join([*lines, f"asynchronous saves make training wait {share:.0%} as long"])


if __name__ == "__main__":
    sys.exit(main())
