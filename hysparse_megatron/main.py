"""The command `hysparse`: one subcommand for everything that is done with this project.

Also `python -m hysparse_megatron.main`. Imports no torch, and no subcommand but the one that runs.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import metadata

from hysparse_megatron import __version__
from hysparse_megatron.command import command
from hysparse_megatron.errors import ConfigError, did_you_mean

COMMANDS = {
    "train": ("__main__", "train in this process: alone, or as one rank of torchrun or srun"),
    "launch": ("launch.local", "train with several processes on this machine"),
    "submit": ("launch.submit", "check a run, then submit a Slurm job or a sweep of them"),
    "preflight": ("launch.preflight", "check packages, GPUs, data and disk before a run"),
    "plan": ("tools.plan", "parameters, memory, traffic and FLOPs of a run; parallel sizes"),
    "prepare-data": ("tools.prepare_data", "from text to token files"),
    "generate": ("tools.generate", "continue text with the model of a run"),
    "evaluate": ("tools.evaluate", "held-out loss, and questions about long texts"),
    "convert": ("tools.convert", "to and from Hugging Face: export, import, adopt"),
    "checkpoint": ("tools.checkpoint", "list, verify, show, diff and prune checkpoints"),
    "report": ("tools.report", "one page about a run"),
    "compare": ("tools.compare_runs", "whether runs are the same, and where they part"),
    "choose-full-layers": ("tools.choose_full_layers", "which layers of a model to keep full"),
    "draw-layout": ("tools.draw_layout", "a layout as an SVG"),
    "benchmark step": ("tools.benchmark_step", "time training steps of a slice of a model"),
    "benchmark host": ("tools.benchmark_host", "what the GPUs of one host do together"),
    "benchmark decode": ("tools.benchmark_decode", "memory and speed of generation"),
    "benchmark checkpoint": ("tools.benchmark_checkpoint", "how long a save delays training"),
    "measure-prepare": ("tools.measure_prepare", "speed and memory of prepare-data"),
    "measure-adoption": ("tools.measure_adoption", "what training brings back after adopt"),
    "capture-selections": ("tools.capture_selections", "save what the oracles of a run select"),
    "study": ("tools.study.__main__", "train and compare what a study file lists"),
    "completion": ("completion", "print the completion of bash"),
}
"""Names, the module below this package that each runs, and what it does."""

_LIST = "\n".join(f"  {name:<21}{text}" for name, (_, text) in COMMANDS.items())
_HELP = f"""\
usage: hysparse COMMAND ...

HySparse attention on Megatron-core: plan, train, evaluate, export.

commands:
{_LIST}

options:
  -h, --help           show this; hysparse COMMAND --help shows a command's options
  --version            show the version, and those of megatron-core and torch

Settings are given as group=option and key=value; hysparse train --help lists the presets."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` begins with as `python -m` runs its module.

    Returns the exit code of what is no subcommand: help, version and mistakes.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    name = next((name for n in (2, 1) if (name := " ".join(words[:n])) in COMMANDS), None)
    if name is None:
        return _about(argv)
    sys.argv = [sys.argv[0], *words[len(name.split()) :]]
    runpy.run_module(f"hysparse_megatron.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)
    return 0


@command
def _about(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else ConfigError.exit_code
    if argv[0] == "--version":
        print(_versions())
        return 0
    close = get_close_matches(" ".join(argv[:2]), COMMANDS, 1)
    raise ConfigError(f"{argv[0]}: no command{did_you_mean(close)} (see hysparse --help)")


def _versions() -> str:
    """This project's version and those of the packages that decide what it computes."""
    lines = [f"hysparse {__version__}"]
    for package in ("megatron-core", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines.append(f"{package} {metadata.version(package)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
