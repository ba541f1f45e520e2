"""Memory and speed of generation: `hysparse benchmark decode [options]`.

    hysparse benchmark decode --model hysparse_80b_a3b --lengths 8192,32768,131072 \\
        --set model.moe.num_experts=0 model.ffn_hidden_size=4096

A model of random weights, and the same with full layers alone, each with a cache that holds
sequences of so many tokens. What the cache takes is read off the device, not computed. Then whole
decode steps are timed, embedding to logits: of one sequence, and of as many as fit. Steps run
kernel by kernel or, where that can be, as a CUDA graph. Keys and values are random too: so is what
sparse layers select, and a step reads as much as any other.

exit codes: 0 measured, whatever the numbers; 1 nothing could be measured; 2 bad options
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hysparse_kernels.benchmarking.report import environment

from hysparse_megatron.architecture.kv_cache import kv_cache_bytes
from hysparse_megatron.command import command, make_parser, positive
from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config, Precision
from hysparse_megatron.config.validate import check
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.memory import GIB
from hysparse_megatron.runtime.launcher import Rank
from hysparse_megatron.runtime.quiet import quiet_libraries

from .step_benchmark.report import StepReport
from .step_benchmark.slices import FULL, HYSPARSE, SWA

if TYPE_CHECKING:
    import torch

    from hysparse_megatron.inference.kv_cache import KvCache
    from hysparse_megatron.inference.load import LoadedModel

LAYOUTS = (HYSPARSE, SWA, FULL)
_LEFT_FREE = 0.08
"""Share of the free memory that no cache is given: a step needs some for itself."""
_MOST_SEQUENCES = 1024
_WARMUP_STEPS = 2
_TABLE = (
    f"  {'layout':10s}{'batch':>6s}{'cache':>10s}{'on device':>11s}{'planned':>10s}"
    f"{'a sequence':>12s}{'kernels':>10s}{'tokens/s':>11s}{'graph':>10s}{'tokens/s':>11s}"
)


@command
def main(argv: Sequence[str]) -> int:
    """Measure as `argv` says, the command line without the program's name."""
    args = _parser().parse_args(list(argv))
    configs = {name: _config(args, name) for name in args.layouts}
    quiet_libraries()
    return _measure(args, configs, argv)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse benchmark decode", __doc__)
    add = parser.add_argument
    add("--model", default="hysparse_80b_a3b", metavar="PRESET", help="of conf/model")
    add("--set", action="append", default=[], nargs="+", metavar="KEY=VALUE", help="overrides")
    add("--vocab", type=positive, default=8192, metavar="N", help="token ids (default %(default)s)")
    add("--layouts", type=_layouts, default=LAYOUTS, help=f"of {','.join(LAYOUTS)}")
    add("--lengths", type=_lengths, default=(32768,), metavar="N,N", help="tokens in the cache")
    add(
        "--batches",
        type=_batches,
        default=(1, None),
        metavar="N,fit",
        help="sequences of a step; fit: as many as the device has memory for (default 1,fit)",
    )
    add("--steps", type=positive, default=20, metavar="N", help="timed steps (default %(default)s)")
    add("--cache-dtype", choices=("model", "bf16", "fp8"), default="model")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--output", type=Path, metavar="FILE.txt", help="text file; the JSON lies beside it")
    return parser


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(positive, text.split(","))))


def _batches(text: str) -> tuple[int | None, ...]:
    parts = dict.fromkeys(text.split(","))
    return tuple(None if part == "fit" else positive(part) for part in parts)


def _layouts(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]}; allowed some of {','.join(LAYOUTS)}")
    return names


def _config(args: argparse.Namespace, name: str) -> Config:
    """The configuration of one layout of the model. Raises ConfigError."""
    overrides = [override for group in args.set for override in group]
    config = compose([f"model={args.model}", f"model.vocab_size={args.vocab}", *overrides])
    layout = config.model.layout.replace("|", " ")
    if name != HYSPARSE:
        layout = layout.replace("S", "W" if name == SWA else "F")
    if name == FULL:
        layout = layout.replace("W", "F")
    precision = Precision.bf16 if args.device == "cuda" else Precision.fp32
    length = max(args.lengths) + args.steps + _WARMUP_STEPS
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layout=layout),
        train=dataclasses.replace(config.train, seq_length=length, precision=precision),
    )
    check(config, world_size=1)
    return config


