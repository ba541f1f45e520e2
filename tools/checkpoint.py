"""Look at the checkpoints of a run: `hysparse checkpoint COMMAND PATH`.

    hysparse checkpoint list runs/quickstart
    hysparse checkpoint verify runs/quickstart
    hysparse checkpoint show runs/quickstart/checkpoints/step-00000150
    hysparse checkpoint diff runs/first runs/second/checkpoints/step-00000150
    hysparse checkpoint prune runs/quickstart --keep 2 --keep-every 100 --dry-run

A path is a run directory or one checkpoint; of a run, show and diff take the newest valid one, and
prune takes a run alone.
Nothing is unpickled, so checkpoints of strangers can be looked at. Ends with 0, with 1 if diff
finds a difference, or with 6 if a checkpoint is damaged or there is none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hysparse_megatron.checkpoint import store
from hysparse_megatron.command import command, make_parser
from hysparse_megatron.config.frozen import CONFIG_FILE, load_frozen
from hysparse_megatron.errors import CheckpointError, ConfigError


@command
def main(argv: Sequence[str]) -> int:
    """Do what `argv` says, the command line without the program's name."""
    args = _parser().parse_args(list(argv))
    return args.action(args)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse checkpoint", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, action: Any, text: str, path: str, names: Sequence[str] = ("path",)) -> Any:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(action=action)
        for name in names:
            made.add_argument(name, type=Path, help=path)
        return made

    some = "run directory, or one checkpoint of it"
    one = "step directory, or a run directory: its newest valid checkpoint"
    listing = add("list", _list, "step, tokens, size, age and state of checkpoints", some)
    listing.add_argument("--content", action="store_true", help="hash files, not only their sizes")
    add("verify", _verify, "compare every file with its hash; names the damaged ones", some)
    showing = add("show", _show, "manifest and tensors of a checkpoint", one)
    showing.add_argument("--all", action="store_true", help="tensors of the optimizer too")
    both = ("first", "second")
    difference = add("diff", _diff, "what differs between two checkpoints", one, both)
    difference.add_argument("--all", action="store_true", help="tensors of the optimizer too")
    pruning = add(
        "prune",
        _prune,
        "delete what the rules do not keep; never the newest valid, nor proven, one",
        "run directory",
    )
    pruning.add_argument("--keep", type=_count, metavar="N", help="newest to keep; 0 keeps all")
    pruning.add_argument("--keep-every", type=_count, metavar="STEPS", help="and multiples of it")
    pruning.add_argument("--dry-run", action="store_true", help="say it, and delete nothing")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text}; allowed a whole number from 0")
    return int(text)


def _of_run(path: Path) -> list[Path]:
    """The checkpoints that `path` names, newest first. Raises CheckpointError if there is none."""
    found = [path] if store.is_checkpoint(path) else store.published(path / "checkpoints")
    if not found:
        raise store.nothing_at(path)
    return found


def _list(args: argparse.Namespace) -> int:
    found = _of_run(args.path)
    print(f"{'step':>10}{'tokens':>18}{'size':>12}{'age':>10}  state")
    for directory in found:
        tokens = size = age = "?"
        problems = store.problems_of(directory, content=args.content)
        try:
            age = _age(time.time() - directory.stat().st_mtime)
            size = _size(store.size_of(directory))
            manifest = {} if problems else store.read_manifest(directory)
            tokens = f"{manifest['tokens']:,}" if "tokens" in manifest else "?"
        except (CheckpointError, OSError) as error:  # such as one that is deleted meanwhile
            problems = problems or [str(error)]
        state = "; ".join(problems) or ("valid" if args.content else "complete")
        print(f"{store.step_of(directory):>10}{tokens:>18}{size:>12}{age:>10}  {state}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    damaged = 0
    for directory in _of_run(args.path):
        problems = store.problems_of(directory)
        damaged += bool(problems)
        print(f"{directory}: {'; '.join(problems) or 'valid'}")
    return CheckpointError.exit_code if damaged else 0


def _show(args: argparse.Namespace) -> int:
    # Imported late: listing and pruning need no torch, which takes seconds.
    from hysparse_megatron.checkpoint import tensors

    directory = store.resolve(args.path)
    manifest = store.read_manifest(directory)
    print(directory)
    for key in sorted(manifest.keys() - {"files"}):
        print(f"  {key}: {json.dumps(manifest[key])}")
    index = _tensors(directory, args.all)
    sizes = {name: tensors.num_bytes(entry) for name, entry in index.items()}
    width = max(map(len, index), default=0)
    for name, entry in sorted(index.items()):
        shape = " x ".join(map(str, entry["shape"]))
        print(f"{name:<{width}}  {entry['dtype']:<9}{shape:>20}{sizes[name]:>16,}")
    print(f"{len(index)} tensors, {sum(sizes.values()):,} bytes")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from hysparse_megatron.checkpoint import tensors

    first, second = (store.resolve(path) for path in (args.first, args.second))
    ours, theirs = (_tensors(directory, args.all) for directory in (first, second))
    lines = [f"{name}: only in {first}" for name in sorted(ours.keys() - theirs.keys())]
    lines += [f"{name}: only in {second}" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name], theirs[name]
        if one["shape"] != other["shape"]:
            lines.append(f"{name}: shape {one['shape']} and {other['shape']}")
            continue
        if one["dtype"] != other["dtype"]:
            lines.append(f"{name}: {one['dtype']} and {other['dtype']}")
        values = tensors.read_tensor(first, one).double()
        distance = (values - tensors.read_tensor(second, other).double()).abs()
        # Not `> 0`, which a NaN is not.
        if not bool((distance == 0).all()):
            largest, scale = float(distance.max()), float(values.abs().max())
            lines.append(f"{name}: largest difference {largest:.3e} (largest value {scale:.3e})")
    print("\n".join(lines) or f"{len(ours)} tensors are equal")
    return 1 if lines else 0


def _tensors(directory: Path, with_optimizer: bool) -> dict[str, dict[str, Any]]:
    from hysparse_megatron.checkpoint import tensors

    index = tensors.read_index(directory)
    wanted = (name for name in index if with_optimizer or not name.startswith(tensors.OPTIMIZER))
    return {name: index[name] for name in wanted}


def _prune(args: argparse.Namespace) -> int:
    if store.is_checkpoint(args.path):
        raise ConfigError(f"prune: got one checkpoint, {args.path}; allowed a run directory")
    checkpoints = args.path / "checkpoints"
    newest, rejected = store.latest_checkpoint(checkpoints)
    if newest is None:
        raise store.nothing_at(args.path, "a run directory")
    for problem in rejected:
        print(f"damaged, and left as it is: {problem}")
    keep, keep_every = args.keep, args.keep_every
    if keep is None or keep_every is None:  # the rules that the run itself follows
        rules = load_frozen(args.path / CONFIG_FILE).checkpoint
        keep = rules.keep if keep is None else keep
        keep_every = rules.keep_every if keep_every is None else keep_every
    if args.dry_run:
        for directory in store.superfluous(checkpoints, keep, keep_every, newest):
            print(f"would delete {directory}")
        return 0
    deleted, failures = store.prune(checkpoints, keep, keep_every, newest)
    for directory in deleted:
        print(f"deleted {directory}")
    for failure in failures:
        print(f"WARNING: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _size(size: float) -> str:
    """Bytes with a unit of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _age(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