def _measure(args: argparse.Namespace, configs: dict[str, Config], argv: Sequence[str]) -> int:
    import torch

    from hysparse_megatron.runtime import device as runtime_device
    from hysparse_megatron.runtime.process_groups import destroy_process_groups

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device")
    if args.output is not None and args.output.suffix != ".txt":
        raise ConfigError(f"--output: got {args.output}; allowed a file that ends in .txt")
    command = f"hysparse benchmark decode {shlex.join(argv)}".strip()
    report = StepReport(args.output, environment(args.device, command))
    report.begin()
    rows: list[dict[str, Any]] = []
    parallel = next(iter(configs.values())).parallel
    device = runtime_device.start(Rank(0, 1, 0, 1), parallel)
    for name, config in configs.items():
        loaded = _random_model(config, device)
        report.log()
        report.log(
            f"{name}: {config.model.layout}, hidden {config.model.hidden_size}, "
            f"{sum(p.numel() for p in loaded.model.parameters()):,} parameters, {loaded.dtype}"
        )
        report.log(_TABLE)
        for length in args.lengths:
            report.log(f"  {length:,} tokens")
            for batch in args.batches:
                row = {"layout": name, "length": length}
                row |= _case(args, loaded, length, batch)
                report.log(_line(row))
                rows.append(row)
                report.write({"rows": rows})
        del loaded
        _release(device)
        destroy_process_groups()
        runtime_device.stop()
        if name != list(configs)[-1]:
            device = runtime_device.start(Rank(0, 1, 0, 1), parallel)
    report.log()
    for line in _ratios(rows):
        report.log(line)
    report.write({"rows": rows})
    return 0 if any("note" not in row for row in rows) else 1


def _random_model(config: Config, device: torch.device) -> LoadedModel:
    import torch

    from hysparse_megatron.inference.load import LoadedModel, build_model

    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    model, groups = build_model(config, device, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, config.model.init_std)
    return LoadedModel(config, model, groups, device, vocab_size, Path(), None)


def _release(device: torch.device) -> None:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _used(device: torch.device) -> tuple[int, int]:
    """Bytes that PyTorch's tensors take, and that the device has given away."""
    import torch

    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device), total - free


def _case(
    args: argparse.Namespace, loaded: LoadedModel, length: int, batch: int | None
) -> dict[str, Any]:
    """One row of the table: a cache of so many sequences, and steps."""
    import torch

    from hysparse_megatron.inference.generate import CacheDtype, new_cache

    dtype = CacheDtype(args.cache_dtype)
    capacity = length + args.steps + _WARMUP_STEPS
    _release(loaded.device)
    if batch is None:
        one = new_cache(loaded, [capacity], dtype, device="meta").num_bytes
        batch = _fitting(loaded, one)
        if batch == 0:
            return {"batch": 0, "note": "not even one sequence fits"}
    before = _used(loaded.device)
    try:
        cache = new_cache(loaded, [capacity] * batch, dtype)
        after = _used(loaded.device)
        _fill(cache, length)
        row: dict[str, Any] = {
            "batch": batch,
            "cache_bytes": cache.num_bytes,
            "allocated_bytes": after[0] - before[0],
            "device_bytes": after[1] - before[1],
            "planned_bytes": batch * kv_cache_bytes(
                loaded.config.model, loaded.kinds, capacity,
                dtype.resolve(loaded.dtype).itemsize, loaded.dtype.itemsize,
            ),
        }  # fmt: skip
        for name, seconds in _times(args, loaded, cache, length):
            row[f"{name}_seconds"] = seconds
    except torch.OutOfMemoryError as error:
        return {"batch": batch, "note": f"out of memory: {str(error).splitlines()[0]}"}
    return row


def _fitting(loaded: LoadedModel, bytes_each: int) -> int:
    import psutil
    import torch

    if loaded.device.type == "cuda":
        free = torch.cuda.mem_get_info(loaded.device)[0]
    else:
        free = psutil.virtual_memory().available
    return min(_MOST_SEQUENCES, int(free * (1 - _LEFT_FREE)) // bytes_each)


def _fill(cache: KvCache, length: int) -> None:
    """As if `length` tokens of every sequence had come through."""
    import torch

    for layer in cache.layers:
        for tensor in layer.tensors:
            if tensor.dtype == torch.int8:  # exponents
                tensor.fill_(-8)
            elif tensor.itemsize == 1:  # FP8, whose bytes may be NaN
                tensor.view(torch.uint8).random_(0, 120)
            else:
                tensor.normal_()
    cache.lengths = [length] * len(cache.lengths)


def _times(
    args: argparse.Namespace, loaded: LoadedModel, cache: KvCache, length: int
) -> Iterator[tuple[str, float]]:
    """Seconds of a step, by how it is launched."""
    import torch

    from hysparse_megatron.inference.steps import EagerSteps, GraphedSteps, why_no_graph

    rows = list(range(len(cache.lengths)))
    kinds: list[tuple[str, Any]] = [("eager", EagerSteps)]
    if why_no_graph(loaded, cache) is None:
        kinds.append(("graph", GraphedSteps))
    for name, make in kinds:
        cache.lengths = [length] * len(rows)
        steps = make(loaded, cache)
        tokens = torch.randint(loaded.vocab_size, (len(rows),)).tolist()
        for step in range(_WARMUP_STEPS + args.steps):
            if step == _WARMUP_STEPS:
                _used(loaded.device)
                began = time.perf_counter()
            # As a greedy sampler: the host reads every token before the next step.
            tokens = steps.logits(rows, tokens).argmax(-1).tolist()
        yield name, (time.perf_counter() - began) / args.steps


def _line(row: dict[str, Any]) -> str:
    start = f"  {row['layout']:10s}{row['batch']:6d}"
    if "note" in row:
        return f"{start}  {row['note']}"
    sizes = "".join(
        f"{row[key] / GIB:{width}.3f}"
        for key, width in (("cache_bytes", 10), ("device_bytes", 11), ("planned_bytes", 10))
    )
    each = f"{row['cache_bytes'] / row['batch'] / 2**20:8.1f} MiB"
    times = "".join(
        f"{1e3 * row[key]:7.2f} ms{row['batch'] / row[key]:11,.0f}"
        for key in ("eager_seconds", "graph_seconds")
        if key in row
    )
    return f"{start}{sizes}{each}{times}"


def _ratios(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Full layers against the others, length by length."""
    good = [row for row in rows if "note" not in row]
    full = [row for row in good if row["layout"] == FULL]
    for base in full:
        same = [
            row
            for row in good
            if row is not base and row["layout"] != FULL and row["length"] == base["length"]
            and (row["batch"] == 1) == (base["batch"] == 1)
        ]  # fmt: skip
        for row in same:
            memory = [
                one[key] / one["batch"]
                for key in ("cache_bytes", "device_bytes")
                for one in (base, row)
            ]
            speed = _rate(row) / _rate(base)
            on_device = f", on the device {memory[2] / memory[3]:.2f}" if memory[3] else ""
            yield (
                f"  {base['length']:,} tokens, batch {row['batch']} / {base['batch']}: cache of a "
                f"sequence full / {row['layout']} {memory[0] / memory[1]:.2f}{on_device}; "
                f"tokens/s {row['layout']} / full {speed:.2f}"
            )


def _rate(row: dict[str, Any]) -> float:
    """Tokens a second, launched in the better way."""
    return row["batch"] / min(row[key] for key in row if key.endswith("_seconds"))


if __name__ == "__main__":
    sys.exit(main())
